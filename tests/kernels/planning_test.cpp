#include "kernels/bounds.h"
#include "kernels/checks.h"
#include "kernels/harness.h"

namespace heed::test {
namespace {

std::vector<int64_t> some_lengths(Random& random, int64_t segments, int64_t longest) {
  std::vector<int64_t> out;
  for (int64_t s = 0; s < segments; ++s)
    out.push_back(chance(random, 0.15) ? 0 : chance(random, 0.15) ? 1 : random.below(longest + 1));
  return out;
}

Dtype any_float(Random& random) { return pick(random, {Dtype::F32, Dtype::BF16, Dtype::F16}); }

void pool_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(60); ++i) {
    const int64_t heads = 1 + random.below(3), width = pick<int64_t>(random, {0, 1, 5, 64, 80, 128});
    const int block = int(pick<int64_t>(random, {1, 2, 7, 16, 64}));
    const PoolKind kind = PoolKind(random.below(8));
    const std::vector<int64_t> lengths = some_lengths(random, heads * 2, 150);
    std::vector<int64_t> blocks;
    for (int64_t n : lengths) blocks.push_back((n + block - 1) / block);
    const RaggedData x = normal_ragged(random, any_float(random), lengths, heads, width, Layout::any(random));
    const bool concat = kind == PoolKind::Concat || kind == PoolKind::ConcatReversed;
    const int64_t width_out = concat ? std::max<int64_t>(1, width) * block : width;
    const Dtype to_type = concat && chance(random, 0.3) ? Dtype::BF16 : Dtype::F32;
    RaggedData want = ragged(random, to_type, blocks, heads, width_out, Layout::any(random));
    Poisoned got = want.values.twin();
    Ragged to = want.view;
    to.values = got;
    SCOPED_TRACE("case " + std::to_string(i) + ": kind " + std::to_string(int(kind)) + ", blocks of " +
                 std::to_string(block) + ", " + x.values->shape());
    Queue queue;
    oracle().pool(queue, x, kind, block, want.view);
    run.pool(queue, x, kind, block, to);
    const bool exact = kind != PoolKind::Mean && kind != PoolKind::Sum;
    expect_close("out", want.values, got, exact ? 0 : plain(block, 4.0 * (kind == PoolKind::Sum ? block : 1)));
  }
}

void smooth_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(40); ++i) {
    RaggedData x = normal_ragged(random, Dtype::F32, some_lengths(random, 4, 200), 2, 0, Layout::any(random));
    const int width = int(pick<int64_t>(random, {1, 3, 5, 7, 63, 255}));
    const PoolKind kind = pick(random, {PoolKind::Mean, PoolKind::Max});
    // A masked number must not leak further than its window.
    if (x.view.length(0) > 3) x.view.segment(0).at<float>(2) = -INFINITY;
    Poisoned want = x.values.twin(), got = x.values.twin();
    SCOPED_TRACE("case " + std::to_string(i) + ": width " + std::to_string(width));
    Queue queue;
    oracle().smooth(queue, x, kind, width, want);
    run.smooth(queue, x, kind, width, got);
    expect_close("out", want, got, kind == PoolKind::Max ? 0 : plain(width, 4));
  }
}

void combine_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(60); ++i) {
    const Combine how = Combine(random.below(10));
    const int64_t rows = random.below(3) == 0 ? random.below(3) : random.below(9000),
                  width = pick<int64_t>(random, {0, 1, 5, 64});
    std::vector<int64_t> sizes{rows};
    if (width > 0) sizes.push_back(width);
    const bool positive = how == Combine::Log || how == Combine::Power;
    auto draw = [&] {
      const double x = 0.1 + random.uniform();
      if (how == Combine::Finite || how == Combine::Forced) return chance(random, 0.3) ? double(INFINITY) : x;
      return positive ? x : chance(random, 0.1) ? 0.0 : x * (chance(random, 0.5) ? 1 : -1);
    };
    const Poisoned x = filled(Dtype::F32, sizes, draw, random.below(2), width > 0 ? random.below(5) : 0);
    const Poisoned y = filled(Dtype::F32, chance(random, 0.5) ? sizes : std::vector<int64_t>{rows},
                              [&] { return chance(random, 0.1) ? 0.0 : random.normal(); });
    const float factor = float(pick<double>(random, {1, -1, 0.5, 2}));
    const Tensor by = chance(random, 0.2) ? Tensor() : y.view();
    Poisoned want = x.twin(), got = x.twin();
    SCOPED_TRACE("case " + std::to_string(i) + ": " + std::to_string(int(how)) + " of " + x->shape());
    Queue queue;
    oracle().combine(queue, x, by, how, factor, want);
    run.combine(queue, x, by, how, factor, got);
    expect_close("out", want, got, plain(4, 300));
  }
}

