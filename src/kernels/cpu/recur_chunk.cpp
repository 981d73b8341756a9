#include "kernels/cpu/recur_chunk.h"

#include <array>

#include "kernels/check.h"

namespace heed::HEED_ISA {
namespace {

constexpr int64_t C = kChunkRows, B = kSubRows;

HEED_INLINE void scale_row(float* x, const float* by, int64_t wide) {
  for (int64_t c = 0; c < wide; c += kLanes) store(x + c, load(x + c) * load(by + c));
}
HEED_INLINE void scale_row(float* x, float by, int64_t wide) {
  const F factor = set(by);
  for (int64_t c = 0; c < wide; c += kLanes) store(x + c, load(x + c) * factor);
}

/// A product of rows with columns that is wanted: to[i][j] = Σ_c left_ic column_cj e^(G_ic − G_jc) below the diagonal.
struct Pair {
  const float* left;
  float* column;
  float* to;
  bool before;    // e^(G_(i−1) − G_j) instead: the row sees the state before its own decay
  bool diagonal;  // j = i is part of it
};

/// X_i −= Σ_(j<i) N_ij X_j, `width` wide, row by row: X becomes (I + N)^-1 X. With `square`, X is lower triangular.
void solve(const float* n, int64_t rows, float* x, int64_t width, bool square) {
  for (int64_t top = 0; top < rows; top += B) {
    const int64_t columns = square ? top + B : width;
    if (top > 0)
      product<Into::Subtract>({n + top * C, C}, x, width, B, square ? top : columns, top, x + top * width, width);
    for (int64_t i = top + 1; i < top + B; ++i)
      for (int64_t j = top; j < i; ++j) {
        const F by = set(n[i * C + j]);
        for (int64_t c = 0; c < columns; c += kLanes)
          store(x + i * width + c, load(x + i * width + c) - by * load(x + j * width + c));
      }
  }
}

/// Decays that are the same for all channels: whole products, then each cell times its decay. Columns end decayed to the
/// end of the chunk; between[i] is e^G of row i.
void pairs_with_scalar_decay(std::span<const Pair> pairs, const float* decay, int64_t rows, int64_t wide, float* steps,
                             float* between) {
  float* d = steps;  // [64, 64]: e^(G_i − G_j), 0 above the diagonal
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < i; ++j) d[i * C + j] = d[(i - 1) * C + j] * decay[i];
    std::fill(d + i * C + i, d + i * C + C, 0.0f);
    d[i * C + i] = 1;
    between[i] = i ? between[i - 1] * decay[i] : decay[0];
  }
  for (const Pair& p : pairs)
    for (int64_t top = 0; top < rows; top += B) {
      product({p.left + top * wide, wide}, p.column, C, B, top + B, wide, p.to + top * C, C);
      for (int64_t i = top; i < top + B; ++i) {
        float* to = p.to + i * C;
        const float* by = d + (p.before ? i - 1 : i) * C;
        if (p.before && i == 0) std::fill_n(to, top + B, 0.0f);
        else
          for (int64_t j = 0; j < top + B; j += kLanes) store(to + j, load(to + j) * load(by + j));
        if (!p.diagonal) to[i] = 0;
      }
    }
  const float* end = d + (rows - 1) * C;
  float* seen = nullptr;
  for (const Pair& p : pairs) {
    if (p.column == seen) continue;  // pairs with one column panel follow each other
    seen = p.column;
    for (int64_t c = 0; c < wide; ++c)
      for (int64_t j = 0; j < rows; j += kLanes) store(seen + c * C + j, load(seen + c * C + j) * load(end + j));
  }
}

/// The diagonal sub-block at `top`: columns are decayed row after row.
void diagonal_block(std::span<const Pair> pairs, float* column, const float* decay, int64_t top, int64_t wide) {
  constexpr int V = int(B / kLanes);
  std::array<const Pair*, 2> of{};
  int count = 0;
  for (const Pair& p : pairs)
    if (p.column == column) of[size_t(count++)] = &p;
  for (int64_t i = 0; i < B; ++i) {
    F sum[2][V];
    for (auto& s : sum)
      for (F& x : s) x = zero();
    M earlier[V], upto[V];
    for (int v = 0; v < V; ++v) {
      earlier[v] = first(int(std::clamp<int64_t>(i - v * kLanes, 0, kLanes)));
      upto[v] = first(int(std::clamp<int64_t>(i + 1 - v * kLanes, 0, kLanes)));
    }
    const float* e = decay + (top + i) * wide;
    const float* left[2] = {of[0]->left + (top + i) * wide, count > 1 ? of[1]->left + (top + i) * wide : nullptr};
    for (int64_t c = 0; c < wide; ++c)
      for (int v = 0; v < V; ++v) {
        float* at = column + c * C + top + v * kLanes;
        const F before = load(at), after = before * where(earlier[v], set(e[c]), set(1));
        store(at, after);
        for (int p = 0; p < count; ++p)
          sum[p][v] = fma(set(left[p][c]), of[size_t(p)]->before ? before : after, sum[p][v]);
      }
    for (int p = 0; p < count; ++p)
      for (int v = 0; v < V; ++v)
        store(of[size_t(p)]->to + (top + i) * C + top + v * kLanes,
              where(of[size_t(p)]->diagonal ? upto[v] : earlier[v], sum[p][v], zero()));
  }
}

