// The recurrence of bf16 rows with at most one decay a row, without a copy of its operands: the copy engine brings chunks
// of 64 rows as they lie, one warpgroup makes the products of queries and keys of a chunk, two walk on with 64 columns of
// the state each in registers. The delta rule's inverse of I + N is made for every chunk beforehand: many blocks hide the
// latencies of its short steps, which would be longer than the walk's own (8,000 clocks a chunk beside it, where a walk
// takes 5,000).
#pragma once
#include "kernels/cuda/recur_sm90_scan.cuh"
#include "kernels/cuda/tensor_map.h"

namespace heed::cuda {
namespace {

struct Direct {
  CUtensorMap q, k, v, out;
  RecurView in;
  RecurOut to;
  int parts, slices;
  float4* local;     // [segments, parts, slices, 2, D / 8, 128]: what parts make of no state, as threads hold it
  uint8_t* transit;  // [segments, parts, 2 (high, low), D / 64] panels of D rows (channels before) of 64 channels behind
  float* decays;     // [segments, parts, D]
  uint8_t* inverse;  // for each chunk (first_chunk) two panels: T, high and low
  float* norms;      // for each chunk: log2 of a bound of the norm of what it does to states before it (delta rule)
  float* forgets;    // [segments, parts]: whether nothing from before a part is left behind it (delta rule)
  bool out_lined;    // the copy engine can write rows of the output
};

/// Chunks of a segment follow each other; no two segments share one, since each takes at most ⌊rows before / 64⌋ + 1 more.
__device__ __forceinline__ int64_t first_chunk(const Direct& a, int s) { return a.in.qs.begin(s) / kChunk + s; }

/// Where things lie in shared memory.
template <int D, bool Delta, bool Out, bool Vector = false>
struct Plan {
  static constexpr int d = D, wide = D / 64;
  static constexpr bool delta = Delta, out = Out, vector = Vector;  // vector: a decay for each channel
  // A stage: keys, values, queries; with vector decay keys and queries are decayed in place, and their low parts lie behind.
  static constexpr int values = wide * kPanel, queries = values + 2 * kPanel, loaded = queries + (Out ? wide * kPanel : 0),
                       key_lows = loaded, query_lows = key_lows + wide * kPanel,
                       stage = !Vector ? loaded : Out ? query_lows + wide * kPanel : query_lows;
  static constexpr int stages = !Out ? 4 : Vector ? 2 : 3;
  // What is made of a chunk, twice: T and P, each high and low. Numbers: e^G, e^(end − G), β; G in log2, high and low. With
  // vector decay: what the state is multiplied by before queries see it, and before keys are added.
  static constexpr int pairs = Delta ? 2 * kPanel : 0, made = pairs + (Out ? 2 * kPanel : 0), numbers = Vector ? 2 * D * 4 + 16 : 5 * kChunk * 4;
  // Rows of outputs that are written at a time, by each of two warpgroups.
  static constexpr int at_made = stages * stage, at_rows = at_made + 2 * made,
                       rows = !Out ? 0 : at_rows + 32 * 1024 + 2 * numbers + 4 * D + 128 <= 227 * 1024 ? 64 : 32,
                       at_numbers = at_rows + 2 * rows * 256, at_last = at_numbers + 2 * numbers, at_barriers = at_last + (Vector ? D * 4 : 0),
                       shared = at_barriers + 128;
  // Registers of a thread that walks, and of one that makes: 2 · 128 · walks + 128 · makes ≤ 504 · 128.
  static constexpr int walks = Out && !Vector && D == 128 ? 208 : 192, makes = 504 - 2 * walks;
  static_assert(shared <= 227 * 1024);
};

constexpr float kLog2e = 1.4426950408889634f;

/// A block's place, and the rows where its segment begins.
struct Rows : Place {
  int64_t q, k, v;
  bool forgets;  // what was before the part's first chunk does not count
};

struct Barriers {
  uint64_t *full, *made, *done, *handed;
};

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

/// Sums of log decays G of a chunk's rows 2 lane, 2 lane + 1 (of a warp), in f64: differences are then exact enough,
/// however strong other decays are.
__device__ __forceinline__ void sum_decays(double (&g)[2]) {
  const int lane = threadIdx.x % 32;
  g[1] += g[0];
  double before = g[1];
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const double other = __shfl_up_sync(~0u, before, step);
    if (lane >= step) before += other;
  }
  before -= g[1];
  g[0] += before, g[1] += before;
}
/// A sum in log2 as two f32, of which differences are taken in turn.
__device__ __forceinline__ float2 in_two(double g) {
  const double x = g * 1.4426950408889634;
  const float high = float(x);
  return {high, float(x - double(high))};
}
/// e^(a − b).
__device__ __forceinline__ float decayed(float2 a, float2 b) { return exp2_fast((a.x - b.x) + (a.y - b.y)); }

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
      *reinterpret_cast<__nv_bfloat16*>(to + swizzled(16 * warp + i, 2 * warp + c / 8)) =
          lane < 16 ? high : __float2bfloat16_rn(column[i] - __bfloat162float(high));
    }
  }
  named_sync(1, 128);
  const uint32_t xs = shared_address(x), ns = shared_address(n);
  const int row = lane / 4, c0 = lane % 4 * 2;
  auto put = [&](const float (&sum)[4], int top, int left) {
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

/// A warpgroup's sums of 64 rows by 64 columns times e^(G of the row − G of the column): what lies above the diagonal is
/// of no use and may be infinite.
__device__ __forceinline__ void decay_pairs(float (&x)[32], const float2* sums) {
  const int lane = threadIdx.x % 32, top = threadIdx.x / 32 % 4 * 16 + lane / 4;
  const float2 rows[2] = {sums[top], sums[top + 8]};
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    const float4 columns = *reinterpret_cast<const float4*>(sums + 8 * t + lane % 4 * 2);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      x[4 * t + 2 * r] *= decayed(rows[r], {columns.x, columns.y});
      x[4 * t + 2 * r + 1] *= decayed(rows[r], {columns.z, columns.w});
    }
  }
}

