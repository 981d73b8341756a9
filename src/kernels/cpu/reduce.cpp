#include "kernels/check.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/padded_rows.h"

namespace heed::HEED_ISA {
namespace {

constexpr int64_t kColumns = 1024;  // held at once: their sums and counts take 8 KB

/// Sums (or maxima) and counts of cells that are not −∞, one for each column.
struct Held {
  float* value;
  float* count;
  ReduceKind kind;

  void clear(int64_t columns) const {
    std::fill_n(value, columns, kind == ReduceKind::Max ? -INFINITY : 0.0f);
    std::fill_n(count, columns, 0.0f);
  }

  void add(const float* cells, int64_t columns) const {
    const F masked = set(-INFINITY), one = set(1);
    const auto take = [&](F x, F held, F counted, F& value_out, F& count_out) {
      if (kind == ReduceKind::Max) {
        value_out = max(held, x);
        count_out = counted;
      } else {
        const M seen = less(masked, x);
        value_out = held + where(seen, x, zero());
        count_out = counted + where(seen, one, zero());
      }
    };
    int64_t c = 0;
    F v, n;
    for (; c + kLanes <= columns; c += kLanes) {
      take(load(cells + c), load(value + c), load(count + c), v, n);
      store(value + c, v);
      store(count + c, n);
    }
    if (c == columns) return;
    const int rest = int(columns - c);
    take(load_part(cells + c, rest), load_part(value + c, rest), load_part(count + c, rest), v, n);
    store_part(value + c, v, rest);
    store_part(count + c, n, rest);
  }

  /// One result of `columns` columns from `first`.
  float result(int64_t first, int64_t columns) const {
    float sum = kind == ReduceKind::Max ? -INFINITY : 0.0f, seen = 0;
    for (int64_t c = first; c < first + columns; ++c) {
      if (kind == ReduceKind::Max) sum = std::max(sum, value[c]);
      else sum += value[c], seen += count[c];
    }
    if (kind == ReduceKind::Max) return sum;
    if (seen == 0) return -INFINITY;
    return kind == ReduceKind::Sum ? sum : sum / seen;
  }
};

}  // namespace

void reduce(Queue& queue, const Grids& in, const Reduce& how, Grids out) {
  constexpr const char* where = "reduce";
  using To = Reduce::To;
  const int64_t segments = in.cells.segments();
  require(how.row_block >= 1 && how.col_block >= 1, where, "blocks have at least one row and column");
  require(out.cells.segments() == segments, where, "out has in's segments");
  for (const Tensor& t : {in.cells.values, out.cells.values})
    require(t.type == Dtype::F32 && t.contiguous(), where, "cells are F32 and contiguous");
  for (const Tensor& t : {in.rows, in.cols, out.rows, out.cols})
    check_tensor(where, "rows and cols", t, {segments}, false, Dtype::I64);

  // Columns are blocks as tall as the grid, rows are blocks as wide; each piece is a band of columns of one block row.
  struct Shape {
    int64_t rows, cols, row_block, col_block, rows_out, cols_out, band, bands;
  };
  std::vector<Shape> shapes;
  Pieces pieces;
  for (int64_t s = 0; s < segments; ++s) {
    Shape g{in.rows.at<int64_t>(s), in.cols.at<int64_t>(s), how.row_block, how.col_block, 0, 0, 0, 0};
    if (how.to != To::Blocks) {
      g.row_block = how.to == To::Rows ? 1 : std::max<int64_t>(1, g.rows);
      g.col_block = how.to == To::Rows ? std::max<int64_t>(1, g.cols) : 1;
    }
    g.rows_out = how.to == To::Columns || how.to == To::Diagonals ? 1 : (g.rows + g.row_block - 1) / g.row_block;
    g.cols_out = how.to == To::Rows ? 1 : (g.cols + g.col_block - 1) / g.col_block;
    require(out.rows.at<int64_t>(s) == g.rows_out && out.cols.at<int64_t>(s) == g.cols_out, where,
            "a grid of out is " + std::to_string(g.rows_out) + " by " + std::to_string(g.cols_out));
    g.band = std::max<int64_t>(1, kColumns / g.col_block) * g.col_block;
    g.bands = std::max<int64_t>(how.to == To::Rows ? 1 : 0, (g.cols + g.band - 1) / g.band);
    pieces.add(g.rows_out * g.bands);
    shapes.push_back(g);
  }
  int64_t widest = 0;
  for (const Shape& g : shapes) widest = std::max(widest, std::min(g.band, g.cols));
  for_each(queue, pieces.count(), 2 * padded(widest), [&](int64_t i, float* scratch) {
    const auto [s, piece] = pieces[i];
    const Shape& g = shapes[size_t(s)];
    const Held held{scratch, scratch + padded(widest), how.kind};
    const int64_t block_row = piece / g.bands, first = piece % g.bands * g.band, last = std::min(g.cols, first + g.band);
    const float* cells = in.cells.values.as<float>() + in.cells.begin(s);
    float* to = out.cells.values.as<float>() + out.cells.begin(s) + block_row * g.cols_out;
    held.clear(last - first);
    if (how.to == To::Diagonals) {
      // Entry o of row i is cell j = shift + i − o: ascending j fills entries from the last downward.
      for (int64_t r = 0; r < g.rows; ++r) {
        const int64_t lowest = g.cols - g.rows + r - (last - 1);  // the cell of entry last − 1
        const int64_t begin = std::max<int64_t>(0, lowest), end = std::min(g.cols, lowest + (last - first));
        if (begin >= end) continue;
        const Held from{held.value + (begin - lowest), held.count + (begin - lowest), how.kind};
        from.add(cells + r * g.cols + begin, end - begin);
      }
      for (int64_t o = first; o < last; ++o) to[o] = held.result(last - 1 - o, 1);
      return;
    }
    const int64_t end = std::min(g.rows, (block_row + 1) * g.row_block);
    for (int64_t r = block_row * g.row_block; r < end; ++r) held.add(cells + r * g.cols + first, last - first);
    if (how.to == To::Rows) {
      to[0] = held.result(0, g.cols);
      return;
    }
    for (int64_t c = first; c < last; c += g.col_block)
      to[c / g.col_block] = held.result(c - first, std::min(g.col_block, last - c));
  });
}

}  // namespace heed::HEED_ISA
