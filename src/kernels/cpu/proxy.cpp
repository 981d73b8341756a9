#include "kernels/check.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/padded_rows.h"
#include "kernels/cpu/product.h"

namespace heed::HEED_ISA {
namespace {

constexpr int64_t kCols = 64, kTileRows = 48;  // of a tile: keys [width][64] and queries [48][width] stay in L2

/// A row as whole numbers from −127 to 127; returns what they are to be multiplied by.
float round_to_8_bits(float* x, int64_t width) {
  F top = zero();
  for (int64_t c = 0; c < width; c += kLanes) top = max(top, abs(load(x + c)));
  const float scale = hmax(top) / 127;
  const F by = set(scale);
  for (int64_t c = 0; c < width; c += kLanes) store(x + c, scale > 0 ? round(load(x + c) / by) : zero());
  return scale;
}

/// How many columns row i sees.
int64_t visible(const Proxy& how, int64_t i, int64_t cols) {
  if (!how.causal) return cols;
  const int64_t last_key = how.offset + (i + 1) * how.q_tile - 1;
  return last_key < 0 ? 0 : std::min(cols, last_key / how.k_tile + 1);
}

void softmax(float* x, int64_t seen, int64_t cols) {
  if (seen > 0) {
    F top = set(-INFINITY);
    int64_t c = 0;
    for (; c + kLanes <= seen; c += kLanes) top = max(top, load(x + c));
    float most = hmax(top);
    for (int64_t j = c; j < seen; ++j) most = std::max(most, x[j]);
    const F shift = set(most);
    F sum = zero();
    for (c = 0; c + kLanes <= seen; c += kLanes) {
      const F p = exp(load(x + c) - shift);
      sum = sum + p;
      store(x + c, p);
    }
    float total = hsum(sum);
    if (c < seen) {
      const int rest = int(seen - c);
      store_part(x + c, exp(load_part(x + c, rest) - shift), rest);
      for (int64_t j = c; j < seen; ++j) total += x[j];
    }
    const F by = set(total);
    for (c = 0; c + kLanes <= seen; c += kLanes) store(x + c, load(x + c) / by);
    for (; c < seen; ++c) x[c] /= total;
  }
  std::fill(x + seen, x + cols, 0.0f);
}

}  // namespace

void proxy(Queue& queue, const Ragged& q, const Ragged& k, const Proxy& how, Grids out) {
  constexpr const char* where = "proxy";
  const int64_t h = q.heads, g = k.heads, w = width_of(q.values);
  require(is_float(q.values.type) && is_float(k.values.type) && width_of(k.values) == w, where,
          "q and k are F32, BF16 or F16 of one width");
  require(h % g == 0 && q.sequences() == k.sequences() && out.cells.segments() == q.segments(), where,
          "q's heads are a multiple of k's, and out has q's segments");
  require(how.q_tile >= 1 && how.k_tile >= 1, where, "tiles have at least one row");
  check_tensor(where, "rows", out.rows, {q.segments()}, false, Dtype::I64);
  check_tensor(where, "cols", out.cols, {q.segments()}, false, Dtype::I64);
  require(out.cells.values.type == Dtype::F32 && out.cells.values.contiguous(), where, "cells are F32 and contiguous");
  const float scale = how.scale != 0 ? how.scale : 1 / std::sqrt(float(w));
  const int64_t group = h / g, wide = padded(w);
  const auto q_segment = [&](int64_t kv, int64_t member) { return kv / g * h + kv % g * group + member; };

  Pieces tiles, rows;
  for (int64_t kv = 0; kv < k.segments(); ++kv) {
    tiles.add((k.length(kv) + kCols - 1) / kCols);
    for (int64_t member = 0; member < group; ++member) {
      const int64_t s = q_segment(kv, member);
      require(out.rows.at<int64_t>(s) == q.length(s) && out.cols.at<int64_t>(s) == k.length(kv), where,
              "a grid has a row for each of q's and a column for each of k's");
    }
  }
  const Rows q_rows(q.values), k_rows(k.values);
  const int64_t floats = wide * (2 * kCols + kTileRows) + kTileRows * kCols + kCols + kTileRows;
  for_each(queue, tiles.count(), floats, [&](int64_t piece, float* scratch) {
    const auto [kv, tile] = tiles[piece];
    float* keys = scratch;                      // [width][64]
    float* queries = keys + wide * kCols;       // [48][width]
    float* loose = queries + wide * kTileRows;  // [64][width]
    float* cells = loose + wide * kCols;        // [48][64]
    float* k_scale = cells + kTileRows * kCols;
    float* q_scale = k_scale + kCols;
    const int64_t first = tile * kCols, count = std::min(kCols, k.length(kv) - first);
    for (int64_t j = 0; j < kCols; ++j) {
      float* row = loose + j * wide;
      k_scale[j] = scale;
      if (j >= count) std::fill_n(row, wide, 0.0f);
      else k_rows.read(k.begin(kv) + first + j, row);
      if (how.int8) k_scale[j] *= round_to_8_bits(row, wide);
    }
    transpose(loose, wide, kCols, w, keys, kCols);
    for (int64_t member = 0; member < group; ++member) {
      const int64_t s = q_segment(kv, member), n = q.length(s), cols = k.length(kv);
      float* to = out.cells.values.as<float>() + out.cells.begin(s) + first;
      for (int64_t top = 0; top < n; top += kTileRows) {
        const int64_t height = std::min(kTileRows, n - top);
        const bool dark = visible(how, top + height - 1, cols) <= first;
        for (int64_t i = 0; i < height && !dark; ++i) {
          q_rows.read(q.begin(s) + top + i, queries + i * wide);
          q_scale[i] = how.int8 ? round_to_8_bits(queries + i * wide, wide) : 1;
        }
        if (!dark) product({queries, wide}, keys, kCols, height, kCols, w, cells, kCols);
        for (int64_t i = 0; i < height; ++i) {
          const int64_t seen = std::clamp<int64_t>(visible(how, top + i, cols) - first, 0, count);
          float* x = cells + i * kCols;
          float* row = to + (top + i) * cols;
          const F by = set(q_scale[i]);
          for (int64_t c = 0; c < seen; c += kLanes) {
            F logit = load(x + c) * (load(k_scale + c) * by);
            if (how.softcap > 0) logit = set(how.softcap) * tanh(logit / set(how.softcap));
            store(x + c, logit);
          }
          std::copy_n(x, seen, row);
          if (!how.softmax) std::fill(row + seen, row + count, -INFINITY);
        }
      }
    }
  });
  if (!how.softmax) return;
  for (int64_t s = 0; s < q.segments(); ++s) rows.add(q.length(s));
  for_each(queue, rows.count(), 0, [&](int64_t piece, float*) {
    const auto [s, i] = rows[piece];
    const int64_t cols = out.cols.at<int64_t>(s);
    softmax(out.cells.values.as<float>() + out.cells.begin(s) + i * cols, visible(how, i, cols), cols);
  });
}

}  // namespace heed::HEED_ISA