/// P on and below the diagonal, high and low, to two panels.
__device__ __forceinline__ void write_pairs(const float (&x)[32], uint8_t* to) {
  const int lane = threadIdx.x % 32, top = threadIdx.x / 32 % 4 * 16 + lane / 4, c0 = lane % 4 * 2;
#pragma unroll
  for (int t = 0; t < 8; ++t)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = top + 8 * r, column = 8 * t + c0;
      uint32_t high, low;
      split_bf16(column <= row ? x[4 * t + 2 * r] : 0, column < row ? x[4 * t + 2 * r + 1] : 0, high, low);
      uint8_t* word = to + swizzled(row, t) + c0 * 2;
      *reinterpret_cast<uint32_t*>(word) = high, *reinterpret_cast<uint32_t*>(word + kPanel) = low;
    }
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
        sh.beta[row] = row < rows ? a.in.beta[row0 + row] : 0;
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
      a.norms[first_chunk(a, s) + chunk] =
          sh.growth[0] + sh.growth[1] + sh.growth[2] + sh.growth[3] + (scalar ? sh.sums[kChunk - 1].x : 0);
    invert_blocks(sh.x, sh.n, diagonal, warp);
    proxy_fence();
    __syncthreads();
    if (tid == 0) bulk_store(a.inverse + (first_chunk(a, s) + chunk) * (2 * kPanel), sh.x, 2 * kPanel);
  }
  if (tid == 0) bulk_wait_read();
}

/// One thread has a chunk brought.
template <class P>
__device__ __forceinline__ void load_chunk(const Direct& a, const Rows& at, uint8_t* memory, const Barriers& bar, int j) {
  uint8_t* stage = memory + j % P::stages * P::stage;
  uint64_t* full = bar.full + j % P::stages;
  const int row = (at.first + j) * kChunk, columns = at.transition ? 0 : at.groups;
  barrier_expect(full, uint32_t((P::out ? 2 : 1) * P::wide + columns) * kPanel);
  for (int i = 0; i < P::wide; ++i) tma_load(stage + i * kPanel, &a.k, full, 64 * i, int(at.k) + row);
  for (int i = 0; i < columns; ++i)
    tma_load(stage + P::values + i * kPanel, &a.v, full, at.slice * kSlice + 64 * i, int(at.v) + row);
  if constexpr (P::out)
    for (int i = 0; i < P::wide; ++i)
      tma_load(stage + P::queries + i * kPanel, &a.q, full, 64 * i, int(at.q) + row);
}

/// Zeros in rows of a chunk behind the segment's last: they are rows of others, or of nobody.
template <class P>
__device__ __forceinline__ void clear_tail(const Rows& at, uint8_t* stage, int j) {
  const int rows = min(kChunk, at.n - (at.first + j) * kChunk);
  if (rows == kChunk) return;
  for (int e = threadIdx.x % 128; e < (kChunk - rows) * (P::loaded / kPanel) * 8; e += 128) {
    const int piece = e % 8, row = rows + e / 8 % (kChunk - rows), panel = e / 8 / (kChunk - rows);
    *reinterpret_cast<uint4*>(stage + panel * kPanel + row * 128 + piece * 16) = {};
  }
  proxy_fence();
}