void spread_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(80); ++i) {
    const int64_t heads = 1 + random.below(3), width = pick<int64_t>(random, {0, 1, 5, 64});
    const RaggedData x = normal_ragged(random, Dtype::F32, some_lengths(random, heads * 2, 200), heads, width,
                                       Layout::any(random));
    Spread how;
    how.over = Spread::Over(random.below(3));
    if (how.over == Spread::Over::Block) {
      how.block = pick<int64_t>(random, {0, 1, 7, 16, 300});
      how.first = pick<int64_t>(random, {0, 0, 3, 250});
      if (how.block > 0) how.ahead = random.below(3);
    }
    how.of = Spread::Of(random.below(how.over == Spread::Over::Block && how.ahead == 0 ? 6 : 5));
    Poisoned want = x.values.twin(), got = x.values.twin();
    SCOPED_TRACE("case " + std::to_string(i) + ": statistic " + std::to_string(int(how.of)) + " over " +
                 std::to_string(int(how.over)) + ", blocks of " + std::to_string(how.block) + " from " +
                 std::to_string(how.first) + ", ahead " + std::to_string(how.ahead));
    Queue queue;
    oracle().spread(queue, x, how, want);
    run.spread(queue, x, how, got);
    // NaN marks rows without a group: those must agree, and the others lie close.
    for (int64_t s = 0; s < x.view.segments(); ++s)
      for (int64_t r = x.view.begin(s); r < x.view.end(s); ++r)
        for (int64_t c = 0; c < std::max<int64_t>(1, width); ++c) {
          const double a = width > 0 ? want->at<float>(r, c) : want->at<float>(r),
                       b = width > 0 ? got->at<float>(r, c) : got->at<float>(r);
          ASSERT_EQ(std::isnan(a), std::isnan(b));
          if (!std::isnan(a)) { ASSERT_NEAR(a, b, plain(600, 600)); }
        }
    EXPECT_EQ(got.strays(), 0);
  }
}

/// A grid for each segment, and a twin for another table's results.
struct TwinGrids {
  RaggedData cells;
  Poisoned other;
  Buffer rows, cols;
  Grids view, twin;
  TwinGrids(Random& random, const std::vector<int64_t>& r, const std::vector<int64_t>& c, int64_t heads) {
    const int64_t segments = int64_t(r.size());
    rows = Buffer::of<int64_t>({segments}, r);
    cols = Buffer::of<int64_t>({segments}, c);
    std::vector<int64_t> sizes;
    for (size_t s = 0; s < r.size(); ++s) sizes.push_back(r[s] * c[s]);
    cells = ragged(random, Dtype::F32, sizes, heads, 0, Layout::any(random));
    other = cells.values.twin();
    view = {cells.view, rows, cols};
    twin = view;
    twin.cells.values = other;
  }
};

void proxy_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(60); ++i) {
    const int64_t g = 1 + random.below(3), h = g * pick<int64_t>(random, {1, 3, 8}),
                  width = pick<int64_t>(random, {3, 64, 80, 128, 260});
    const int64_t sequences = 1 + random.below(2);
    std::vector<int64_t> q_lengths, k_lengths, rows, cols;
    for (int64_t s = 0; s < sequences; ++s) {
      const int64_t n = pick<int64_t>(random, {0, 1, 5, 16, 33, 150}), m = pick<int64_t>(random, {0, 1, 17, 64, 70, 270});
      for (int64_t head = 0; head < h; ++head) {
        q_lengths.push_back(n);
        rows.push_back(n);
        cols.push_back(m);
      }
      for (int64_t kv = 0; kv < g; ++kv) k_lengths.push_back(m);
    }
    const Dtype type = any_float(random), k_type = chance(random, 0.3) ? Dtype::BF16 : type;
    const RaggedData q = normal_ragged(random, type, q_lengths, h, width, Layout::any(random));
    const RaggedData k = normal_ragged(random, k_type, k_lengths, g, width, Layout::any(random));
    Proxy how;
    how.scale = chance(random, 0.3) ? 0.25f : 0;
    how.softcap = chance(random, 0.2) ? 3 : 0;
    how.softmax = chance(random, 0.5);
    how.causal = chance(random, 0.7);
    how.q_tile = int(pick<int64_t>(random, {1, 4, 64}));
    how.k_tile = int(pick<int64_t>(random, {1, 4, 16}));
    how.offset = random.below(40);
    how.int8 = chance(random, 0.3);
    TwinGrids grid(random, rows, cols, h);
    SCOPED_TRACE("case " + std::to_string(i) + ": heads " + std::to_string(h) + "/" + std::to_string(g) + ", width " +
                 std::to_string(width) + " " + info(type).name + (how.int8 ? ", int8" : "") +
                 (how.softmax ? ", softmax" : ""));
    Queue queue;
    oracle().proxy(queue, q, k, how, grid.view);
    run.proxy(queue, q, k, how, grid.twin);
    // A rounding tie that falls the other way moves one product by 1/127 of a row's largest number.
    const double scale = how.scale != 0 ? double(how.scale) : 1 / std::sqrt(double(width));
    const double logit = longest_row(q.values) * longest_row(k.values) * scale;
    const double step = how.int8 ? largest(q.values) * largest(k.values) * scale / 127 : 0;
    const double u = unit(type, k_type, double(width)), rounded = rounded_query(type, k_type, logit, double(width));
    expect_close("cells", grid.cells.values, grid.other,
                 how.softmax ? u + 2 * (logit_error(logit) + rounded) + step : u * std::max(1.0, logit) / 4 + rounded + step);
  }
}

