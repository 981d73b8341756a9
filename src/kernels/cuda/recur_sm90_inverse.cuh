// The delta rule's inverses of I + N for recur_sm90_direct.cuh, a block a chunk: many blocks hide the latencies of the short
// steps, 5,000 clocks a chunk beside a walk.
#pragma once
#include "kernels/cuda/recur_sm90_direct.cuh"

namespace heed::cuda {
namespace {

/// β; where it is zero a number that changes nothing, so that what was multiplied by it can be had back (the gradient's use).
__device__ __forceinline__ float some_beta(float beta) { return beta == 0 ? 1e-20f : beta; }

/// A and B fragments of bf16 panels: 16 × 16 numbers from (row, column) on.
__device__ __forceinline__ void take_a(uint32_t (&x)[4], uint32_t panel, int row, int column) {
  const int lane = threadIdx.x % 32;
  load_tiles(x, panel + swizzled(row + lane % 16, column / 8 + lane / 16));
}
__device__ __forceinline__ void take_b(uint32_t (&x)[4], uint32_t panel, int row, int column) {
  const int lane = threadIdx.x % 32;
  load_transposed(x, panel + swizzled(row + lane % 16, column / 8 + lane / 16));
}
__device__ __forceinline__ void times(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&a_low)[4], uint32_t b0,
                                      uint32_t b1, uint32_t low0, uint32_t low1) {
  multiply(sum, a[0], a[1], a[2], a[3], b0, b1);
  multiply(sum, a_low[0], a_low[1], a_low[2], a_low[3], b0, b1);
  multiply(sum, a[0], a[1], a[2], a[3], low0, low1);
}
/// Sums of 16 rows by 16 columns as an A operand.
__device__ __forceinline__ void as_a(const float (&x)[4], const float (&y)[4], uint32_t (&high)[4], uint32_t (&low)[4]) {
  split_bf16(x[0], x[1], high[0], low[0]), split_bf16(x[2], x[3], high[1], low[1]);
  split_bf16(y[0], y[1], high[2], low[2]), split_bf16(y[2], y[3], high[3], low[3]);
}

/// Inverse of I + N, N in panels `n` below the diagonal blocks of 16, this warp's block (transposed) in `diagonal`: X in
/// panels `x`, high and low, zero above the diagonal. X_BA = −X_BB N_BA X_AA for blocks of 16, then of 32. Called by
/// four warps.
__device__ __forceinline__ void invert_blocks(uint8_t* x, const uint8_t* n, const float* diagonal, int warp) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
  {
    const int c = lane % 16;
    float column[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) column[i] = float(i == c);
#pragma unroll
    for (int j = 0; j < 15; ++j)
#pragma unroll
      for (int i = j / 4 * 4; i < 16; i += 4) {
        if (i + 3 <= j) continue;
        const float4 by = *reinterpret_cast<const float4*>(diagonal + j * 16 + i);
        const float factors[4] = {by.x, by.y, by.z, by.w};
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (i + e > j) column[i + e] -= factors[e] * column[j];
      }
    uint8_t* to = x + (lane < 16 ? 0 : kPanel) + c % 8 * 2;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const __nv_bfloat16 high = __float2bfloat16_rn(column[i]);
      *reinterpret_cast<__nv_bfloat16*>(
          to + swizzled(16 * warp + i, 2 * warp + c / 8)) = lane < 16
                                                                ? high
                                                                : __float2bfloat16_rn(column[i] - __bfloat162float(high));
    }
  }
  named_sync(1, 128);
  const uint32_t xs = shared_address(x), ns = shared_address(n);
  const int row = lane / 4, c0 = lane % 4 * 2;
  auto put = [&](const float(&sum)[4], int top, int left) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t high, low;
      split_bf16(-sum[2 * r], -sum[2 * r + 1], high, low);
      uint8_t* to = x + swizzled(top + row + 8 * r, left / 8) + c0 * 2;
      *reinterpret_cast<uint32_t*>(to) = high, *reinterpret_cast<uint32_t*>(to + kPanel) = low;
    }
  };
  {
    const int left = warp / 2 * 32, top = left + 16, half = warp % 2;
    uint32_t a[4], a_low[4], b[4], b_low[4];
    take_a(a, xs, top, top), take_a(a_low, xs + kPanel, top, top);
    take_b(b, ns, top, left), take_b(b_low, ns + kPanel, top, left);
    float z[2][4] = {}, sum[4] = {};
    times(z[0], a, a_low, b[0], b[1], b_low[0], b_low[1]);
    times(z[1], a, a_low, b[2], b[3], b_low[2], b_low[3]);
    as_a(z[0], z[1], a, a_low);
    take_b(b, xs, left, left), take_b(b_low, xs + kPanel, left, left);
    times(sum, a, a_low, half ? b[2] : b[0], half ? b[3] : b[1], half ? b_low[2] : b_low[0], half ? b_low[3] : b_low[1]);
    put(sum, top, left + 8 * half);
  }
  named_sync(1, 128);
  const int block = warp / 2, left = warp % 2 * 16, top = 32 + 16 * block;
  float z[4][4] = {}, sum[2][4] = {};
  uint32_t a[4], a_low[4], b[4], b_low[4];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (k > block) continue;
    take_a(a, xs, top, 32 + 16 * k), take_a(a_low, xs + kPanel, top, 32 + 16 * k);
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      take_b(b, ns, 32 + 16 * k, 16 * t), take_b(b_low, ns + kPanel, 32 + 16 * k, 16 * t);
      times(z[2 * t], a, a_low, b[0], b[1], b_low[0], b_low[1]);
      times(z[2 * t + 1], a, a_low, b[2], b[3], b_low[2], b_low[3]);
    }
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (16 * k < left) continue;  // above the diagonal
    as_a(z[2 * k], z[2 * k + 1], a, a_low);
    take_b(b, xs, 16 * k, left), take_b(b_low, xs + kPanel, 16 * k, left);
    times(sum[0], a, a_low, b[0], b[1], b_low[0], b_low[1]);
    times(sum[1], a, a_low, b[2], b[3], b_low[2], b_low[3]);
  }
  put(sum[0], top, left), put(sum[1], top, left + 8);
}