/// The warpgroup that loads chunks and makes of each what the other two need.
template <class P>
__device__ __forceinline__ void make_chunks(const Direct& a, const Rows& at, uint8_t* memory, const Barriers& bar) {
  const int tid = threadIdx.x - 256, warp = uniform(tid / 32), lane = tid % 32, c0 = lane % 4 * 2;
  const bool scalar = a.in.decay == Recur::Decay::Scalar;
  const int64_t q_row = at.q;
  auto load = [&](int j) { load_chunk<P>(a, at, memory, bar, j); };
  // The first warp makes the numbers of the next chunk, a lane those of rows 2 lane and 2 lane + 1.
  float g[2] = {}, beta[2] = {}, from_start[2] = {1, 1}, to_end[2] = {1, 1};
  float2 sums[2] = {};
  double decay = 0;  // of the part so far
  auto fetch = [&](int j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = (at.first + j) * kChunk + 2 * lane + i;
      const bool there = j < at.count && row < at.n;
      g[i] = scalar && there ? *a.in.g.template row<float>(q_row + row) : 0;
      if (P::delta) beta[i] = there ? a.in.beta[q_row + row] : 0;
    }
  };
  auto make_numbers = [&] {
    if (!scalar) return;
    double sum[2] = {fmaxf(g[0], -1000.0f), fmaxf(g[1], -1000.0f)};
    sum_decays(sum);
    sums[0] = in_two(sum[0]), sums[1] = in_two(sum[1]);
    const float2 last = {__shfl_sync(~0u, sums[1].x, 31), __shfl_sync(~0u, sums[1].y, 31)};
    decay += double(last.x);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      from_start[i] = decayed(sums[i], {0, 0}), to_end[i] = decayed(last, sums[i]);
  };
  if (tid == 0)
    for (int j = 0; j < min(P::stages, at.count); ++j) load(j);
  if (warp == 0) fetch(0), make_numbers();
  for (int j = 0; j < at.count; ++j) {
    const int slot = j % P::stages;
    uint8_t *stage = memory + slot * P::stage, *made = memory + P::at_made + j % 2 * P::made;
    float* numbers = reinterpret_cast<float*>(memory + P::at_numbers + j % 2 * P::numbers);
    const float2* all_sums = reinterpret_cast<const float2*>(numbers + 3 * kChunk);
    if (j >= 2) barrier_wait(bar.done + j % 2, uint32_t(j / 2 - 1) & 1);
    if (tid == 0) {
      if (P::delta) {
        barrier_expect(bar.made + j % 2, 2 * kPanel);
        bulk_load(made, a.inverse + (at.q / kChunk + at.s + at.first + j) * (2 * kPanel), 2 * kPanel, bar.made + j % 2);
      }
      if (j >= 2 && j - 2 + P::stages < at.count) load(j - 2 + P::stages);
    }
    if (warp == 0) {
      *reinterpret_cast<float2*>(numbers + 2 * lane) = {from_start[0], from_start[1]};
      *reinterpret_cast<float2*>(numbers + kChunk + 2 * lane) = {to_end[0], to_end[1]};
      *reinterpret_cast<float2*>(numbers + 2 * kChunk + 2 * lane) = {beta[0], beta[1]};
      *reinterpret_cast<float4*>(numbers + 3 * kChunk + 4 * lane) = {sums[0].x, sums[0].y, sums[1].x, sums[1].y};
      fetch(j + 1);
    }
    barrier_wait(bar.full + slot, uint32_t(j / P::stages) & 1);
    clear_tail<P>(at, stage, j);
    if constexpr (P::out) {
      named_sync(1, 128);
      uint8_t* to_p = made + P::pairs;
      float pairs[32];
      const uint64_t keys = descriptor_k(stage), queries = descriptor_k(stage + P::queries);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < P::d / 16; ++k) {
        const int step = k / 4 * (kPanel / 16) + k % 4 * 2;
        Product<64>::shared_a(pairs, queries + step, keys + step, k > 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
      pin(pairs);
      if (scalar) decay_pairs(pairs, all_sums);
      write_pairs(pairs, to_p);
    }
    proxy_fence();
    __syncwarp();
    if (lane == 0) barrier_arrive(bar.made + j % 2);
    if (warp == 0) make_numbers();
  }
  if (!P::out && at.slice == 0 && !at.transition) {
    decay = __shfl_sync(~0u, decay, 0);
    if (warp == 0)
      for (int c = lane; c < P::d; c += 32) a.decays[(int64_t(at.s) * a.parts + at.part) * P::d + c] = exp2f(float(decay));
  }
}

/// Whether `yes` holds for every thread of the warpgroup that makes.
__device__ __forceinline__ bool all_makers(bool yes) {
  uint32_t all;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.u32 p, %1, 0;\nbarrier.cta.red.and.pred q, 1, 128, p;\nselp.u32 %0, 1, 0, q;\n}\n"
      : "=r"(all)
      : "r"(uint32_t(yes))
      : "memory");
  return all;
}

/// P of a chunk that decays too much for one reference: a warp takes a key, which decays from row to row.
template <class P>
__device__ __noinline__ void pairs_one_by_one(const Direct& a, const Rows& at, uint8_t* to_p, int j) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, row0 = (at.first + j) * kChunk,
            rows = min(kChunk, at.n - row0);
  for (int e = threadIdx.x % 128; e < 2 * kPanel / 16; e += 128) reinterpret_cast<uint4*>(to_p)[e] = {};
  named_sync(1, 128);
  const int64_t q_row = at.q + row0, k_row = at.k + row0;
  for (int c = warp; c < rows; c += 4) {
    float k[P::d / 32];
#pragma unroll
    for (int m = 0; m < P::d / 32; ++m) k[m] = lane + 32 * m < a.in.d ? a.in.k.get(k_row + c, lane + 32 * m) : 0;
    for (int i = c; i < rows; ++i) {
      float sum = 0, largest = 0;
#pragma unroll
      for (int m = 0; m < P::d / 32; ++m) {
        if (lane + 32 * m >= a.in.d) continue;
        if (i > c) k[m] *= expf(a.in.g.get(q_row + i, lane + 32 * m));
        sum += k[m] * a.in.q.get(q_row + i, lane + 32 * m);
        largest = fmaxf(largest, fabsf(k[m]));
      }
      if (__all_sync(~0u, largest == 0)) break;
      sum = warp_sum(sum);
      if (lane == 0) {
        const __nv_bfloat16 high = __float2bfloat16_rn(sum);
        uint8_t* to = to_p + swizzled(i, c / 8) + c % 8 * 2;
        *reinterpret_cast<__nv_bfloat16*>(to) = high;
        *reinterpret_cast<__nv_bfloat16*>(to + kPanel) = __float2bfloat16_rn(sum - __bfloat162float(high));
      }
    }
  }
}

