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

/// One slice of 32 rows: eight numbers a thread. get(r, at + c, x) sets x to row r's, zeros past its width.
template <class Get>
__device__ inline void load_slice(float (*to)[kSlice + 1], int width, int at, Get get) {
  const int r = threadIdx.x / 8, c = threadIdx.x % 8 * 8;
  float x[8] = {};
  if (at + c < width) get(r, at + c, x);
#pragma unroll
  for (int i = 0; i < 8; ++i) to[r][c + i] = x[i];
}

/// Numbers of the rows that row(r) names, 0 where it names −1.
template <class Row>
__device__ inline auto numbers_of(const Matrix& from, Row row) {
  return [&from, row](int r, int c, float(&x)[8]) {
    const int64_t from_row = row(r);
    if (from_row >= 0) load8(from.data, from.type, from_row * from.stride + c, from.width - c, x);
  };
}

/// memory.scores[i][j] = Σ_c a_i[c] b_j[c]; a and b as load_slice's get.
template <class A, class B>
__device__ inline void tile_dots(TileMemory& memory, int width, A a, B b) {
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  float sum[2][2] = {};
  for (int at = 0; at < width; at += kSlice) {
    __syncthreads();
    load_slice(memory.a, width, at, a);
    load_slice(memory.b, width, at, b);
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
    if (a.mods.window > 0 && !a.mods.k_pos)
      begin = int(max(int64_t(0), min(int64_t(at.m), at.q_pos - a.mods.window + 1)));
    atomicMin(&low, begin);
  }
  __syncthreads();
  from = min(low, high);
  limit = high;
}

}  // namespace heed::cuda
