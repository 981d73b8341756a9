// smooth, reduce and select over segments long enough to be cut into pieces, scores of every kind of trouble, and refusals.
#include "kernels/harness.h"
#include "kernels/on_device.h"

namespace heed::test {
namespace {

class CheapScores : public testing::TestWithParam<const Kernels*> {
 protected:
  const Kernels& run = *GetParam();
  const Kernels& oracle = reference_kernels();
  Queue queue;
};
INSTANTIATE_TEST_SUITE_P(Tables, CheapScores, testing::ValuesIn(tables()), [](const auto& table) {
  std::string name = table.param->name;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

std::vector<int64_t> lengths(Random& random, int64_t segments, int64_t most) {
  std::vector<int64_t> out;
  for (int64_t s = 0; s < segments; ++s)
    out.push_back(chance(random, 0.15) ? 0 : chance(random, 0.1) ? 1 : random.below(most + 1));
  return out;
}

/// A copy of `data` that a second kernel may write to.
RaggedData twin(const RaggedData& data) {
  RaggedData out;
  out.values = data.values.twin();
  out.offsets = Buffer(Dtype::I64, {data.offsets->size[0]});
  copy(data.offsets, out.offsets);
  if (data.ends) {
    out.ends = Buffer(Dtype::I64, {data.ends->size[0]});
    copy(data.ends, out.ends);
  }
  out.view = {out.values, out.offsets, out.ends, data.view.heads, data.view.bound};
  return out;
}

struct GridData {
  RaggedData cells;
  Buffer rows, cols;
  Grids view;
};

GridData grids(Random& random, const std::vector<int64_t>& rows, const std::vector<int64_t>& cols, int64_t heads) {
  GridData out;
  std::vector<int64_t> sizes;
  for (size_t s = 0; s < rows.size(); ++s) sizes.push_back(rows[s] * cols[s]);
  out.cells = ragged(random, Dtype::F32, sizes, heads, 0, Layout::any(random));
  out.rows = Buffer::of<int64_t>({int64_t(rows.size())}, rows);
  out.cols = Buffer::of<int64_t>({int64_t(cols.size())}, cols);
  out.view = {out.cells.view, out.rows, out.cols};
  return out;
}

TEST_P(CheapScores, LongSmoothEqualsReference) {
  Random random(12);
  for (int i = 0; i < cases(20); ++i) {
    const PoolKind kind = chance(random, 0.5) ? PoolKind::Mean : PoolKind::Max;
    const int width = int(pick<int64_t>(random, {1, 3, 5, 7, 21, 63}));
    const RaggedData x = normal_ragged(random, Dtype::F32,
                                       lengths(random, 1 + random.below(4), chance(random, 0.7) ? 6000 : 90), 1, 0,
                                       Layout::any(random));
    const Poisoned out(Dtype::F32, {x.view.values.size[0]}), got = out.twin();
    oracle.smooth(queue, x, kind, width, out);
    run.smooth(queue, x, kind, width, got);
    expect_close("out", out, got, kind == PoolKind::Mean ? 0x1p-20 : 0);
  }
}

TEST_P(CheapScores, WideReduceEqualsReference) {
  Random random(14);
  for (int i = 0; i < cases(40); ++i) {
    Reduce how;
    how.to = Reduce::To(random.below(4));
    how.kind = ReduceKind(random.below(3));
    how.row_block = int(pick<int64_t>(random, {1, 3, 16}));
    how.col_block = int(pick<int64_t>(random, {1, 5, 16, 2000}));
    const int64_t segments = 1 + random.below(4);
    std::vector<int64_t> rows, cols, rows_out, cols_out;
    for (int64_t s = 0; s < segments; ++s) {
      rows.push_back(chance(random, 0.1) ? 0 : random.below(60));
      cols.push_back(chance(random, 0.1) ? 0 : random.below(chance(random, 0.7) ? 3000 : 90));
      const bool blocks = how.to == Reduce::To::Blocks;
      rows_out.push_back(blocks                       ? (rows.back() + how.row_block - 1) / how.row_block
                         : how.to == Reduce::To::Rows ? rows.back()
                                                      : 1);
      cols_out.push_back(blocks                       ? (cols.back() + how.col_block - 1) / how.col_block
                         : how.to == Reduce::To::Rows ? 1
                                                      : cols.back());
    }
    GridData in = grids(random, rows, cols, 1), out = grids(random, rows_out, cols_out, 1);
    const double masked = random.uniform();
    for (int64_t s = 0; s < segments; ++s)
      for (int64_t c = in.cells.view.begin(s); c < in.cells.view.end(s); ++c)
        in.cells.values->at<float>(c) = chance(random, masked) ? -INFINITY : float(random.normal());
    const RaggedData got = twin(out.cells);
    oracle.reduce(queue, in.view, how, out.view);
    run.reduce(queue, in.view, how, {got, out.rows, out.cols});
    SCOPED_TRACE("case " + std::to_string(i) + " to " + std::to_string(int(how.to)) + " kind " +
                 std::to_string(int(how.kind)));
    expect_close("cells", out.cells.values, got.values,
                 how.kind == ReduceKind::Max ? 0 : 0x1p-18 * std::max(1.0, largest(out.cells.values)));
  }
}

/// Scores of every kind of trouble: ties, zeros of both signs, infinities, NaN, denormals.
float score(Random& random, int kind) {
  if (kind > 0 && chance(random, 0.1)) return pick(random, {INFINITY, -INFINITY, NAN, 0.0f, -0.0f, 1e-40f, 3e38f});
  if (kind == 2) return float(random.below(4));
  return float(random.normal());
}

TEST_P(CheapScores, SelectOfTroubleEqualsReference) {
  Random random(15);
  for (int i = 0; i < cases(300); ++i) {
    Select how;
    how.by = Select::By(random.below(3));
    const std::vector<int64_t> size = lengths(random, 1 + random.below(4), chance(random, 0.1) ? 9000 : 70);
    RaggedData scores = ragged(random, Dtype::F32, size, 1, 0, Layout::any(random));
    const int64_t segments = int64_t(size.size()), capacity = random.below(100);
    const int kind = int(random.below(3));
    for (int64_t s = 0; s < segments; ++s)
      for (int64_t r = scores.view.begin(s); r < scores.view.end(s); ++r) {
        float x = score(random, kind);
        // Shares are of scores ≥ 0; multiples of 1/64 add without rounding in any order.
        if (how.by == Select::By::TopP) x = std::isfinite(x) ? std::floor(std::min(std::abs(x), 4.0f) * 64) / 64 : x;
        scores.values->at<float>(r) = x;
      }
    how.k = random.below(80) - 2;
    how.p = how.by == Select::By::TopP ? pick(random, {0.0f, 0.25f, 0.5f, 0.9f, 1.0f})
                                       : pick(random, {-INFINITY, -0.5f, 0.0f, 1.0f, INFINITY, NAN});
    how.crossing = chance(random, 0.5);
    how.at_least = chance(random, 0.4) ? random.below(20) : 0;
    const Poisoned each_k = filled(Dtype::I32, {segments}, [&] { return double(random.below(60) - 1); });
    if (chance(random, 0.4)) how.count = each_k;
    const Poisoned held = filled(Dtype::F32, {segments}, [&] { return double(random.below(400)) / 64; });
    if (chance(random, 0.3)) how.held = held;
    const Poisoned index(Dtype::I32, {segments * capacity}), count(Dtype::I32, {segments}), got_index = index.twin(),
                                                                                            got_count = count.twin();
    oracle.select(queue, scores, how, capacity, index, count);
    run.select(queue, scores, how, capacity, got_index, got_count);
    SCOPED_TRACE("case " + std::to_string(i) + " by " + std::to_string(int(how.by)) + " p " + std::to_string(how.p));
    expect_close("count", count, got_count, 0);
    expect_close("index", index, got_index, 0);
  }
}

/// TopP on scores whose sums round: what is chosen is a prefix of the order by score, and its share is p within rounding.
TEST_P(CheapScores, SelectedShareIsP) {
  Random random(16);
  for (int i = 0; i < cases(40); ++i) {
    const int64_t n = 1 + random.below(3000);
    std::vector<float> x(static_cast<size_t>(n));
    double total = 0;
    for (float& value : x) {
      value = float(std::exp(6 * random.normal()));
      total += double(value);
    }
    const Buffer offsets = Buffer::of<int64_t>({2}, std::vector<int64_t>{0, n});
    const Ragged scores{Tensor(x.data(), Dtype::F32, {n}), offsets, {}, 1, n};
    Select how;
    how.by = Select::By::TopP;
    how.p = float(random.uniform());
    const Poisoned index(Dtype::I32, {n}), count(Dtype::I32, {1});
    run.select(queue, scores, how, n, index, count);
    double chosen = 0, least = INFINITY, most_left = -1;
    std::vector<bool> in(x.size(), false);
    for (int64_t c = 0; c < count->at<int32_t>(0); ++c) in[size_t(index->at<int32_t>(c))] = true;
    for (size_t j = 0; j < x.size(); ++j) {
      if (in[j]) chosen += double(x[j]), least = std::min(least, double(x[j]));
      else most_left = std::max(most_left, double(x[j]));
    }
    EXPECT_LE(most_left, least);
    EXPECT_GE(chosen, double(how.p) * total * (1 - 1e-12));
    EXPECT_LT(chosen - least, double(how.p) * total * (1 + 1e-12));
  }
}

TEST_P(CheapScores, WhatDoesNotFitIsRefused) {
  Random random(18);
  const RaggedData x = normal_ragged(random, Dtype::F32, {10}, 1, 4, {});
  RaggedData out = ragged(random, Dtype::F32, {3}, 1, 5, {});
  EXPECT_THROW(run.pool(queue, x, PoolKind::Mean, 4, out), Error);
  EXPECT_THROW(run.pool(queue, x, PoolKind::Mean, 0, out), Error);
  const RaggedData list = normal_ragged(random, Dtype::F32, {10}, 1, 0, {});
  const Poisoned smoothed(Dtype::F32, {10});
  EXPECT_THROW(run.smooth(queue, list, PoolKind::Mean, 4, smoothed), Error);
  EXPECT_THROW(run.smooth(queue, list, PoolKind::Min, 3, smoothed), Error);
  const Poisoned index(Dtype::I32, {3}), count(Dtype::I32, {1});
  EXPECT_THROW(run.select(queue, list, {}, 4, index, count), Error);
  EXPECT_THROW(run.scan(queue, x, {}, ScanKind::Linear, x.values.twin()), Error);
}

}  // namespace
}  // namespace heed::test