/// make_chunks with a decay for each channel. A thread has two channels of 32 rows. Where no channel decays by more than
/// e^−70 in half a chunk, queries and keys are decayed to and from the chunk's middle, so that the same numbers make P and
/// meet the state, which the walk decays by half chunks; else to the start and from the end.
template <class P>
__device__ __forceinline__ void decay_chunks(const Direct& a, const Rows& at, uint8_t* memory, const Barriers& bar) {
  static_assert(P::d == 128);
  const int tid = threadIdx.x - 256, warp = uniform(tid / 32), lane = tid % 32, c0 = lane % 4 * 2, half = uniform(tid / 64),
            channel = tid % 64 * 2;
  const int64_t q_row = at.q;
  float2 g[32];
  auto fetch = [&](int j) {
    const int row0 = (at.first + j) * kChunk + 32 * half;
    const float* from = a.in.g.template row<float>(q_row + row0) + channel;
#pragma unroll
    for (int i = 0; i < 32; ++i)
      g[i] = j < at.count && row0 + i < at.n && channel < a.in.d
                 ? *reinterpret_cast<const float2*>(from + i * a.in.g.stride)
                 : float2{0, 0};
  };
  if (tid == 0)
    for (int j = 0; j < min(P::stages, at.count); ++j) load_chunk<P>(a, at, memory, bar, j);
  if (!P::out) fetch(0);
  float2 carried = {1, 1}, whole = {0, 0};  // decay behind the middle of the chunk before; the part's
  auto exp_of = [](float2 x) { return float2{exp2_fast(x.x * kLog2e), exp2_fast(x.y * kLog2e)}; };
  for (int j = 0; j < at.count; ++j) {
    const int slot = j % P::stages;
    uint8_t *stage = memory + slot * P::stage, *made = memory + P::at_made + j % 2 * P::made;
    float* numbers = reinterpret_cast<float*>(memory + P::at_numbers + j % 2 * P::numbers);
    if (P::out) fetch(j);
    if (j >= 2) {
      barrier_wait(bar.done + j % 2, uint32_t(j / 2 - 1) & 1);
      if (tid == 0 && j - 2 + P::stages < at.count) load_chunk<P>(a, at, memory, bar, j - 2 + P::stages);
    }
    float2 total = {0, 0};
#pragma unroll
    for (int i = 0; i < 32; ++i) total.x += g[i].x, total.y += g[i].y;
    float2 *first = reinterpret_cast<float2*>(numbers + channel), *through = reinterpret_cast<float2*>(numbers + P::d + channel);
    *(half ? through : first) = total;
    barrier_wait(bar.full + slot, uint32_t(j / P::stages) & 1);
    clear_tail<P>(at, stage, j);
    const bool near = all_makers(total.x > -70 && total.y > -70), middle = P::out && near;
    const float2 other = half ? *first : *through, start = half ? other : total, end = half ? total : other;
    if (P::out && !middle) pairs_one_by_one<P>(a, at, made, j);
    // Both channels of every row times a factor, high in place and low behind; eight rows are read before the first is
    // written. Factors are asked for in order.
    auto decay_rows = [&](auto forward, int high_at, int low_at, auto factor) {
      uint8_t* panel = stage + high_at + channel / 64 * kPanel + 32 * half * 128 + channel % 8 * 2;
#pragma unroll
      for (int block = 0; block < 4; ++block) {
        uint8_t* rows = panel + (forward ? block : 3 - block) * 1024;
        uint32_t x[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = *reinterpret_cast<const uint32_t*>(rows + swizzled(i, channel % 64 / 8));
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int i = forward ? e : 7 - e;
          const float2 by = factor((forward ? block : 3 - block) * 8 + i);
          uint32_t high, low;
          split_bf16(__uint_as_float(x[i] << 16) * by.x, __uint_as_float(x[i] & 0xffff0000u) * by.y, high, low);
          uint32_t* word = reinterpret_cast<uint32_t*>(rows + swizzled(i, channel % 64 / 8));
          word[0] = high, word[(low_at - high_at) / 4] = low;
        }
      }
    };
    using Forward = std::true_type;
    using Backward = std::false_type;
    if (middle) {
      float2 sum = {0, 0};
      if (half == 0) {
#pragma unroll
        for (int i = 31; i >= 0; --i) {
          const float2 x = g[i];
          g[i] = sum;
          sum.x += x.x, sum.y += x.y;
        }
      } else {
#pragma unroll
        for (int i = 0; i < 32; ++i) sum.x += g[i].x, sum.y += g[i].y, g[i] = sum;
      }
      const float sign = half ? kLog2e : -kLog2e;
      if constexpr (P::out)
        decay_rows(Forward(), P::queries, P::query_lows,
                   [&](int i) { return float2{exp2_fast(sign * g[i].x), exp2_fast(sign * g[i].y)}; });
      decay_rows(Forward(), 0, P::key_lows,
                 [&](int i) { return float2{exp2_fast(-sign * g[i].x), exp2_fast(-sign * g[i].y)}; });
    } else {
      float2 sum = half ? start : float2{0, 0};
      if constexpr (P::out)
        decay_rows(Forward(), P::queries, P::query_lows, [&](int i) {
          sum.x += g[i].x, sum.y += g[i].y;
          return exp_of(sum);
        });
      sum = half ? float2{0, 0} : end;
      decay_rows(Backward(), 0, P::key_lows, [&](int i) {
        const float2 by = exp_of(sum);
        sum.x += g[i].x, sum.y += g[i].y;
        return by;
      });
    }
    if (!P::out) fetch(j + 1);
    proxy_fence();
    named_sync(1, 128);
    if (half == 0) {
      const float2 all = {start.x + end.x, start.y + end.y};
      whole.x += all.x, whole.y += all.y;
      const float2 by = middle ? exp_of(start) : float2{1, 1};
      *first = {carried.x * by.x, carried.y * by.y};
      *through = middle ? float2{1, 1} : exp_of(all);
      carried = middle ? exp_of(end) : float2{1, 1};
      if (j + 1 == at.count) *reinterpret_cast<float2*>(memory + P::at_last + channel * 4) = carried;
    }
    if constexpr (P::out)
      if (middle) {
        float pairs[32];
        const uint64_t keys = descriptor_k(stage), queries = descriptor_k(stage + P::queries),
                       key_lows = descriptor_k(stage + P::key_lows), query_lows = descriptor_k(stage + P::query_lows);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < P::d / 16; ++k) {
          const int step = k / 4 * (kPanel / 16) + k % 4 * 2;
          Product<64>::shared_a(pairs, queries + step, keys + step, k > 0);
          Product<64>::shared_a(pairs, query_lows + step, keys + step, 1);
          Product<64>::shared_a(pairs, queries + step, key_lows + step, 1);
        }
        wgmma_commit();
        wgmma_wait<0>();
        pin(pairs);
        write_pairs(pairs, made);
      }
    proxy_fence();
    __syncwarp();
    if (lane == 0) barrier_arrive(bar.made + j % 2);
  }
  if (!P::out && at.slice == 0 && half == 0)
    *reinterpret_cast<float2*>(a.decays + (int64_t(at.s) * a.parts + at.part) * P::d + channel) = exp_of(whole);
}