/// Decays of their own for each channel. `decay` [64, wide]; `inside` and `outside` [16, wide] and `sofar` [wide] are scratch.
void pairs_with_vector_decay(std::span<const Pair> pairs, const float* decay, int64_t rows, int64_t wide, float* inside,
                             float* sofar) {
  for (int64_t top = 0; top < rows; top += B) {
    if (top > 0)
      for (const Pair& p : pairs) {
        // Earlier columns are decayed to the end of the sub-block before; rows decay from there.
        std::fill_n(sofar, wide, 1.0f);
        for (int64_t i = 0; i < B; ++i) {
          float* to = inside + i * wide;
          if (!p.before) scale_row(sofar, decay + (top + i) * wide, wide);
          std::copy_n(p.left + (top + i) * wide, wide, to);
          scale_row(to, sofar, wide);
          if (p.before) scale_row(sofar, decay + (top + i) * wide, wide);
        }
        product({inside, wide}, p.column, C, B, top, wide, p.to + top * C, C);
      }
    std::fill_n(sofar, wide, 1.0f);
    for (int64_t i = 0; i < B; ++i) scale_row(sofar, decay + (top + i) * wide, wide);
    float* seen = nullptr;
    for (const Pair& p : pairs) {
      if (p.column == seen) continue;
      seen = p.column;
      for (int64_t c = 0; c < wide; ++c)
        for (int64_t j = 0; j < top; j += kLanes) store(seen + c * C + j, load(seen + c * C + j) * set(sofar[c]));
      diagonal_block(pairs, seen, decay, top, wide);
    }
  }
}

}  // namespace

void check_recur(const char* where, const RecurInputs& in, const Recur& how) {
  const int64_t segments = in.q.segments(), d = width_of(in.q.values), d_v = width_of(in.v.values),
                rows = in.q.values.size[0];
  require(is_float(in.q.values.type) && is_float(in.k.values.type) && is_float(in.v.values.type), where,
          "q, k and v are F32, BF16 or F16");
  require(in.k.segments() == segments && in.v.segments() == segments, where, "q, k and v have the same segments");
  require(width_of(in.k.values) == d, where, "q and k differ in width");
  if (how.decay == Recur::Decay::Scalar) check_tensor(where, "g", in.g, {rows});
  if (how.decay == Recur::Decay::Vector) check_tensor(where, "g", in.g, {rows, d});
  if (how.correction == Recur::Correction::Delta) check_tensor(where, "beta", in.beta, {rows});
  if (how.correction == Recur::Correction::LowRank) {
    check_tensor(where, "a", in.a, {rows, d});
    check_tensor(where, "b", in.b, {rows, d});
  }
  check_tensor(where, "state", in.state, {segments, d, d_v}, true);
  check_tensor(where, "z", in.z, {segments, d}, true);
  for (int64_t s = 0; s < segments; ++s)
    require(in.k.length(s) == in.q.length(s) && in.v.length(s) == in.q.length(s), where,
            "segments of q, k and v differ in length");
}

RecurChunk::RecurChunk(const RecurShape& shape, float* memory) {
  const int64_t panel = C * shape.wide(), square = C * C;
  const auto take = [&](int64_t floats) {
    float* at = memory;
    memory += floats;
    return at;
  };
  q = take(panel);
  k = take(panel);
  qk = take(square);
  decay = take(shape.wide());
  weights = take(C);
  w = shape.corrects() ? take(panel) : nullptr;
  m = shape.corrects() ? take(square) : nullptr;
  b = shape.low_rank() ? take(panel) : nullptr;
  qb = shape.low_rank() ? take(square) : nullptr;
  n = shape.keep ? take(square) : nullptr;
  plain_m = shape.keep ? take(square) : nullptr;
  left = shape.keep ? take(panel) : nullptr;
}

