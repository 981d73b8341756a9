// Lists of pages that grow, are shared, converted and given back: the same steps on the oracle and on a table, each in its
// own memory; what a store says of itself must agree after each.
#include "kernels/harness.h"

namespace heed::test {
namespace {

/// The tables whose page lists are tested where their memory is: no coat.
std::vector<const Kernels*> own_tables() {
  std::vector<const Kernels*> out{&reference_kernels()};
  if (cuda_kernels()) out.push_back(cuda_kernels());
  return out;
}

constexpr int64_t kSegments = 4, kCapacity = 8, kSupply = 200;
constexpr int kD = 64;

/// One side's stores: a parent, and a child that shares its pages.
struct Side {
  const Kernels& run;
  Queue queue;
  std::vector<Buffer> memory;
  Pages pages[2];

  enum class Of { Layouts, Pairs, Slots };
  explicit Side(const Kernels& table, Of of = Of::Layouts) : run(table), queue(&table, *table.memory) {
    static const std::vector<Column> columns{{"score", Column::Keeps::User, 2, 1, 0.5f},
                                             {"low", Column::Keeps::KeyMin, 1, 16}};
    Pages& p = pages[0];
    const PageType plain{PageType::Kind::BF16}, small{PageType::Kind::Q8, PageType::Axis::Token, 32};
    p.layouts = {page_layout(kD, kD, plain, plain, table.v_transposed, true, columns)};
    PageType pair = plain;
    for (pair.pair = 1; of == Of::Pairs && pair.pair <= 2; ++pair.pair)
      p.layouts.push_back(page_layout(kD, kD, pair, pair, table.v_transposed, true, columns));
    if (of == Of::Layouts) p.layouts.push_back(page_layout(kD, kD, small, plain, table.v_transposed, false, columns));
    p.columns = &columns;
    p.kv_heads = 2;
    p.length_bound = kCapacity * kPage;
    for (const PageLayout& layout : p.layouts) {
      if (layout.k.pair == 2) {
        p.supply.push_back(p.supply.back());
        continue;
      }
      PageSupply supply{zeros(Dtype::U64, {kSupply}), zeros(Dtype::I32, {1}), layout.bytes};
      run.page_supply(queue, supply, zeros(Dtype::U8, {kSupply * (kPageHeader + layout.bytes)}));
      p.supply.push_back(supply);
    }
    pages[1] = p;
    for (Pages& store : pages) {
      store.table = zeros(Dtype::U64, {kSegments, kCapacity});
      store.layout = zeros(Dtype::U8, {kSegments, kCapacity});
      store.length = zeros(Dtype::I32, {kSegments});
      if (of != Of::Slots) continue;
      const int64_t slot = kCapacity * (kPageHeader + store.layouts[0].bytes);
      const auto at = reinterpret_cast<uint64_t>(zeros(Dtype::U8, {kSegments * slot}).data);
      std::vector<uint64_t> bases;
      for (int64_t s = 0; s < kSegments; ++s) bases.push_back(at + uint64_t(s * slot));
      store.supply[0].base = numbers(bases);
    }
  }
  Tensor zeros(Dtype type, std::initializer_list<int64_t> sizes) {
    memory.emplace_back(type, sizes, *run.memory);
    queue.fill(memory.back(), 0);
    return memory.back();
  }
  template <class T>
  Tensor numbers(const std::vector<T>& values) {
    memory.emplace_back(DtypeOf<T>::value, std::initializer_list<int64_t>{int64_t(values.size())}, *run.memory);
    queue.upload(Tensor(const_cast<T*>(values.data()), DtypeOf<T>::value, {int64_t(values.size())}), memory.back());
    return memory.back();
  }
  void append(int store, const std::vector<int64_t>& offsets, const std::vector<float>& k,
              const std::vector<int32_t>& positions) {
    const int64_t rows = offsets.back();
    Ragged keys{numbers(k), numbers(offsets), {}, 2, rows};
    keys.values = keys.values.reshape({std::max<int64_t>(1, rows), kD});
    const Tensor first = zeros(Dtype::I32, {kSegments});
    run.page_grow(queue, pages[store], keys, first);
    // page_write looks at lengths before the new rows or after them: either bounds what is held.
    run.page_write(queue, pages[store], keys, keys, numbers(positions), first);
  }
  /// One token of every sequence, its rows of heads [sequences, heads, kD]; what becomes of its queries.
  std::vector<float> append_token(const std::vector<float>& q, const std::vector<float>& k, const std::vector<float>& v,
                                  const std::vector<float>& norm, const Rope* rope, const std::vector<int32_t>& at) {
    const int64_t sequences = kSegments / 2, h = int64_t(q.size()) / sequences / kD;
    const auto heads = [&](const std::vector<float>& x, int64_t count) {
      return numbers(x).reshape({sequences, count, kD});
    };
    const auto rows = [&](int64_t count) {
      std::vector<int64_t> offsets;
      for (int64_t i = 0; i <= sequences * count; ++i) offsets.push_back(i);
      return Ragged{zeros(Dtype::F32, {sequences * count, kD}), numbers(offsets), {}, count, sequences * count};
    };
    Rope turn;
    if (rope)
      turn = *rope,
      turn.inv_freq = numbers(std::vector<float>(rope->inv_freq.as<float>(), rope->inv_freq.as<float>() + rope->dims / 2));
    std::vector<int32_t> each;  // a position for each segment
    for (int32_t position : at) each.insert(each.end(), 2, position);
    const Tensor positions = numbers(at), by = norm.empty() ? Tensor() : numbers(norm);
    const Heads parts[] = {{heads(q, h), by, rope ? &turn : nullptr, positions, rows(h)},
                           {heads(k, 2), by, rope ? &turn : nullptr, positions, rows(2)},
                           {.x = heads(v, 2), .out = rows(2)}};
    if (run.append_heads) {
      Pages own = pages[0];
      own.shared = false;
      run.append_heads(queue, 1e-5f, parts[0], parts[1], parts[2], own, numbers(each));
    } else {
      run.split_heads(queue, numbers(std::vector<int64_t>{0, 1, 2}), 1e-5f, std::span(parts));
      const Tensor first = zeros(Dtype::I32, {kSegments});
      run.page_grow(queue, pages[0], parts[1].out, first);
      run.page_write(queue, pages[0], parts[1].out, parts[2].out, numbers(each), first);
    }
    const Buffer out = queue.read_back(parts[0].out.values);
    return {out->as<float>(), out->as<float>() + out->numel()};
  }
  void fork() {
    for (auto [from, to] : {std::pair{&pages[0].table, &pages[1].table},
                            {&pages[0].layout, &pages[1].layout},
                            {&pages[0].length, &pages[1].length}})
      queue.move(*from, *to);
    run.page_hold(queue, pages[1]);
  }
  /// Lengths, layouts of pages that hold entries, and what lies free.
  std::vector<int64_t> shape() {
    std::vector<int64_t> out;
    for (Pages& store : pages) {
      const Buffer length = queue.read_back(store.length), layout = queue.read_back(store.layout);
      for (int64_t s = 0; s < kSegments; ++s) {
        out.push_back(length->at<int32_t>(s));
        for (int64_t p = 0; p * kPage < out.back(); ++p) out.push_back(layout->at<uint8_t>(s, p));
      }
    }
    for (const PageSupply& supply : pages[0].supply) out.push_back(queue.read_back(supply.top)->at<int32_t>(0));
    return out;
  }
  /// Keys and positions of a store, and its User column.
  std::vector<float> contents(int store) {
    const Buffer length = queue.read_back(pages[store].length);
    std::vector<int64_t> offsets{0};
    for (int64_t s = 0; s < kSegments; ++s) offsets.push_back(offsets.back() + length->at<int32_t>(s));
    const int64_t rows = offsets.back();
    std::vector<float> out;
    if (rows == 0) return out;
    const Ragged k{zeros(Dtype::F32, {rows, kD}), numbers(offsets), {}, 2, rows},
        v{zeros(Dtype::F32, {rows, kD}), k.offsets, {}, 2, rows},
        score{zeros(Dtype::F32, {rows, 2}), k.offsets, {}, 2, rows};
    const Tensor positions = zeros(Dtype::I32, {rows});
    run.page_read(queue, pages[store], nullptr, k, v, positions);
    run.column_read(queue, pages[store], 0, score);
    for (const Tensor& t : {k.values, v.values, score.values}) {
      const Buffer host = queue.read_back(t);
      out.insert(out.end(), host->as<float>(), host->as<float>() + host->numel());
    }
    const Buffer host = queue.read_back(positions);
    for (int64_t r = 0; r < rows; ++r) out.push_back(float(host->at<int32_t>(r)));
    return out;
  }
};

class PageLists : public testing::TestWithParam<const Kernels*> {};
INSTANTIATE_TEST_SUITE_P(Tables, PageLists, testing::ValuesIn(own_tables()),
                         [](const auto& table) { return table.param->name; });

TEST_P(PageLists, StepsEqualTheOracles) {
  Random random(41);
  for (int i = 0; i < cases(20); ++i) {
    Side want(reference_kernels()), got(*GetParam());
    want.queue.run = &reference_kernels();
    auto both = [&](auto step) { step(want), step(got); };
    auto compare = [&](const char* what, double bound) {
      SCOPED_TRACE(std::string(what) + " in case " + std::to_string(i));
      EXPECT_EQ(want.shape(), got.shape());
      for (int store = 0; store < 2; ++store) {
        const std::vector<float> a = want.contents(store), b = got.contents(store);
        ASSERT_EQ(a.size(), b.size());
        for (size_t j = 0; j < a.size(); ++j) ASSERT_NEAR(a[j], b[j], bound) << "store " << store << ", number " << j;
      }
    };
    auto append = [&](int store, int64_t most) {
      std::vector<int64_t> offsets{0};
      for (int64_t s = 0; s < kSegments; ++s)
        offsets.push_back(offsets.back() + (chance(random, 0.2) ? 0 : random.below(most)));
      std::vector<float> k(size_t(std::max<int64_t>(1, offsets.back()) * kD));
      for (float& x : k) x = float(random.normal());
      std::vector<int32_t> positions(size_t(std::max<int64_t>(1, offsets.back())));
      for (int32_t& x : positions) x = int32_t(random.below(1000));
      both([&](Side& side) { side.append(store, offsets, k, positions); });
    };
    auto limits = [&](int64_t most) {
      std::vector<int32_t> out;
      for (int64_t s = 0; s < kSegments; ++s) out.push_back(int32_t(random.below(most)));
      return out;
    };
    append(0, 200);
    append(0, 70);
    compare("grown", 0);
    both([](Side& side) { side.fork(); });
    append(1, 70);
    append(0, 70);
    compare("forked and grown apart", 0);
    const std::vector<int32_t> until = limits(300);
    both([&](Side& side) { side.run.page_own(side.queue, side.pages[1], side.numbers(until)); });
    compare("owned", 0);
    const std::vector<int32_t> first = limits(3), last = limits(6);
    const bool again = chance(random, 0.5);
    const int layout = int(random.below(2));
    for (int to : {1, layout})
      both([&](Side& side) {
        side.run.page_convert(side.queue, side.pages[0], side.numbers(first), side.numbers(last), to, again);
      });
    compare("converted", 0.1);  // a code that falls the other way, twice
    const std::vector<int32_t> left = limits(250);
    both([&](Side& side) { side.run.page_shrink(side.queue, side.pages[0], side.numbers(left)); });
    compare("shrunk", 0.1);
    append(0, 60);
    compare("grown again", 0.1);
    for (int store = 0; store < 2; ++store)
      both([&](Side& side) { side.run.page_shrink(side.queue, side.pages[store], side.zeros(Dtype::I32, {kSegments})); });
    compare("emptied", 0);
    EXPECT_EQ(got.shape().back(), kSupply);
  }
}

TEST_P(PageLists, TokensOfAllSequencesEqualTheOracles) {
  Random random(47);
  for (int i = 0; i < cases(20); ++i) {
    Side want(reference_kernels()), got(*GetParam());
    want.queue.run = &reference_kernels();
    const auto normals = [&](int64_t count) {
      std::vector<float> out(static_cast<size_t>(count));
      for (float& x : out) x = float(random.normal());
      return out;
    };
    // Segments that are empty, full to the end of a page, or end anywhere.
    std::vector<int64_t> offsets{0};
    for (int64_t s = 0; s < kSegments; ++s)
      offsets.push_back(offsets.back() + pick<int64_t>(random, {0, 63, 64, 1 + random.below(200)}));
    const std::vector<float> old = normals(std::max<int64_t>(1, offsets.back()) * kD);
    const std::vector<int32_t> places(size_t(std::max<int64_t>(1, offsets.back())), 7);
    for (Side* side : {&want, &got}) side->append(0, offsets, old, places);
    const int64_t group = pick<int64_t>(random, {1, 3, 8});
    const std::vector<float> norm = chance(random, 0.5) ? normals(kD) : std::vector<float>(),
                             inv_freq{1, 0.3f, 0.1f, 0.03f, 0.01f, 0.003f, 0.001f, 3e-4f};
    Rope rope;
    rope.dims = 2 * int(inv_freq.size()), rope.neox = chance(random, 0.5);
    rope.inv_freq = Tensor(const_cast<float*>(inv_freq.data()), Dtype::F32, {rope.dims / 2});
    const Rope* turn = chance(random, 0.7) ? &rope : nullptr;
    for (int32_t step = 0; step < 3; ++step) {
      const std::vector<float> q = normals(2 * 2 * group * kD), k = normals(4 * kD), v = normals(4 * kD);
      const std::vector<int32_t> at{100 + step, 30 * step};
      const std::vector<float> a = want.append_token(q, k, v, norm, turn, at), b = got.append_token(q, k, v, norm, turn, at);
      ASSERT_EQ(a.size(), b.size());
      for (size_t j = 0; j < a.size(); ++j) ASSERT_NEAR(a[j], b[j], 1e-4) << "query " << j / kD << " in case " << i;
      EXPECT_EQ(want.shape(), got.shape());
      const std::vector<float> held = want.contents(0), holds = got.contents(0);
      ASSERT_EQ(held.size(), holds.size());
      // Keys and values are bf16: the last bit may fall the other way.
      for (size_t j = 0; j < held.size(); ++j)
        ASSERT_NEAR(held[j], holds[j], 1e-3 + 0x1p-7 * std::abs(double(held[j]))) << "number " << j << " in case " << i;
    }
  }
}

/// Rows for both stores: of as many entries and the same positions, with keys of their own.
struct Appended {
  std::vector<int64_t> offsets{0};
  std::vector<float> k[2];
  std::vector<int32_t> positions;
  Appended(Random& random, int64_t most) {
    for (int64_t s = 0; s < kSegments; ++s) offsets.push_back(offsets.back() + 1 + random.below(most));
    for (auto& keys : k)
      for (int64_t i = 0; i < offsets.back() * kD; ++i) keys.push_back(float(random.normal()));
    for (int64_t r = 0; r < offsets.back(); ++r) positions.push_back(int32_t(random.below(1000)));
  }
};

void expect_alike(Side& want, Side& got, double bound, const char* what) {
  SCOPED_TRACE(what);
  EXPECT_EQ(want.shape(), got.shape());
  for (int store = 0; store < 2; ++store) {
    const std::vector<float> a = want.contents(store), b = got.contents(store);
    ASSERT_EQ(a.size(), b.size());
    for (size_t j = 0; j < a.size(); ++j) ASSERT_NEAR(a[j], b[j], bound) << "store " << store << ", number " << j;
  }
}

TEST_P(PageLists, TwoLayersShareAPage) {
  Random random(43);
  for (int i = 0; i < cases(10); ++i) {
    Side want(reference_kernels(), Side::Of::Pairs), got(*GetParam(), Side::Of::Pairs);
    auto both = [&](auto step) { step(want), step(got); };
    const Appended rows(random, 250);
    std::vector<float> apart[2];  // of keys and values
    for (auto& flags : apart)
      for (int64_t r = 0; r < rows.offsets.back(); ++r) flags.push_back(chance(random, 0.03) ? 1.0f : 0.0f);
    const std::vector<int32_t> first{0, 1, 0, 2}, last{9, 9, 2, 3};
    const float t = float(random.below(11)) / 10;
    both([&](Side& side) {
      for (int store = 0; store < 2; ++store) side.append(store, rows.offsets, rows.k[store], rows.positions);
    });
    const std::vector<float> before[2] = {want.contents(0), want.contents(1)};
    both([&](Side& side) {
      const Tensor offsets = side.numbers(rows.offsets);
      const Ragged k{side.numbers(apart[0]), offsets, {}, 2, rows.offsets.back()},
          v{side.numbers(apart[1]), offsets, {}, 2, rows.offsets.back()};
      side.run.page_pair(side.queue, side.pages[0], side.pages[1], side.numbers(first), side.numbers(last), 1, k, v, t);
    });
    expect_alike(want, got, 0.04, "shared");  // rows of bf16, times norms of eight
    const std::vector<float> after[2] = {want.contents(0), want.contents(1)};
    const Buffer layout = want.queue.read_back(want.pages[1].layout);
    for (int64_t s = 0; s < kSegments; ++s)
      for (int64_t r = rows.offsets[size_t(s)]; r < rows.offsets[size_t(s) + 1]; ++r) {
        const int64_t p = (r - rows.offsets[size_t(s)]) / kPage;
        const bool shares = layout->at<uint8_t>(s, p) == 2;
        EXPECT_FALSE(shares && (p < first[size_t(s)] || p >= last[size_t(s)]));
        for (int store = 0; store < 2 && (!shares || apart[0][size_t(r)] != 0); ++store)
          for (int64_t c = 0; c < kD; ++c)
            ASSERT_EQ(after[store][size_t(r * kD + c)], before[store][size_t(r * kD + c)]) << "stays as it is";
      }
    both([&](Side& side) {
      side.run.page_convert(side.queue, side.pages[1], side.numbers(std::vector<int32_t>{1, 0, 0, 0}),
                            side.numbers(std::vector<int32_t>{3, 1, 0, 9}), 0, false);
    });
    expect_alike(want, got, 0.04, "on its own again");
    both([&](Side& side) { side.append(0, rows.offsets, rows.k[1], rows.positions); });
    expect_alike(want, got, 0.04, "grown");
    for (int store = 0; store < 2; ++store)
      both([&](Side& side) { side.run.page_shrink(side.queue, side.pages[store], side.zeros(Dtype::I32, {kSegments})); });
    for (const PageSupply& supply : got.pages[0].supply)
      EXPECT_EQ(got.queue.read_back(supply.top)->at<int32_t>(0), kSupply);
  }
}

TEST_P(PageLists, SlotsHoldPagesInTheirPlaces) {
  Random random(44);
  for (int i = 0; i < cases(10); ++i) {
    Side want(reference_kernels(), Side::Of::Slots), got(*GetParam(), Side::Of::Slots);
    auto both = [&](auto step) { step(want), step(got); };
    for (int round = 0; round < 4; ++round) {
      const Appended rows(random, 90);
      both([&](Side& side) {
        for (int store = 0; store < 2; ++store) side.append(store, rows.offsets, rows.k[store], rows.positions);
      });
      expect_alike(want, got, 0, "grown");
      const std::vector<int32_t> left{int32_t(random.below(200)), 500, 70, int32_t(random.below(64))};
      both([&](Side& side) {
        side.run.page_shrink(side.queue, side.pages[1], side.numbers(left));
        side.run.page_convert(side.queue, side.pages[1], side.zeros(Dtype::I32, {kSegments}),
                              side.numbers(std::vector<int32_t>{9, 9, 0, 9}), 0, true);
      });
      expect_alike(want, got, 0, "cut, and made anew where it lies");
      const Buffer table = got.queue.read_back(got.pages[1].table),
                   base = got.queue.read_back(got.pages[1].supply[0].base),
                   length = got.queue.read_back(got.pages[1].length);
      for (int64_t s = 0; s < kSegments; ++s)
        for (int64_t p = 0; p * kPage < length->at<int32_t>(s); ++p)
          EXPECT_EQ(table->at<uint64_t>(s, p),
                    base->at<uint64_t>(s) + uint64_t(kPageHeader + p * (kPageHeader + got.pages[1].supply[0].page_bytes)));
    }
  }
}

}  // namespace
}  // namespace heed::test
