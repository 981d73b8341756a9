// Products of small f32 matrices in scratch: what chunked recurrences, backward tiles and proxy scores are made of.
#pragma once
#include "kernels/cpu/simd.h"

namespace heed::HEED_ISA {

/// A matrix whose element (i, k) lies at data[i · row + k · column]: a transposed view costs nothing.
struct Left {
  const float* data;
  int64_t row, column = 1;
};

enum class Into { Set, Add, Subtract };

// As many sums as leave room for a row of B: 24 of 32 registers, 12 of 16.
#if defined(__AVX2__) && !defined(__AVX512F__)
inline constexpr int kSumVectors = 2;
#else
inline constexpr int kSumVectors = 4;
#endif
inline constexpr int kSumRows = 6;

template <int R, int V, Into into>
HEED_INLINE void product_tile(Left a, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc) {
  F sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = zero();
  for (int64_t k = 0; k < depth; ++k) {
    F row[V];
    for (int v = 0; v < V; ++v) row[v] = load(b + k * ldb + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const F x = set(a.data[r * a.row + k * a.column]);
      for (int v = 0; v < V; ++v) sum[r][v] = fma(x, row[v], sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      float* at = c + r * ldc + v * kLanes;
      if constexpr (into == Into::Set) store(at, sum[r][v]);
      else if constexpr (into == Into::Add) store(at, load(at) + sum[r][v]);
      else store(at, load(at) - sum[r][v]);
    }
}

template <int V, Into into>
void product_rows(Left a, const float* b, int64_t ldb, int64_t m, int64_t depth, float* c, int64_t ldc) {
  int64_t i = 0;
  for (; i + kSumRows <= m; i += kSumRows)
    product_tile<kSumRows, V, into>({a.data + i * a.row, a.row, a.column}, b, ldb, depth, c + i * ldc, ldc);
  const Left rest{a.data + i * a.row, a.row, a.column};
  float* last = c + i * ldc;
  switch (m - i) {
    case 1: return product_tile<1, V, into>(rest, b, ldb, depth, last, ldc);
    case 2: return product_tile<2, V, into>(rest, b, ldb, depth, last, ldc);
    case 3: return product_tile<3, V, into>(rest, b, ldb, depth, last, ldc);
    case 4: return product_tile<4, V, into>(rest, b, ldb, depth, last, ldc);
    case 5: return product_tile<5, V, into>(rest, b, ldb, depth, last, ldc);
    default: return;
  }
}

/// C [m, n] = (or += or −=) A [m, depth] · B [depth, n]; n must be a multiple of kLanes. An element of C is one sum in
/// the order of k whatever m and n are, so splitting C among threads changes no bit.
template <Into into = Into::Set>
void product(Left a, const float* b, int64_t ldb, int64_t m, int64_t n, int64_t depth, float* c, int64_t ldc) {
  int64_t j = 0;
  for (; j + kSumVectors * kLanes <= n; j += kSumVectors * kLanes)
    product_rows<kSumVectors, into>(a, b + j, ldb, m, depth, c + j, ldc);
  if constexpr (kSumVectors == 4) {
    if (j + 2 * kLanes <= n) product_rows<2, into>(a, b + j, ldb, m, depth, c + j, ldc), j += 2 * kLanes;
  }
  if (j + kLanes <= n) product_rows<1, into>(a, b + j, ldb, m, depth, c + j, ldc);
}

/// to [columns, ldt] = from [rows, ldf]^T.
inline void transpose(const float* from, int64_t ldf, int64_t rows, int64_t columns, float* to, int64_t ldt) {
  constexpr int64_t block = 8;
  const int64_t whole = rows / block * block;
  for (int64_t i = 0; i < whole; i += block)
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t k = 0; k < block; ++k) to[j * ldt + i + k] = from[(i + k) * ldf + j];
  for (int64_t i = whole; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) to[j * ldt + i] = from[i * ldf + j];
}

}  // namespace heed::HEED_ISA