void proxy_reduce_equals_proxy_and_reduce(const Kernels& run, Random random) {
  if (!run.proxy_reduce) return;
  int done = 0;
  for (int i = 0; i < cases(40); ++i) {
    const int64_t g = 1 + random.below(3), h = g * pick<int64_t>(random, {1, 3, 8}),
                  width = pick<int64_t>(random, {64, 128}), sequences = 1 + random.below(2);
    Reduce by;
    by.kind = ReduceKind(random.below(3));
    by.row_block = int(pick<int64_t>(random, {1, 16, 64, 128, 200}));
    by.col_block = int(pick<int64_t>(random, {64, 128, 192, 256}));
    if (width > 128 && chance(random, 0.6)) by.col_block = 16, by.kind = ReduceKind::Sum;
    std::vector<int64_t> q_lengths, k_lengths, rows, cols, rows_out, cols_out;
    for (int64_t s = 0; s < sequences; ++s) {
      const int64_t n = pick<int64_t>(random, {0, 1, 33, 192, 193, 450}),
                    m = pick<int64_t>(random, {0, 1, 64, 127, 300, 520});
      for (int64_t head = 0; head < h; ++head) {
        q_lengths.push_back(n), rows.push_back(n), cols.push_back(m);
        const bool blocks = by.to == Reduce::To::Blocks;
        rows_out.push_back(blocks ? (n + by.row_block - 1) / by.row_block : 1);
        cols_out.push_back(blocks ? (m + by.col_block - 1) / by.col_block : m);
      }
      k_lengths.insert(k_lengths.end(), size_t(g), m);
    }
    const Dtype type = width <= 128 && chance(random, 0.5) ? Dtype::F32 : Dtype::BF16;
    const Layout layout{chance(random, 0.4), 0, chance(random, 0.3) ? 8 : 0};
    const RaggedData q = normal_ragged(random, type, q_lengths, h, width, layout),
                     k = normal_ragged(random, Dtype::BF16, k_lengths, g, width, layout);
    Proxy how;
    how.scale = chance(random, 0.3) ? 0.25f : 0;
    how.softmax = true, how.causal = chance(random, 0.7);
    how.q_tile = int(pick<int64_t>(random, {1, 1, 4})), how.k_tile = int(pick<int64_t>(random, {1, 1, 4}));
    how.offset = pick<int64_t>(random, {0, 30, 200, -3});
    TwinGrids whole(random, rows, cols, h), grid(random, rows_out, cols_out, h);
    SCOPED_TRACE("case " + std::to_string(i) + ": heads " + std::to_string(h) + "/" + std::to_string(g) + ", width " +
                 std::to_string(width) + " " + info(type).name + ", blocks " + std::to_string(by.row_block) + "x" +
                 std::to_string(by.col_block) + " kind " + std::to_string(int(by.kind)));
    Queue queue;
    oracle().proxy(queue, q, k, how, whole.view);
    oracle().reduce(queue, whole.view, by, grid.view);
    if (!run.proxy_reduce(queue, q, k, how, by, grid.twin)) continue;
    ++done;
    const double scale = how.scale != 0 ? double(how.scale) : 1 / std::sqrt(double(width)),
                 logit = longest_row(q.values) * longest_row(k.values) * scale,
                 most = by.kind != ReduceKind::Sum ? 1 : std::max(1.0, largest(grid.cells.values));
    expect_close("cells", grid.cells.values, grid.other,
                 most * (0x1p-7 + 2 * (logit_error(logit) + rounded_query(type, Dtype::BF16, logit, double(width)))));
  }
  EXPECT_GT(done, 0);
}

