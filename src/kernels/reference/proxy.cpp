#include <algorithm>

#include "kernels/check.h"
#include "kernels/reference/reference.h"

namespace heed::reference {
namespace {

/// A row as proxy multiplies it: as it is, or rounded to 8 bits with one scale.
std::vector<double> operand(const Tensor& t, int64_t r, bool int8) {
  std::vector<double> x = row(t, r);
  if (!int8) return x;
  float top = 0;
  for (double value : x) top = std::max(top, std::abs(float(value)));
  const float scale = top / 127;
  for (double& value : x) value = scale > 0 ? std::nearbyint(double(float(value) / scale)) * double(scale) : 0;
  return x;
}

}  // namespace

void proxy(Queue&, const Ragged& q, const Ragged& k, const Proxy& how, Grids out) {
  constexpr const char* where = "proxy";
  const int64_t h = q.heads, g = k.heads, w = width(q.values);
  require(is_float(q.values.type) && is_float(k.values.type) && width(k.values) == w, where,
          "q and k are F32, BF16 or F16 of one width");
  require(h % g == 0 && q.sequences() == k.sequences() && out.cells.segments() == q.segments(), where,
          "q's heads are a multiple of k's, and out has q's segments");
  check_tensor(where, "rows", out.rows, {q.segments()}, false, Dtype::I64);
  check_tensor(where, "cols", out.cols, {q.segments()}, false, Dtype::I64);
  const double scale = how.scale != 0 ? double(how.scale) : 1 / std::sqrt(double(w)), cap = double(how.softcap);
  for (int64_t s = 0; s < q.segments(); ++s) {
    const int64_t kv = s / h * g + s % h * g / h, rows = q.length(s), cols = k.length(kv);
    require(out.rows.at<int64_t>(s) == rows && out.cols.at<int64_t>(s) == cols, where,
            "a grid has a row for each of q's and a column for each of k's");
    for (int64_t i = 0; i < rows; ++i) {
      const std::vector<double> a = operand(q.values, q.begin(s) + i, how.int8);
      std::vector<double> cells(size_t(cols), -infinity);
      for (int64_t j = 0; j < cols; ++j) {
        if (how.causal && j * how.k_tile > how.offset + (i + 1) * how.q_tile - 1) continue;
        const std::vector<double> b = operand(k.values, k.begin(kv) + j, how.int8);
        double dot = 0;
        for (int64_t c = 0; c < w; ++c) dot += a[size_t(c)] * b[size_t(c)];
        cells[size_t(j)] = cap > 0 ? cap * std::tanh(scale * dot / cap) : scale * dot;
      }
      if (how.softmax) {
        const double lse = log_sum_exp(cells);
        for (double& x : cells) x = x == -infinity ? 0 : std::exp(x - lse);
      }
      for (int64_t j = 0; j < cols; ++j)
        store(out.cells.values, offset(out.cells.values, out.cells.begin(s) + i * cols + j), cells[size_t(j)]);
    }
  }
}

void reduce(Queue&, const Grids& in, const Reduce& how, Grids out) {
  constexpr const char* where = "reduce";
  using To = Reduce::To;
  require(how.row_block >= 1 && how.col_block >= 1, where, "blocks have at least one row and column");
  require(out.cells.segments() == in.cells.segments(), where, "out has in's segments");
  for (int64_t s = 0; s < in.cells.segments(); ++s) {
    const int64_t rows = in.rows.at<int64_t>(s), cols = in.cols.at<int64_t>(s);
    int64_t rows_out = 1, cols_out = cols;
    if (how.to == To::Blocks) {
      rows_out = (rows + how.row_block - 1) / how.row_block;
      cols_out = (cols + how.col_block - 1) / how.col_block;
    }
    if (how.to == To::Rows) {
      rows_out = rows;
      cols_out = 1;
    }
    require(out.rows.at<int64_t>(s) == rows_out && out.cols.at<int64_t>(s) == cols_out, where,
            "a grid of out is " + std::to_string(rows_out) + " by " + std::to_string(cols_out));
    const size_t size = size_t(rows_out * cols_out);
    std::vector<double> sum(size, 0.0), top(size, -infinity), count(size, 0.0);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) {
        const double x = number(in.cells.values, in.cells.begin(s) + i * cols + j);
        int64_t to = j;
        if (how.to == To::Blocks) to = i / how.row_block * cols_out + j / how.col_block;
        if (how.to == To::Rows) to = i;
        if (how.to == To::Diagonals) to = cols - rows + i - j;
        if (x == -infinity || to < 0 || to >= int64_t(size)) continue;
        sum[size_t(to)] += x;
        top[size_t(to)] = std::max(top[size_t(to)], x);
        count[size_t(to)] += 1;
      }
    for (size_t e = 0; e < size; ++e) {
      double result = top[e];
      if (count[e] > 0 && how.kind != ReduceKind::Max)
        result = how.kind == ReduceKind::Sum ? sum[e] : sum[e] / count[e];
      store(out.cells.values, offset(out.cells.values, out.cells.begin(s) + int64_t(e)), result);
    }
  }
}

}  // namespace heed::reference