/// The state before a part: what the parts before it made of it.
template <class P>
__device__ __forceinline__ void hand_on(const Direct& a, const Rows& at, uint8_t* memory, const Barriers& bar,
                                        float (&state)[P::d / 2]) {
  constexpr int D = P::d, kBytes = 2 * D * D * 2;  // of a transition
  const int tid = threadIdx.x % 128, group = threadIdx.x / 128;
  const int64_t first = int64_t(at.s) * a.parts;
  int from = 0;  // the last part that forgets
  if constexpr (P::delta)
    for (int part = 1; part < at.part; ++part)
      if (uniform(int(a.forgets[first + part]))) from = part;
  auto bring = [&](int part) {
    const int slot = (part - from) % 2;
    barrier_expect(bar.handed + slot, kBytes);
    bulk_load(memory + slot * kBytes, a.transit + (first + part) * kBytes, kBytes, bar.handed + slot);
  };
  if constexpr (P::delta)
    if (threadIdx.x == 0)
      for (int part = from + 1; part < min(from + 3, at.part); ++part) bring(part);
  for (int part = from; part < at.part; ++part) {
    const float4* local = a.local + (((first + part) * a.slices + at.slice) * 2 + group) * (D / 8) * 128 + tid;
    float made[D / 2];
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      const float4 x = local[i * 128];
      made[4 * i] = x.x, made[4 * i + 1] = x.y, made[4 * i + 2] = x.z, made[4 * i + 3] = x.w;
    }
    if constexpr (P::delta) {
      if (part > from) {
        const int nth = part - from;
        barrier_wait(bar.handed + nth % 2, uint32_t((nth - 1) / 2) & 1);
        const uint64_t b = descriptor_mn(memory + nth % 2 * kBytes, D * 128);
#pragma unroll
        for (int k = 0; k < D / 16; k += 4) {
          uint32_t high[16], low[16];
#pragma unroll
          for (int i = 0; i < 16; ++i) split_bf16(state[8 * k + 2 * i], state[8 * k + 2 * i + 1], high[i], low[i]);
          pin(high), pin(low), pin(made);
          wgmma_fence();
          const uint64_t from = b + k * (2048 / 16);
          product<4, true, true>(made, high, low, from, from + D * D * 2 / 16, false, AcrossK<D>());
          wgmma_commit();
          wgmma_wait<0>();
          pin(made), pin(high), pin(low);
        }
        named_sync(2, 128 * at.groups);
        if (threadIdx.x == 0 && part + 2 < at.part) bring(part + 2);
      }
#pragma unroll
      for (int i = 0; i < D / 2; ++i) state[i] = made[i];
    } else {
      const float* decay = a.decays + (first + part) * D + threadIdx.x % 4 * 2;
#pragma unroll
      for (int i = 0; i < D / 2; ++i)
        state[i] = (part > 0 ? decay[i / 4 * 8 + i % 2] * state[i] : 0) + made[i];
    }
  }
}