void reduce_equals_reference(const Kernels& run, Random random) {
  using To = Reduce::To;
  for (int i = 0; i < cases(60); ++i) {
    Reduce how;
    how.to = pick(random, {To::Blocks, To::Columns, To::Diagonals, To::Rows});
    how.kind = pick(random, {ReduceKind::Sum, ReduceKind::Mean, ReduceKind::Max});
    how.row_block = int(pick<int64_t>(random, {1, 3, 8}));
    how.col_block = int(pick<int64_t>(random, {1, 4, 16}));
    std::vector<int64_t> rows = some_lengths(random, 4, 40), cols = some_lengths(random, 4, 70), rows_out, cols_out;
    for (size_t s = 0; s < rows.size(); ++s) {
      const bool blocks = how.to == To::Blocks;
      rows_out.push_back(blocks ? (rows[s] + how.row_block - 1) / how.row_block : how.to == To::Rows ? rows[s] : 1);
      cols_out.push_back(blocks ? (cols[s] + how.col_block - 1) / how.col_block : how.to == To::Rows ? 1 : cols[s]);
    }
    TwinGrids in(random, rows, cols, 2), out(random, rows_out, cols_out, 2);
    const double masked = pick(random, {0.0, 0.3, 0.95});
    for (int64_t s = 0; s < 4; ++s)
      each(in.view.cells.segment(s), [&](auto index) {
        set(in.view.cells.segment(s), index, chance(random, masked) ? -INFINITY : random.normal());
      });
    SCOPED_TRACE("case " + std::to_string(i) + ": to " + std::to_string(int(how.to)) + ", kind " +
                 std::to_string(int(how.kind)));
    Queue queue;
    oracle().reduce(queue, in.view, how, out.view);
    run.reduce(queue, in.view, how, out.twin);
    expect_close("cells", out.cells.values, out.other, how.kind == ReduceKind::Max ? 0 : plain(70, 4 * 70));
  }
}

void select_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(120); ++i) {
    const std::vector<int64_t> lengths = some_lengths(random, 6,
                                                      pick<int64_t>(random, {8, 300, 300, 2000, 2000, 12000, 40000}));
    RaggedData scores = ragged(random, Dtype::F32, lengths, 2, 0, Layout::any(random));
    Select how;
    how.by = pick(random, {Select::By::TopK, Select::By::TopP, Select::By::Threshold});
    // Multiples of 1/64 in a small range: ties abound, and sums are exact in any order, so TopP has one answer.
    const double masked = pick(random, {0.0, 0.2, 1.0});
    const double forced = chance(random, 0.3) ? 0.05 : 0;
    for (int64_t s = 0; s < 6; ++s)
      each(scores.view.segment(s), [&](auto index) {
        double x = double(random.below(chance(random, 0.5) ? 8 : 64)) / 64;
        if (chance(random, 0.5) && how.by != Select::By::TopP) x = -x;
        if (chance(random, masked)) x = chance(random, 0.5) ? -INFINITY : double(NAN);
        if (chance(random, forced)) x = INFINITY;
        set(scores.view.segment(s), index, x);
      });
    how.k = random.below(40);
    const Poisoned counts = filled(Dtype::I32, {6}, [&] { return double(random.below(60)) - 2; });
    if (chance(random, 0.3)) how.count = counts;
    how.p = how.by == Select::By::TopP ? pick(random, {0.0f, 0.25f, 0.5f, 0.75f, 1.0f})
                                       : pick(random, {-1.0f, 0.25f, 0.5f, 2.0f});
    how.crossing = chance(random, 0.5);
    how.at_least = chance(random, 0.4) ? random.below(20) : 0;
    const int64_t capacity = pick<int64_t>(random, {0, 1, 7, 64, 2500});
    Poisoned index(Dtype::I32, {6 * capacity}, random.below(2)), count(Dtype::I32, {6}), got_index = index.twin(),
                                                                                         got_count = count.twin();
    SCOPED_TRACE("case " + std::to_string(i) + ": by " + std::to_string(int(how.by)) + ", k " + std::to_string(how.k) +
                 ", p " + std::to_string(how.p) + ", capacity " + std::to_string(capacity) + ", at least " +
                 std::to_string(how.at_least) + (how.crossing ? ", crossing" : ""));
    Queue queue;
    oracle().select(queue, scores, how, capacity, index, count);
    run.select(queue, scores, how, capacity, got_index, got_count);
    expect_close("count", count, got_count, 0);
    expect_close("index", index, got_index, 0);
  }
}