void RecurChunk::make(const RecurShape& shape, const RecurSource& from, int64_t first, int64_t count, float* scratch) {
  using Decay = Recur::Decay;
  const int64_t wide = shape.wide(), panel = C * wide;
  const bool delta = shape.how.correction == Recur::Correction::Delta, low_rank = shape.low_rank();
  rows = count;
  padded_rows = (count + B - 1) / B * B;
  float* keys = scratch;            // [64, wide]
  float* lefts = keys + panel;      // a, LowRank
  float* rights = lefts + panel;    // b
  float* steps = rights + panel;    // e^g of each row and channel
  float* rest = steps + 2 * panel;  // one panel stays free for `inside`
  float* inside = steps + panel;
  float* triangle = shape.keep ? n : rest;  // [64, 64]
  float* square = rest + C * C;
  float* sofar = square + 2 * C * C;
  float* row_decay = sofar + 2 * wide;
  float* between = row_decay + C;

  for (int64_t i = 0; i < padded_rows; ++i) {
    if (i >= count) {
      for (float* x : {q + i * wide, keys + i * wide}) std::fill_n(x, wide, 0.0f);
      if (low_rank)
        for (float* x : {lefts + i * wide, rights + i * wide}) std::fill_n(x, wide, 0.0f);
      continue;
    }
    from.q.read(from.q_begin + first + i, q + i * wide, shape.scale);
    from.k.read(from.k_begin + first + i, keys + i * wide);
    if (low_rank) {
      from.a.read(from.a_begin + first + i, lefts + i * wide);
      from.b.read(from.a_begin + first + i, rights + i * wide);
    }
  }
  transpose(keys, wide, padded_rows, wide, k, C);
  if (low_rank) transpose(rights, wide, padded_rows, wide, b, C);

  Pair pairs[4];
  size_t wanted = 0;
  pairs[wanted++] = {q, k, qk, false, true};
  if (delta) pairs[wanted++] = {keys, k, triangle, false, false};
  if (low_rank) {
    pairs[wanted++] = {lefts, k, m, true, false};
    pairs[wanted++] = {q, b, qb, false, true};
    pairs[wanted++] = {lefts, b, triangle, true, false};
  }
  const std::span<const Pair> all(pairs, wanted);

  // Then rows meet the state before the chunk: they decay from its start.
  float* correcting = delta ? keys : lefts;
  if (shape.how.decay == Decay::Vector) {
    for (int64_t i = 0; i < padded_rows; ++i) {
      if (i < count) from.decay(shape.how, first + i, shape.d, steps + i * wide);
      else std::fill_n(steps + i * wide, wide, 1.0f);
    }
    pairs_with_vector_decay(all, steps, padded_rows, wide, inside, sofar);
    std::fill_n(decay, wide, 1.0f);
    for (int64_t i = 0; i < padded_rows; ++i) {
      if (low_rank) scale_row(correcting + i * wide, decay, wide);
      scale_row(decay, steps + i * wide, wide);
      scale_row(q + i * wide, decay, wide);
      if (delta) scale_row(correcting + i * wide, decay, wide);
    }
  } else {
    for (int64_t i = 0; i < padded_rows; ++i)
      row_decay[i] = i < count && shape.how.decay == Decay::Scalar ? std::exp(from.g_row[first + i]) : 1.0f;
    pairs_with_scalar_decay(all, row_decay, padded_rows, wide, square, between);
    for (int64_t i = 0; i < padded_rows; ++i) {
      scale_row(q + i * wide, between[i], wide);
      if (delta) scale_row(correcting + i * wide, between[i], wide);
      if (low_rank && i > 0) scale_row(correcting + i * wide, between[i - 1], wide);
    }
    std::fill_n(decay, wide, between[padded_rows - 1]);
  }

  for (int64_t i = 0; i < padded_rows; ++i) {
    const int64_t columns = (i / B + 1) * B;
    std::fill(qk + i * C + columns, qk + (i + 1) * C, 0.0f);
    if (low_rank) std::fill(qb + i * C + columns, qb + (i + 1) * C, 0.0f);
    float sum = 0;
    for (int64_t j = 0; j <= i; ++j) sum += qk[i * C + j];
    weights[i] = sum;
  }
  if (!shape.corrects()) return;
  for (int64_t i = 0; i < padded_rows; ++i) {
    const int64_t columns = (i / B + 1) * B;
    std::copy_n(correcting + i * wide, wide, w + i * wide);
    std::fill(m + i * C + columns, m + (i + 1) * C, 0.0f);  // later rows' sums pass over it
    if (delta) {
      const float beta = i < count ? from.beta[first + i] : 0.0f;
      scale_row(w + i * wide, beta, wide);
      std::fill_n(m + i * C, columns, 0.0f);
      m[i * C + i] = beta;
      scale_row(triangle + i * C, beta, columns);
    } else {
      scale_row(triangle + i * C, -1.0f, columns);
    }
  }
  if (shape.keep) {
    std::copy_n(m, padded_rows * C, plain_m);
    std::copy_n(w, padded_rows * wide, left);
  }
  solve(triangle, padded_rows, w, wide, false);
  solve(triangle, padded_rows, m, C, true);
}

}  // namespace heed::HEED_ISA
