// Formulas over counts, block lists of tiles, and counted pairs, against loops written out.
#include "attention/numbers.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "attention/plans.h"
#include "backends.h"
#include "base/random.h"

namespace heed::test {
namespace {

class Numbers : public testing::TestWithParam<const char*> {
 protected:
  Numbers() : queue((guarded_kernels(), &kernels_named(GetParam())), *kernels_named(GetParam()).memory) {}
  template <class T>
  std::vector<T> back(const Tensor& t) {
    const Buffer host = queue.read_back(t);
    return {host->as<T>(), host->as<T>() + host->numel()};
  }
  Queue queue;
};
INSTANTIATE_TEST_SUITE_P(All, Numbers, testing::Values("reference", "guarded"));

TEST_P(Numbers, FormulasAreWhatTheySay) {
  const std::vector<int32_t> xs{5, -3, 0, 7, 64, 65, 1, 2};
  const std::vector<double> ys{0.5, -2, 3, 0, 1e9, -0.25, 2.5, -2.5};
  const Tensor x = queue.upload(xs), y = queue.upload(ys);
  const Num a = load(x, index()), b = load(y, index());
  const auto check = [&](const Num& formula, auto expected) {
    const std::vector<double> got = back<double>(compute(queue, Dtype::F64, {8}, formula));
    for (size_t i = 0; i < 8; ++i) {
      const double want = expected(double(xs[i]), ys[i]);
      if (std::isnan(want)) EXPECT_TRUE(std::isnan(got[i]));
      else EXPECT_EQ(got[i], want) << i;
    }
  };
  check(a + b * 2 - 1, [](double p, double q) { return p + q * 2 - 1; });
  check(a / b, [](double p, double q) { return p / q; });
  check(floor_div(a, 4), [](double p, double) { return std::floor(p / 4); });
  check(ceil_div(a, 64), [](double p, double) { return std::ceil(p / 64); });
  check(mod(a, 4), [](double p, double) { return p - 4 * std::floor(p / 4); });
  check(floor_div(a, b), [](double p, double q) { return q == 0 ? 0 : std::floor(p / q); });
  check(clamp(a, 0, 6), [](double p, double) { return std::clamp(p, 0.0, 6.0); });
  check(pick(a < b, a, b), [](double p, double q) { return p < q ? p : q; });
  check(a <= 5 && b > 0, [](double p, double q) { return double(p <= 5 && q > 0); });
  check(a == 7 || b >= 3, [](double p, double q) { return double(p == 7 || q >= 3); });
  check(round(b), [](double, double q) { return std::nearbyint(q); });  // halves to even
  check(floor(b), [](double, double q) { return std::floor(q); });
  check(log1p(exp(b / 1e9)), [](double, double q) { return std::log1p(std::exp(q / 1e9)); });
  check(sqrt(b) + tanh(a), [](double p, double q) { return std::sqrt(q) + std::tanh(p); });
  check(load(x, index() + 100), [](double, double) { return 2.0; });  // the nearest that is there
  check(load(x, index() - 100), [](double, double) { return 5.0; });
}

TEST_P(Numbers, RowsOfSegmentsKnowWhereTheyAre) {
  const std::vector<int64_t> offsets{2, 2, 7, 400}, ends{2, 5, 399};  // empty, with a gap, long
  Ragged over;
  over.offsets = queue.upload(offsets), over.ends = queue.upload(ends), over.bound = 400;
  const Tensor out = queue.scratch.take(Dtype::F32, {400});
  compute(queue, -1, out);
  compute(queue, over, segment() * 1e6 + length() * 1e3 + place(), out);
  const auto got = back<float>(out);
  for (int64_t r = 0; r < 400; ++r) {
    double want = -1;
    for (int s = 0; s < 3; ++s)
      if (r >= offsets[size_t(s)] && r < ends[size_t(s)])
        want = s * 1e6 + double(ends[size_t(s)] - offsets[size_t(s)]) * 1e3 + double(r - offsets[size_t(s)]);
    EXPECT_EQ(got[size_t(r)], float(want)) << r;
  }
  const Tensor wide = compute(queue, Dtype::I32, {5, 300}, place() * 1000 + channel() + index() * 0);
  const auto rows = back<int32_t>(wide);
  for (int32_t r = 0; r < 5; ++r)
    for (int32_t c = 0; c < 300; ++c) ASSERT_EQ(rows[size_t(r * 300 + c)], r * 1000 + c);
  const std::vector<int32_t> lengths{3, 0, 4};
  EXPECT_EQ(back<int64_t>(offsets_of(queue, 3, load(queue.upload(lengths), index()))), (std::vector<int64_t>{0, 3, 3, 7}));
}

TEST_P(Numbers, FindingIsALowerBound) {
  Random random(4);
  std::vector<int32_t> sorted;
  for (int i = 0; i < 50; ++i) sorted.push_back(int32_t(random.below(40)));
  std::sort(sorted.begin() + 5, sorted.begin() + 45);
  const Tensor x = queue.upload(sorted);
  const auto at = back<int32_t>(compute(queue, Dtype::I32, {42}, find(x, 5, 45, index())));
  const auto there = back<int32_t>(compute(queue, Dtype::I32, {42}, holds(x, 5, 45, index())));
  for (int32_t v = 0; v < 42; ++v) {
    const auto low = std::lower_bound(sorted.begin() + 5, sorted.begin() + 45, v);
    EXPECT_EQ(at[size_t(v)], low - sorted.begin());
    EXPECT_EQ(there[size_t(v)], low != sorted.begin() + 45 && *low == v);
  }
}

TEST_P(Numbers, MatchesCountsEqualElements) {
  Random random(9);
  std::vector<float> data;
  for (int i = 0; i < 200; ++i) data.push_back(float(random.below(3)));
  const Tensor x = queue.upload(data);
  const auto got = back<int32_t>(
      compute(queue, Dtype::I32, {60}, matches(x, index() * 3, 200 - index() * 4, mod(index(), 37))));
  for (int64_t i = 0; i < 60; ++i) {
    int32_t count = 0;
    for (int64_t k = 0; k < i % 37; ++k)
      count += data[size_t(std::min<int64_t>(199, i * 3 + k))] ==
               data[size_t(std::clamp<int64_t>(200 - i * 4 + k, 0, 199))];
    EXPECT_EQ(got[size_t(i)], count) << i;
  }
}

TEST_P(Numbers, AFormulaTooLongIsRefused) {
  Num sum = 1;
  EXPECT_THROW(for (int i = 0; i < 100; ++i) sum = sum + index(), Error);
}

// Tiles of single queries' block lists: the union, split into parts of 64 keys, each query still reading only its own.
TEST_P(Numbers, TilesReadWhatTheirQueriesDo) {
  Random random(7);
  for (const auto& [block, capacity, blocks] : {std::tuple{8, 2, 9}, {64, 3, 5}, {100, 1, 3}, {192, 2, 4}}) {
    const std::vector<int64_t> first{0, 64, 70, 71};
    std::vector<int32_t> index, count;
    std::vector<std::set<int32_t>> lists;
    for (int r = 0; r < 71; ++r) {
      std::set<int32_t> list;
      const int64_t wanted = random.below(capacity + 1);
      while (int64_t(list.size()) < wanted) list.insert(int32_t(random.below(blocks)));
      lists.push_back(list);
      count.push_back(int32_t(list.size()));
      std::vector<int32_t> row(list.begin(), list.end());
      row.resize(size_t(capacity), -7);
      index.insert(index.end(), row.begin(), row.end());
    }
    int split = (block + 63) / 64;
    while (block % split) ++split;
    const int64_t room = blocks * split;
    Plan plan;
    plan.form = Plan::Form::Blocks, plan.q_tile = 64, plan.k_tile = block / split;
    plan.rowptr = compute(queue, Dtype::I64, {4}, heed::index() * room);
    plan.count = queue.scratch.take(Dtype::I32, {3});
    plan.index = queue.scratch.take(Dtype::I32, {3 * room}), plan.mask = queue.scratch.take(Dtype::I32, {3 * room});
    plan.bits = queue.scratch.take(Dtype::U64, {3 * room / split, 64, 1});
    queue.run->tile_blocks(queue, queue.upload(index), queue.upload(count), capacity, queue.upload(first), split, plan);
    const auto counts = back<int32_t>(plan.count), entries = back<int32_t>(plan.index), masks = back<int32_t>(plan.mask);
    const auto bits = back<uint64_t>(plan.bits);
    for (int t = 0; t < 3; ++t)
      for (int64_t r = first[size_t(t)]; r < first[size_t(t + 1)]; ++r) {
        std::set<int32_t> keys, expected;
        for (int32_t b : lists[size_t(r)])
          for (int32_t j = b * block; j < (b + 1) * block; ++j) expected.insert(j);
        int32_t last = -1;
        for (int64_t e = t * room; e < t * room + counts[size_t(t)]; ++e) {
          EXPECT_GT(entries[size_t(e)], last);
          last = entries[size_t(e)];
          for (int j = 0; j < plan.k_tile; ++j) {
            const int32_t mask = masks[size_t(e)];
            if (mask < 0 || bits[size_t(mask) * 64 + size_t(r - first[size_t(t)])] >> j & 1)
              keys.insert(last * plan.k_tile + j);
          }
        }
        EXPECT_EQ(keys, expected) << block << " tile " << t << " row " << r;
      }
  }
}

// Pairs of every form, window, mask and causality, against what each_interval visits.
TEST_P(Numbers, PairsAreThoseOfThePlan) {
  Random random(9);
  const std::vector<int64_t> n{20, 0, 7}, m{50, 30, 7};  // three sequences
  const int64_t h = 4, g = 2;
  std::vector<int64_t> q_offsets{0}, k_offsets{0};
  std::vector<int32_t> q_pos, k_pos;
  for (size_t s = 0; s < 3; ++s) {
    for (int64_t i = 0; i < h; ++i) q_offsets.push_back(q_offsets.back() + n[s]);
    for (int64_t i = 0; i < g; ++i) k_offsets.push_back(k_offsets.back() + m[s]);
    for (int64_t i = 0; i < h * n[s]; ++i) q_pos.push_back(int32_t(2 * (m[s] - n[s] + i % std::max<int64_t>(1, n[s]))));
    for (int64_t i = 0; i < g * m[s]; ++i) k_pos.push_back(int32_t(2 * (i % m[s])));
  }
  Ragged q, k;
  q.offsets = Tensor(q_offsets.data(), Dtype::I64, {13}), q.heads = h, q.bound = q_offsets.back();
  k.offsets = Tensor(k_offsets.data(), Dtype::I64, {7}), k.heads = g, k.bound = k_offsets.back();
  Ragged dq = q, dk = k;
  dq.offsets = queue.upload(q_offsets), dk.offsets = queue.upload(k_offsets);
  for (auto form : {Plan::Form::Dense, Plan::Form::Interval, Plan::Form::Blocks, Plan::Form::Tokens})
    for (auto scope : {Plan::Scope::QueryHead, Plan::Scope::KvHead, Plan::Scope::Layer})
      for (int64_t window : {0, 31}) {
        Plan plan;
        plan.form = form, plan.scope = scope, plan.q_tile = 6, plan.k_tile = form == Plan::Form::Blocks ? 8 : 1,
        plan.causal = window == 0;
        const int64_t heads = scope_heads(scope, h, g), rows = heads * (4 + 0 + 2);
        std::vector<int64_t> rowptr{0};
        std::vector<int32_t> index;
        for (int64_t r = 0; r < rows && form != Plan::Form::Dense; ++r) {
          for (int32_t j = int32_t(random.below(4)); j < (form == Plan::Form::Blocks ? 9 : 60);
               j += 1 + int32_t(random.below(9))) {
            index.push_back(j);
            if (form == Plan::Form::Interval) index.push_back(j += int32_t(random.below(6)));
          }
          rowptr.push_back(int64_t(index.size()) / (form == Plan::Form::Interval ? 2 : 1));
        }
        Mods mods;
        mods.window = window;
        mods.q_pos = Tensor(q_pos.data(), Dtype::I32, {int64_t(q_pos.size())}),
        mods.k_pos = Tensor(k_pos.data(), Dtype::I32, {int64_t(k_pos.size())});
        Plan there = plan;
        if (form != Plan::Form::Dense) {
          plan.rowptr = Tensor(rowptr.data(), Dtype::I64, {rows + 1});
          plan.index = form == Plan::Form::Interval ? Tensor(index.data(), Dtype::I32, {rowptr.back(), 2})
                                                    : Tensor(index.data(), Dtype::I32, {rowptr.back()});
          there.rowptr = queue.upload(rowptr), there.index = queue.upload(plan.index);
        }
        Mods placed = mods;
        placed.q_pos = queue.upload(q_pos), placed.k_pos = queue.upload(k_pos);
        const Tensor pairs = queue.scratch.take(Dtype::F64, {h});
        queue.fill(pairs, 0);
        queue.run->count_pairs(queue, there, dq, {.panel = &dk, .pages = nullptr, .read = nullptr}, placed, pairs);
        const auto got = back<double>(pairs);
        for (int64_t head = 0; head < h; ++head) {
          double expected = 0;
          for (int64_t s = 0; s < 3; ++s)
            each_interval(plan, q, k, mods, s, head,
                          [&](int64_t, int64_t begin, int64_t end) { expected += double(end - begin); });
          EXPECT_EQ(got[size_t(head)], expected) << int(form) << " " << int(scope) << " window " << window;
        }
      }
}

}  // namespace
}  // namespace heed::test