/// Every element chosen scores no less than any left out, and of equal ones the lower index is in.
/// Segments of any length, few and many, of scores that are all different or few different ones.
void select_topk_is_largest(const Kernels& run, Random random) {
  for (int i = 0; i < cases(40); ++i) {
    const bool many = i % 20 == 7;
    const int64_t most = pick<int64_t>(random, {500, 500, 9000, 100000, 200000}),
                  segments = many ? 1500 : 1 + random.below(3);
    std::vector<int64_t> lengths;
    for (int64_t s = 0; s < segments; ++s)
      lengths.push_back(many && s % 300 != 5 ? random.below(200) : most / 2 + random.below(most / 2));
    RaggedData scores = ragged(random, Dtype::F32, lengths, 1, 0, {});
    const bool alike = chance(random, 0.4);
    for (int64_t j = 0; j < scores.view.offsets.at<int64_t>(segments); ++j)
      scores.values->at<float>(j) = alike ? float(random.below(30)) : float(random.normal());
    const Poisoned ks = filled(Dtype::I32, {segments}, [&] { return double(random.below(many ? 40 : most)); });
    const int64_t capacity = many ? 40 : most;
    Poisoned index(Dtype::I32, {segments * capacity}), count(Dtype::I32, {segments});
    Queue queue;
    Select how;
    how.count = ks;
    run.select(queue, scores, how, capacity, index, count);
    SCOPED_TRACE("case " + std::to_string(i) + ": " + std::to_string(segments) + " segments of up to " + std::to_string(most));
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t length = lengths[size_t(s)], k = std::min<int64_t>(length, ks->at<int32_t>(s));
      const float* x = scores.values->as<float>() + scores.view.begin(s);
      ASSERT_EQ(count->at<int32_t>(s), k);
      std::vector<bool> in(size_t(length), false);
      float least = INFINITY;
      int64_t last = -1;  // place of the last one chosen of the least
      for (int64_t j = 0; j < k; ++j) {
        const int32_t at = index->at<int32_t>(s * capacity + j);
        ASSERT_LT(at, length);
        if (j > 0) { ASSERT_LT(index->at<int32_t>(s * capacity + j - 1), at); }
        in[size_t(at)] = true;
        if (x[at] <= least) least = x[at], last = at;
      }
      for (int64_t j = 0; j < length; ++j)
        if (!in[size_t(j)] && k > 0) {
          ASSERT_TRUE(x[j] < least || (x[j] == least && j > last)) << j << " is out with " << x[j];
        }
    }
  }
}

void scan_equals_reference(const Kernels& run, Random random) {
  for (int i = 0; i < cases(50); ++i) {
    const int64_t width = pick<int64_t>(random, {0, 1, 5, 64, 80});
    const RaggedData x = normal_ragged(random, Dtype::F32, some_lengths(random, 4, 130), 2, width, Layout::any(random), 2);
    const ScanKind kind = pick(random, {ScanKind::Linear, ScanKind::Lse, ScanKind::Min, ScanKind::Max, ScanKind::Mean});
    const Poisoned a = row_numbers(x, Dtype::F32, width, [&] { return random.uniform(); });
    Poisoned want = x.values.twin(), got = x.values.twin();
    SCOPED_TRACE("case " + std::to_string(i) + ": kind " + std::to_string(int(kind)) + " of " + x.values->shape());
    Queue queue;
    const Tensor factor = kind == ScanKind::Linear ? a.view() : Tensor();
    oracle().scan(queue, x, factor, kind, want);
    run.scan(queue, x, factor, kind, got);
    const bool exact = kind == ScanKind::Min || kind == ScanKind::Max;
    expect_close("out", want, got, exact ? 0 : plain(130, 16));
  }
}