/// A warpgroup's walk through the chunks, with 64 columns of the state, transposed: rows of the accumulators are columns
/// of the state, so that a product's sums are the next one's A operand.
template <class P>
__device__ __forceinline__ void walk_chunks(const Direct& a, const Rows& at, uint8_t* memory, const Barriers& bar) {
  constexpr int D = P::d;
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, group = threadIdx.x / 128, c0 = lane % 4 * 2,
            column = at.slice * kSlice + group * 64 + warp * 16 + lane / 4, width = at.columns;
  float state[D / 2];
  {
    const float* from = at.transition || at.forgets || at.part > 0 || !a.in.state ? nullptr : a.in.state + at.s * a.in.state_stride[0];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      const int c = i / 4 * 8 + c0 + i % 2, v = column + i / 2 % 2 * 8;
      state[i] = at.transition                      ? float(c == v)
                 : from && c < a.in.d && v < width ? from[c * a.in.state_stride[1] + v * a.in.state_stride[2]]
                                                    : 0;
    }
  }
  if constexpr (P::out)
    if (at.part > 0) {
      hand_on<P>(a, at, memory, bar, state);
      if constexpr (P::delta) named_arrive(3, 128 * at.groups + 128);
    }

  for (int j = 0; j < at.count; ++j) {
    const int slot = j % P::stages;
    const uint8_t *stage = memory + slot * P::stage, *made = memory + P::at_made + j % 2 * P::made;
    barrier_wait(bar.full + slot, uint32_t(j / P::stages) & 1);
    barrier_wait(bar.made + j % 2, uint32_t(j / 2) & 1);
    const uint64_t triangle = descriptor_k(made), pairs = descriptor_k(made + P::pairs);
    const float* numbers = reinterpret_cast<const float*>(memory + P::at_numbers + j % 2 * P::numbers);
    float out[32], known[32];
    constexpr int kSteps = D / 16 / (P::out && D == 128 ? 2 : 1);  // at a time: the operand's registers are many
    uint32_t high[4 * kSteps], low[4 * kSteps];
    if constexpr (P::vector) {
#pragma unroll
      for (int i = 0; i < D / 2; i += 2) {
        const float2 by = *reinterpret_cast<const float2*>(numbers + i / 4 * 8 + c0);
        state[i] *= by.x, state[i + 1] *= by.y;
      }
    }
    if constexpr (P::out || P::delta) {
#pragma unroll
      for (int k = 0; k < D / 16; k += kSteps) {
        if (k > 0) {
          wgmma_wait<0>();
          pin(high), pin(low);
          if constexpr (P::delta) pin(known);
          if constexpr (P::out) pin(out);
        }
#pragma unroll
        for (int i = 0; i < 4 * kSteps; ++i)
          split_bf16(state[8 * k + 2 * i], state[8 * k + 2 * i + 1], high[i], low[i]);
        pin(high), pin(low);
        wgmma_fence();
        const uint64_t from = k / 4 * (kPanel / 16) + k % 4 * 2;
        if constexpr (P::delta)
          product<kSteps, true, false>(known, high, low, descriptor_k(stage) + from, 0, k == 0, AlongK());
        if constexpr (P::out)
          product<kSteps, true, P::vector>(out, high, low, descriptor_k(stage + P::queries) + from,
                                           descriptor_k(stage + P::query_lows) + from, k == 0, AlongK());
        wgmma_commit();
      }
    }
    auto settle = [&] {
      wgmma_wait<0>();
      pin(high), pin(low);
      if constexpr (P::delta) pin(known);
      if constexpr (P::out) pin(out);
    };
    uint32_t value[16], value_low[16], last[16], last_low[16];
    {
      const int row = lane / 16 * 8 + lane % 8, piece = warp * 2 + lane / 8 % 2;
      const uint32_t panel = shared_address(stage + P::values + group * kPanel);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t x[4] = {};
        if (!at.transition) load_transposed(x, panel + swizzled(16 * k + row, piece));
#pragma unroll
        for (int i = 0; i < 4; ++i) value[4 * k + i] = x[i];
      }
      if constexpr (P::delta) settle();
    }
    if constexpr (P::delta) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float2 by = *reinterpret_cast<const float2*>(numbers + i / 2 * 8 + c0),
                     beta = *reinterpret_cast<const float2*>(numbers + 2 * kChunk + i / 2 * 8 + c0);
        split_bf16(beta.x * (__uint_as_float(value[i] << 16) - by.x * known[2 * i]),
                   beta.y * (__uint_as_float(value[i] & 0xffff0000u) - by.y * known[2 * i + 1]), value[i], value_low[i]);
      }
      pin(value), pin(value_low);
      wgmma_fence();
      product<4, true, true>(known, value, value_low, triangle, triangle + kPanel / 16, true, AlongK());
      wgmma_commit();
      wgmma_wait<0>();
      pin(known), pin(value), pin(value_low);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float2 by = *reinterpret_cast<const float2*>(numbers + kChunk + i / 2 * 8 + c0);
        if constexpr (P::out) split_bf16(known[2 * i], known[2 * i + 1], value[i], value_low[i]);
        split_bf16(known[2 * i] * by.x, known[2 * i + 1] * by.y, last[i], last_low[i]);
      }
    } else if constexpr (P::out) {
      settle();
    }
    if constexpr (!P::delta && !P::vector) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float2 by = *reinterpret_cast<const float2*>(numbers + kChunk + i / 2 * 8 + c0);
        split_bf16(by.x * __uint_as_float(value[i] << 16), by.y * __uint_as_float(value[i] & 0xffff0000u), last[i],
                   last_low[i]);
      }
    }
    if constexpr (P::out) {
      if constexpr (!P::vector)
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float2 by = *reinterpret_cast<const float2*>(numbers + i / 2 * 8 + c0);
        out[2 * i] *= by.x, out[2 * i + 1] *= by.y;
      }
      pin(out), pin(value);
      if constexpr (P::delta) pin(value_low);
      wgmma_fence();
      product<4, P::delta, true>(out, value, value_low, pairs, pairs + kPanel / 16, false, AlongK());
      wgmma_commit();
    }
    if constexpr (!P::vector) {
      const float through = numbers[kChunk - 1];
#pragma unroll
      for (int i = 0; i < D / 2; ++i) state[i] *= through;
      pin(last), pin(last_low), pin(state);
      wgmma_fence();
      product<4, true, false>(state, last, last_low, descriptor_mn(stage, kPanel), 0, false, AcrossK<D>());
    } else {
#pragma unroll
      for (int i = 0; i < D / 2; i += 2) {
        const float2 by = *reinterpret_cast<const float2*>(numbers + D + i / 4 * 8 + c0);
        state[i] *= by.x, state[i + 1] *= by.y;
      }
      pin(state), pin(value);
      wgmma_fence();
      product<4, false, true>(state, value, nullptr, descriptor_mn(stage, kPanel),
                              descriptor_mn(stage + P::key_lows, kPanel), false, AcrossK<D>());
    }
    wgmma_commit();
    // Outputs pass through shared memory, rows of 128 bytes swizzled, so that the copy engine writes them.
    const int row0 = (at.first + j) * kChunk;
    auto write = [&](int first) {
      uint8_t* to = memory + P::at_rows + group * P::rows * 256;
      if (threadIdx.x % 128 == 0) bulk_wait_read();
      named_sync(4 + group, 128);
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // rows of eight differ by a constant
        const int row = c0 + i % 2, v = warp % 2 * 16 + lane / 4 + i / 2 * 8;
        float* at_row = reinterpret_cast<float*>(to + warp / 2 * P::rows * 128 + swizzled(row, v / 4) + v % 4 * 4);
#pragma unroll
        for (int eight = 0; eight < P::rows / 8; ++eight) at_row[eight * 256] = a.in.scale * out[first / 2 + 4 * eight + i];
      }
      proxy_fence();
      named_sync(4 + group, 128);
      if (a.out_lined && row0 + kChunk <= at.n) {
        if (threadIdx.x % 128 == 0) {
          for (int half = 0; half < 2; ++half)
            for (int r = 0; r < P::rows; r += 32)
              tma_store(to + half * P::rows * 128 + r * 128, &a.out, at.slice * kSlice + group * 64 + half * 32,
                        int(at.q) + row0 + first + r);
        }
      } else {
        const int v = threadIdx.x % 64, column_of = at.slice * kSlice + group * 64 + v;
        for (int row = threadIdx.x % 128 / 64; row < P::rows && column_of < width; row += 2)
          if (row0 + first + row < at.n)
            a.to.out[(at.q + row0 + first + row) * a.to.out_stride + column_of] =
                *reinterpret_cast<const float*>(to + v / 32 * P::rows * 128 + swizzled(row, v % 32 / 4) + v % 4 * 4);
      }
    };
    wgmma_wait<0>();
    pin(state);
    if constexpr (P::vector) pin(value);
    else pin(last), pin(last_low);
    if constexpr (P::out) {
      pin(out), pin(value);
      if constexpr (P::delta) pin(value_low);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(bar.done + j % 2);
    if constexpr (P::out) write(0);
    if constexpr (P::rows == 32) write(32);
  }
  if (P::out && threadIdx.x % 128 == 0) bulk_wait_read();
  if constexpr (P::vector)
    if (at.count > 0) {
      const float* decay = reinterpret_cast<const float*>(memory + P::at_last) + c0;
#pragma unroll
      for (int i = 0; i < D / 2; ++i) state[i] *= decay[i / 4 * 8 + i % 2];
    }

  if constexpr (!P::out) {
    const int64_t piece = int64_t(at.s) * a.parts + at.part;
    if (at.transition) {
      uint8_t* to = a.transit + piece * (2 * D * D * 2);
#pragma unroll
      for (int i = 0; i < D / 2; i += 2) {
        uint32_t high, low;
        split_bf16(state[i], state[i + 1], high, low);
        const int v = column + i / 2 % 2 * 8;
        uint8_t* word = to + i / 32 * (D * 128) + swizzled(v, i / 4 % 8) + c0 * 2;
        if (v < D) *reinterpret_cast<uint32_t*>(word) = high, *reinterpret_cast<uint32_t*>(word + D * D * 2) = low;
      }
    } else {
      float4* to = a.local + ((piece * a.slices + at.slice) * 2 + group) * (D / 8) * 128 + threadIdx.x % 128;
#pragma unroll
      for (int i = 0; i < D / 8; ++i)
        to[i * 128] = {state[4 * i], state[4 * i + 1], state[4 * i + 2], state[4 * i + 3]};
    }
  } else if (a.to.state && at.part == (at.chunks == 0 ? 0 : (at.chunks - 1) / at.per)) {
    float* to = a.to.state + at.s * a.to.state_stride[0];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      const int c = i / 4 * 8 + c0 + i % 2, v = column + i / 2 % 2 * 8;
      if (c < a.in.d && v < width) to[c * a.to.state_stride[1] + v * a.to.state_stride[2]] = state[i];
    }
  }
}

