// A tile of logits in f32: 32 query rows by 32 keys, by a block of 256 threads. Slices of 64 channels pass through shared
// memory, so any head dim fits. It serves every type, and those kernels whose time is elsewhere.
#pragma once
#include "kernels/cuda/attention.cuh"

namespace heed::cuda {

constexpr int kRows = 32, kKeys = 32, kSlice = 64, kTileThreads = 256;

struct TileMemory {
  float a[kRows][kSlice + 1], b[kKeys][kSlice + 1];
  float scores[kRows][kKeys + 1];
};

/// One slice of rows: to[r][c] = get(r, at + c), 0 past the width.
template <class Get>
__device__ inline void load_slice(float (*to)[kSlice + 1], int rows, int width, int at, Get get) {
  for (int e = threadIdx.x; e < rows * kSlice; e += kTileThreads) {
    const int r = e / kSlice, c = e % kSlice;
    to[r][c] = at + c < width ? get(r, at + c) : 0.0f;
  }
}

/// Numbers of the rows that row(r) names, 0 where it names −1.
template <class Row>
__device__ inline auto numbers_of(const Matrix& from, Row row) {
  return [&from, row](int r, int c) {
    const int64_t from_row = row(r);
    return from_row >= 0 ? from.get(from_row, c) : 0.0f;
  };
}

/// memory.scores[i][j] = Σ_c a(i, c) b(j, c).
template <class A, class B>
__device__ inline void tile_dots(TileMemory& memory, int width, A a, B b) {
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  float sum[2][2] = {};
  for (int at = 0; at < width; at += kSlice) {
    __syncthreads();
    load_slice(memory.a, kRows, width, at, a);
    load_slice(memory.b, kKeys, width, at, b);
    __syncthreads();
#pragma unroll 8
    for (int c = 0; c < kSlice; ++c) {
      const float a0 = memory.a[ty][c], a1 = memory.a[ty + 16][c], b0 = memory.b[tx][c], b1 = memory.b[tx + 16][c];
      sum[0][0] += a0 * b0;
      sum[0][1] += a0 * b1;
      sum[1][0] += a1 * b0;
      sum[1][1] += a1 * b1;
    }
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) memory.scores[ty + 16 * i][tx + 16 * j] = sum[i][j];
  __syncthreads();
}

/// The keys that some row of the block can see by causality: [from, limit). Every thread passes the row of thread / 8.
__device__ inline void key_range(const AttentionView& a, const QueryRow& at, int& from, int& limit) {
  __shared__ int low, high;
  __syncthreads();
  if (threadIdx.x == 0) {
    low = 1 << 30;
    high = 0;
  }
  __syncthreads();
  if (at.live && threadIdx.x % 8 == 0) {
    const int end = a.plan.causal ? min(at.m, at.m - at.n + at.i + 1) : at.m;
    atomicMax(&high, end);
    int begin = 0;
    if (a.mods.window > 0 && !a.mods.k_pos) begin = int(max(int64_t(0), min(int64_t(at.m), at.q_pos - a.mods.window + 1)));
    atomicMin(&low, begin);
  }
  __syncthreads();
  from = min(low, high);
  limit = high;
}

}  // namespace heed::cuda