/// More segments than the second dimension of a GPU's grid has blocks: one a row of a long prompt's heads.
void many_segments_equal_reference(const Kernels& run, Random random) {
  std::vector<int64_t> lengths;
  for (int i = 0; i < 70'000; ++i) lengths.push_back(random.below(3));
  const RaggedData x = normal_ragged(random, Dtype::F32, lengths, 1, 1, {});
  Poisoned want = x.values.twin(), got = x.values.twin();
  Queue queue;
  oracle().scan(queue, x, {}, ScanKind::Max, want), run.scan(queue, x, {}, ScanKind::Max, got);
  expect_close("scan", want, got, 0);
  Numbers segment;
  segment.count = 1, segment.steps[0].op = Numbers::Op::Segment;
  oracle().compute(queue, segment, &x.view, want), run.compute(queue, segment, &x.view, got);
  expect_close("compute", want, got, 0);
  const Tensor rows = x.view.values.reshape({x.view.values.size[0]});
  Ragged flat = x.view;
  flat.values = rows;
  Poisoned smooth_want(Dtype::F32, {rows.size[0]}), smooth_got = smooth_want.twin();
  oracle().smooth(queue, flat, PoolKind::Max, 3, smooth_want), run.smooth(queue, flat, PoolKind::Max, 3, smooth_got);
  expect_close("smooth", smooth_want, smooth_got, 0);
  for (int64_t& length : lengths) length = (length + 1) / 2;
  const RaggedData pooled = ragged(random, Dtype::F32, lengths, 1, 1, {});
  const Poisoned pooled_got = pooled.values.twin();
  Ragged to = pooled.view;
  to.values = pooled_got;
  oracle().pool(queue, x, PoolKind::Max, 2, pooled), run.pool(queue, x, PoolKind::Max, 2, to);
  expect_close("pool", pooled.values, pooled_got, 0);
  // A long segment among them.
  lengths.back() = 5000;
  const RaggedData scores = normal_ragged(random, Dtype::F32, lengths, 1, 0, {});
  const int64_t segments = int64_t(lengths.size());
  Select best;
  best.k = 3;
  const Poisoned index(Dtype::I32, {segments * 4}), count(Dtype::I32, {segments}), got_index = index.twin(),
                                                                                   got_count = count.twin();
  oracle().select(queue, scores, best, 4, index, count), run.select(queue, scores, best, 4, got_index, got_count);
  expect_close("count", count, got_count, 0);
  expect_close("index", index, got_index, 0);
}

/// Numbers 1 … count in one segment.
RaggedData counting(int64_t count, int64_t width) {
  Random random(0);
  RaggedData out = ragged(random, Dtype::F32, {count}, 1, width, {});
  double next = 0;
  each(out.values, [&](auto index) { set(out.values, index, ++next); });
  return out;
}

TEST(Reference, PoolOfFiveRows) {
  const RaggedData x = counting(5, 2);  // (1 2) (3 4) (5 6) (7 8) (9 10)
  auto pooled = [&](PoolKind kind, int block, int64_t width) {
    Random random(0);
    RaggedData out = ragged(random, Dtype::F32, {(5 + block - 1) / block}, 1, width, {});
    Queue queue;
    oracle().pool(queue, x, kind, block, out);
    return read(out.values);
  };
  using V = std::vector<float>;
  EXPECT_EQ(pooled(PoolKind::Mean, 2, 2), (V{2, 3, 6, 7, 9, 10}));
  EXPECT_EQ(pooled(PoolKind::Sum, 3, 2), (V{9, 12, 16, 18}));
  EXPECT_EQ(pooled(PoolKind::Min, 3, 2), (V{1, 2, 7, 8}));
  EXPECT_EQ(pooled(PoolKind::Max, 3, 2), (V{5, 6, 9, 10}));
  EXPECT_EQ(pooled(PoolKind::First, 4, 2), (V{1, 2, 9, 10}));
  EXPECT_EQ(pooled(PoolKind::Last, 4, 2), (V{7, 8, 9, 10}));
  EXPECT_EQ(pooled(PoolKind::Concat, 3, 6), (V{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 0}));
  EXPECT_EQ(pooled(PoolKind::ConcatReversed, 3, 6), (V{5, 6, 3, 4, 1, 2, 0, 0, 9, 10, 7, 8}));
}

TEST(Reference, SmoothOfFiveNumbers) {
  const RaggedData x = counting(5, 0);
  Poisoned out = x.values.twin();
  Queue queue;
  oracle().smooth(queue, x, PoolKind::Mean, 3, out);
  EXPECT_EQ(read(out), (std::vector<float>{1, 2, 3, 4, 3}));
  oracle().smooth(queue, x, PoolKind::Max, 3, out);
  EXPECT_EQ(read(out), (std::vector<float>{2, 3, 4, 5, 5}));
  EXPECT_THROW(oracle().smooth(queue, x, PoolKind::Mean, 4, out), Error);
}

TEST(Reference, ReduceOfATwoByThreeGrid) {
  Random random(0);
  TwinGrids in(random, {2}, {3}, 1);
  const float cells[] = {1, 2, -INFINITY, 4, 5, 6};
  for (int i = 0; i < 6; ++i) in.view.cells.segment(0).at<float>(i) = cells[i];
  auto reduced = [&](Reduce how, int64_t rows, int64_t cols) {
    TwinGrids out(random, {rows}, {cols}, 1);
    Queue queue;
    oracle().reduce(queue, in.view, how, out.view);
    return read(out.view.cells.segment(0));
  };
  using V = std::vector<float>;
  using To = Reduce::To;
  EXPECT_EQ(reduced({To::Columns, ReduceKind::Sum}, 1, 3), (V{5, 7, 6}));
  EXPECT_EQ(reduced({To::Columns, ReduceKind::Mean}, 1, 3), (V{2.5, 3.5, 6}));
  EXPECT_EQ(reduced({To::Rows, ReduceKind::Max}, 2, 1), (V{2, 6}));
  EXPECT_EQ(reduced({To::Blocks, ReduceKind::Sum, 2, 2}, 1, 2), (V{12, 6}));
  EXPECT_EQ(reduced({To::Blocks, ReduceKind::Sum, 1, 2}, 2, 2), (V{3, -INFINITY, 9, 6}));
  // Offset 0 is the diagonal that ends in the last cell; offset 2 has only the cell (1, 0).
  EXPECT_EQ(reduced({To::Diagonals, ReduceKind::Sum}, 1, 3), (V{8, 6, 4}));
}

TEST(Reference, ProxyOfTinyRows) {
  Random random(0);
  const RaggedData q = counting(2, 1), k = counting(3, 1);
  auto scored = [&](Proxy how) {
    TwinGrids out(random, {2}, {3}, 1);
    Queue queue;
    oracle().proxy(queue, q, k, how, out.view);
    return read(out.view.cells.segment(0));
  };
  Proxy how;
  how.scale = 2;
  how.causal = false;
  EXPECT_EQ(scored(how), (std::vector<float>{2, 4, 6, 4, 8, 12}));
  how.causal = true;
  how.offset = 1;
  EXPECT_EQ(scored(how), (std::vector<float>{2, 4, -INFINITY, 4, 8, 12}));
  how.softmax = true;
  how.scale = float(std::log(2.0));
  const std::vector<float> p = scored(how);
  EXPECT_NEAR(p[0], 2.0 / 6, 1e-6);
  EXPECT_EQ(p[2], 0);
  EXPECT_NEAR(p[5], 64.0 / 84, 1e-6);
}

TEST(Reference, SelectRules) {
  Random random(0);
  RaggedData scores = ragged(random, Dtype::F32, {8}, 1, 0, {});
  const float x[] = {0.1f, 0.4f, NAN, 0.4f, -INFINITY, 0.1f, INFINITY, 0.0f};
  for (int i = 0; i < 8; ++i) scores.values->at<float>(i) = x[i];
  auto chosen = [&](Select how, int64_t capacity = 8) {
    Poisoned index(Dtype::I32, {capacity}), count(Dtype::I32, {1});
    Queue queue;
    oracle().select(queue, scores, how, capacity, index, count);
    return std::vector<int32_t>(index->as<int32_t>(), index->as<int32_t>() + count->at<int32_t>(0));
  };
  using V = std::vector<int32_t>;
  Select how;
  how.k = 2;
  EXPECT_EQ(chosen(how), (V{1, 6}));
  how.k = 4;
  EXPECT_EQ(chosen(how), (V{0, 1, 3, 6}));
  how.k = 100;
  EXPECT_EQ(chosen(how), (V{0, 1, 3, 5, 6, 7}));
  EXPECT_EQ(chosen(how, 3), (V{1, 3, 6}));
  how.by = Select::By::Threshold;
  how.p = 0.1f;
  EXPECT_EQ(chosen(how), (V{0, 1, 3, 5, 6}));
  how.by = Select::By::TopP;  // shares 0.4, 0.4, 0.1, 0.1; the forced one has none
  how.p = 0.5f;
  EXPECT_EQ(chosen(how), (V{1, 3, 6}));
  how.crossing = false;
  EXPECT_EQ(chosen(how), (V{1, 6}));
  how.at_least = 4;
  EXPECT_EQ(chosen(how), (V{0, 1, 3, 6}));
}

TEST(Reference, ScanOfThreeNumbers) {
  const RaggedData x = counting(3, 0);
  Poisoned out = x.values.twin(), a = filled(Dtype::F32, {3}, [] { return 0.5; });
  Queue queue;
  auto scanned = [&](ScanKind kind) {
    oracle().scan(queue, x, a, kind, out);
    return read(out);
  };
  EXPECT_EQ(scanned(ScanKind::Linear), (std::vector<float>{1, 2.5, 4.25}));
  EXPECT_EQ(scanned(ScanKind::Mean), (std::vector<float>{1, 1.5, 2}));
  EXPECT_EQ(scanned(ScanKind::Max), (std::vector<float>{1, 2, 3}));
  EXPECT_EQ(scanned(ScanKind::Min), (std::vector<float>{1, 1, 1}));
  EXPECT_NEAR(scanned(ScanKind::Lse)[2], std::log(std::exp(1) + std::exp(2) + std::exp(3)), 1e-6);
}

TEST(Reference, CombineOfTwoNumbers) {
  const Poisoned x = filled(Dtype::F32, {4},
                            [i = 0]() mutable { return std::array{4.0, 0.25, double(INFINITY), 0.0}[size_t(i++)]; });
  const Poisoned y = filled(Dtype::F32, {4}, [i = 0]() mutable { return std::array{2.0, 0.0, 1.0, 3.0}[size_t(i++)]; });
  Queue queue;
  auto combined = [&](Combine how, float factor) {
    Poisoned out = x.twin();
    oracle().combine(queue, x, y, how, factor, out);
    return read(out);
  };
  using V = std::vector<float>;
  EXPECT_EQ(combined(Combine::Add, -1), (V{2, 0.25, INFINITY, -3}));
  EXPECT_EQ(combined(Combine::Divide, 3), (V{6, 0, INFINITY, 0}));
  EXPECT_EQ(combined(Combine::Max, 2), (V{4, 0.25, INFINITY, 6}));
  EXPECT_EQ(combined(Combine::Power, 0.5), (V{4, 0, INFINITY, 0}));
  EXPECT_EQ(combined(Combine::AtLeast, 1), (V{1, 1, 1, 0}));
  EXPECT_EQ(combined(Combine::Finite, 1), (V{4, 0.25, 1, 0}));
  EXPECT_EQ(combined(Combine::Forced, 1), (V{2, 0, INFINITY, 3}));
}

TEST(Reference, SpreadOfFiveNumbers) {
  const RaggedData x = counting(5, 0);
  Queue queue;
  auto spread = [&](Spread how) {
    Poisoned out = x.values.twin();
    oracle().spread(queue, x, how, out);
    return read(out);
  };
  using V = std::vector<float>;
  const auto base = spread({});
  const float first = read(x.values)[0];
  EXPECT_EQ(base, V(5, first + 2)) << "the mean of consecutive numbers is the middle one";
  EXPECT_EQ(spread({.of = Spread::Of::Max, .block = 2}), (V{first + 1, first + 1, first + 3, first + 3, first + 4}));
  EXPECT_EQ(spread({.of = Spread::Of::Rank, .block = 2}), (V{0, 1, 0, 1, 0}));
  const auto deviation = spread({.of = Spread::Of::Deviation});
  EXPECT_NEAR(deviation[3], std::sqrt(2.5), 1e-6);
  const auto ahead = spread({.of = Spread::Of::Min, .block = 2, .first = 1, .ahead = 1});
  EXPECT_TRUE(std::isnan(ahead[0]) && std::isnan(ahead[3]) && std::isnan(ahead[4]));
  EXPECT_EQ(ahead[1], first + 3);
  EXPECT_EQ(ahead[2], first + 3);
}

}  // namespace

std::vector<Check> planning_checks() {
  using enum Check::Against;
  return {{Reference, "pool", pool_equals_reference},
          {Reference, "smooth", smooth_equals_reference},
          {Reference, "proxy", proxy_equals_reference},
          {Reference, "proxy_reduce", proxy_reduce_equals_proxy_and_reduce},
          {Reference, "reduce", reduce_equals_reference},
          {Reference, "select", select_equals_reference},
          {Property, "select_topk_is_largest", select_topk_is_largest},
          {Reference, "many_segments", many_segments_equal_reference},
          {Reference, "scan", scan_equals_reference},
          {Reference, "combine", combine_equals_reference},
          {Reference, "spread", spread_equals_reference}};
}

}  // namespace heed::test