template <int D>
struct InverseShared {
  uint8_t k[D / 64 * kPanel], x[2 * kPanel];
  uint8_t n[2 * kPanel];  // rows 0 … 15 of either panel hold two diagonal blocks each
  float2 sums[kChunk];
  float beta[kChunk], growth[4];
  uint64_t full;
};

/// T without its β: the inverse of I + N, N_ij = β_i e^(G_i − G_j) k_i · k_j for j < i. One block of four warps a chunk.
template <int D>
__global__ void __launch_bounds__(128, 4) inverse_kernel(const __grid_constant__ Direct a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // the build also makes PTX for GPUs that lack all this; nothing starts it there
  extern __shared__ __align__(1024) uint8_t memory[];
  InverseShared<D>& sh = *reinterpret_cast<InverseShared<D>*>(memory);
  const int s = blockIdx.y, n = a.in.qs.length(s), tid = threadIdx.x, warp = uniform(tid / 32), lane = tid % 32,
            c0 = lane % 4 * 2;
  const bool scalar = a.in.decay == Recur::Decay::Scalar;
  if (tid == 0) barrier_init(&sh.full, 1), barrier_init_fence();
  for (int e = tid; e < 2 * kPanel / 16; e += 128) reinterpret_cast<uint4*>(sh.x)[e] = {};
  uint32_t parity = 0;
  for (int chunk = blockIdx.x; chunk * kChunk < n; chunk += gridDim.x, parity ^= 1) {
    const int rows = min(kChunk, n - chunk * kChunk);
    const int64_t row0 = a.in.qs.begin(s) + chunk * kChunk;
    __syncthreads();
    if (tid == 0) {
      barrier_expect(&sh.full, sizeof sh.k);
      for (int i = 0; i < D / 64; ++i)
        tma_load(sh.k + i * kPanel, &a.k, &sh.full, 64 * i, int(a.in.ks.begin(s)) + chunk * kChunk);
    }
    if (warp == 0) {
      double g[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = 2 * lane + i;
        g[i] = scalar && row < rows ? fmaxf(*a.in.g.template row<float>(row0 + row), -1000.0f) : 0;
        sh.beta[row] = row < rows ? some_beta(a.in.beta[row0 + row]) : 0;
      }
      sum_decays(g);
      sh.sums[2 * lane] = in_two(g[0]), sh.sums[2 * lane + 1] = in_two(g[1]);
    }
    barrier_wait(&sh.full, parity);
    if (rows < kChunk) {  // rows of others, or of nobody
      for (int e = tid; e < (kChunk - rows) * (D / 8); e += 128)
        *reinterpret_cast<uint4*>(sh.k + e % (D / 8) / 8 * kPanel + (rows + e / (D / 8)) * 128 + e % 8 * 16) = {};
      proxy_fence();
    }
    __syncthreads();
    float pairs[32];
    const uint64_t keys = descriptor_k(sh.k);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      const uint64_t at = keys + k / 4 * (kPanel / 16) + k % 4 * 2;
      Product<64>::shared_a(pairs, at, at, k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(pairs);
    if (scalar) decay_pairs(pairs, sh.sums);
    {  // |I − β k k^T| = max(1, |β k·k − 1|)
      float squares[2] = {};
#pragma unroll
      for (int t = 0; t < 8; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (8 * t + c0 + i % 2 == 16 * warp + lane / 4 + i / 2 * 8) squares[i / 2] = pairs[4 * t + i];
      float growth = 0;
#pragma unroll
      for (int r = 0; r < 2; ++r)
        growth += log2f(fmaxf(1, fabsf(sh.beta[16 * warp + lane / 4 + 8 * r] * squares[r] - 1)));
      growth = warp_sum(growth);
      if (lane == 0) sh.growth[warp] = growth;
    }
    float* diagonal = reinterpret_cast<float*>(sh.n + warp / 2 * kPanel + warp % 2 * 1024);
    const int top = 16 * warp + lane / 4;
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      if (t / 2 > warp) continue;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = top + 8 * r;
        float x[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int c = 8 * t + c0 + e;
          x[e] = c < i ? pairs[4 * t + 2 * r + e] * sh.beta[i] : 0;
          if (t / 2 == warp) diagonal[(8 * (t % 2) + c0 + e) * 16 + lane / 4 + 8 * r] = x[e];
        }
        if (t / 2 < warp) {
          uint32_t high, low;
          split_bf16(x[0], x[1], high, low);
          uint8_t* to = sh.n + swizzled(i, t) + c0 * 2;
          *reinterpret_cast<uint32_t*>(to) = high, *reinterpret_cast<uint32_t*>(to + kPanel) = low;
        }
      }
    }
    if (tid == 0) bulk_wait_read();  // the chunk before
    __syncthreads();
    if (tid == 0)
      a.norms[first_chunk(a, s) + chunk] = sh.growth[0] + sh.growth[1] + sh.growth[2] + sh.growth[3] +
                                           (scalar ? sh.sums[kChunk - 1].x : 0);
    invert_blocks(sh.x, sh.n, diagonal, warp);
    proxy_fence();
    __syncthreads();
    if (tid == 0) bulk_store(a.inverse + (first_chunk(a, s) + chunk) * (2 * kPanel), sh.x, 2 * kPanel);
  }
  if (tid == 0) bulk_wait_read();
#endif
}

}  // namespace
}  // namespace heed::cuda