/// Grid: slices of columns (then, without Out, the transition matrix) × parts, segments.
template <class P>
__global__ void __launch_bounds__(384, 1) direct_kernel(const __grid_constant__ Direct a) {
  extern __shared__ __align__(1024) uint8_t memory[];
  uint64_t* barriers = reinterpret_cast<uint64_t*>(memory + P::at_barriers);
  const Barriers bar{barriers, barriers + 4, barriers + 6, barriers + 8};
  Rows at;
  at.q = a.in.qs.begin(blockIdx.y), at.k = a.in.ks.begin(blockIdx.y), at.v = a.in.vs.begin(blockIdx.y);
  at.s = blockIdx.y, at.n = a.in.qs.length(at.s), at.chunks = (at.n + kChunk - 1) / kChunk;
  at.per = (at.chunks + a.parts - 1) / a.parts, at.part = blockIdx.x % a.parts, at.first = at.part * at.per;
  at.count = max(0, min(at.per, at.chunks - at.first)), at.slice = blockIdx.x / a.parts;
  at.transition = !P::out && at.slice >= a.slices;
  if (at.transition) at.slice -= a.slices;
  at.columns = at.transition ? P::d : a.in.d_v;
  at.groups = min(2, (at.columns - at.slice * kSlice + 63) / 64);
  if (!P::out && (at.part == a.parts - 1 || (at.transition && at.part == 0))) return;
  at.forgets = false;
  if constexpr (P::delta && !P::out) {
    // The last chunks whose transitions leave less than 2^−30 of what was before them suffice.
    const int lane = threadIdx.x % 32;
    const float* norms = a.norms + first_chunk(a, at.s) + at.first;
    float behind = 0;
    for (int end = at.count; end > 0 && !at.forgets; end -= 32) {
      const int chunk = end - 1 - lane;
      float sum = chunk >= 0 ? norms[chunk] : 0;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const float other = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += other;
      }
      const unsigned enough = __ballot_sync(~0u, chunk >= 0 && behind + sum < -30);
      behind += __shfl_sync(~0u, sum, 31);
      if (enough) {
        const int first = end - __ffs(enough);
        at.first += first, at.count -= first, at.forgets = true;
      }
    }
    if (at.transition && at.forgets) return;
    if (threadIdx.x == 0 && !at.transition && at.slice == 0) a.forgets[at.s * a.parts + at.part] = float(at.forgets);
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < P::stages; ++i) barrier_init(bar.full + i, 1);
    for (int i = 0; i < 2; ++i)
      barrier_init(bar.made + i, P::delta ? 5 : 4), barrier_init(bar.done + i, uint32_t(4 * at.groups)), barrier_init(bar.handed + i, 1);
    barrier_init_fence();
  }
  __syncthreads();
  const int group = uniform(threadIdx.x / 128);
  if (group == 2) {
    registers_down<P::makes>();
    if (P::out && P::delta && at.part > 0) named_sync(3, 128 * at.groups + 128);  // until transitions are read
    if constexpr (P::vector) decay_chunks<P>(a, at, memory, bar);
    else make_chunks<P>(a, at, memory, bar);
  } else {
    registers_up<P::walks>();
    if (group < at.groups) walk_chunks<P>(a, at, memory, bar);
  }
}

}  // namespace
}  // namespace heed::cuda
