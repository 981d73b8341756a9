// The recurrence of bf16 rows without a copy of its operands: the copy engine brings chunks of 64 rows as they lie, one
// warpgroup makes the products of queries and keys of a chunk, two walk on with 64 columns of the state each in registers.
// The delta rule's inverses are made beforehand (recur_sm90_inverse.cuh); a decay for each channel takes two warpgroups
// (recur_sm90_decay.cuh).
#pragma once
#include "kernels/cuda/recur_sm90_scan.cuh"
#include "kernels/cuda/tensor_map.h"

namespace heed::cuda {
namespace {

/// A map of f32 rows in boxes of 32 columns × `box` rows. What lies outside is read as zeros and not written.
inline bool f32_map(CUtensorMap& map, const float* data, int64_t rows, int64_t width, int64_t stride, int box) {
  const cuuint64_t sizes[2] = {cuuint64_t(width), cuuint64_t(rows)}, strides[1] = {cuuint64_t(stride * 4)};
  const cuuint32_t boxes[2] = {32, cuuint32_t(box)}, steps[2] = {1, 1};
  return sm90::encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2, const_cast<float*>(data), sizes, strides, boxes,
                              steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

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
struct Layout {
  static constexpr int d = D, wide = D / 64;
  static constexpr bool delta = Delta, out = Out, vector = Vector;  // vector: a decay for each channel
  // A stage: keys, values, queries; with vector decay keys and queries are decayed in place, and their low parts lie behind.
  static constexpr int values = wide * kPanel, queries = values + 2 * kPanel, loaded = queries + (Out ? wide * kPanel : 0),
                       key_lows = loaded, query_lows = key_lows + wide * kPanel,
                       stage = !Vector ? loaded
                               : Out   ? query_lows + wide * kPanel
                                       : query_lows;
  static constexpr int stages = !Out ? 4 : Vector ? 2 : 3;
  // What is made of a chunk, twice: T and P, each high and low. Numbers: e^G, e^(end − G), β; G in log2, high and low. With
  // vector decay: what the state is multiplied by before queries see it, and before keys are added.
  static constexpr int pairs = Delta ? 2 * kPanel : 0, made = pairs + (Out ? 2 * kPanel : 0),
                       numbers = Vector ? 2 * D * 4 + 16 : 5 * kChunk * 4;
  // Rows of outputs that are written at a time, by each of two warpgroups.
  static constexpr int at_made = stages * stage, at_rows = at_made + 2 * made,
                       rows = !Out                                                            ? 0
                              : at_rows + 32 * 1024 + 2 * numbers + 4 * D + 128 <= 227 * 1024 ? 64
                                                                                              : 32,
                       at_numbers = at_rows + 2 * rows * 256, at_last = at_numbers + 2 * numbers,
                       at_barriers = at_last + (Vector ? D * 4 : 0), shared = at_barriers + 128;
  // Threads that make, and registers of a thread that walks and of one that makes: 256 · walks + makers · makes ≤ 65,536.
  static constexpr int makers = Vector ? 256 : 128,
                       walks = Vector            ? 176
                               : Out && D == 128 ? 208
                                                 : 192,
                       makes = Vector ? 80 : 504 - 2 * walks;
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

/// P on and below the diagonal, from column `left` on, high and low, to two panels.
template <int N>
__device__ __forceinline__ void write_pairs(const float (&x)[N], uint8_t* to, int left = 0) {
  const int lane = threadIdx.x % 32, top = threadIdx.x / 32 % 4 * 16 + lane / 4, c0 = lane % 4 * 2;
#pragma unroll
  for (int t = 0; t < N / 4; ++t)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = top + 8 * r, column = left + 8 * t + c0;
      uint32_t high, low;
      split_bf16(column <= row ? x[4 * t + 2 * r] : 0, column < row ? x[4 * t + 2 * r + 1] : 0, high, low);
      uint8_t* word = to + swizzled(row, left / 8 + t) + c0 * 2;
      *reinterpret_cast<uint32_t*>(word) = high, *reinterpret_cast<uint32_t*>(word + kPanel) = low;
    }
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
    for (int i = 0; i < P::wide; ++i) tma_load(stage + P::queries + i * kPanel, &a.q, full, 64 * i, int(at.q) + row);
}

/// Zeros in rows of a chunk behind the segment's last: they are rows of others, or of nobody.
template <class P>
__device__ __forceinline__ void clear_tail(const Rows& at, uint8_t* stage, int j) {
  const int rows = min(kChunk, at.n - (at.first + j) * kChunk);
  if (rows == kChunk) return;
  for (int e = int(threadIdx.x) - 256; e < (kChunk - rows) * (P::loaded / kPanel) * 8; e += P::makers) {
    const int piece = e % 8, row = rows + e / 8 % (kChunk - rows), panel = e / 8 / (kChunk - rows);
    *reinterpret_cast<uint4*>(stage + panel * kPanel + row * 128 + piece * 16) = {};
  }
  proxy_fence();
}

/// The warpgroup that loads chunks and makes of each what the other two need.
template <class P>
__device__ __forceinline__ void make_chunks(const Direct& a, const Rows& at, uint8_t* memory, const Barriers& bar) {
  const int tid = threadIdx.x - 256, warp = uniform(tid / 32), lane = tid % 32;
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
    for (int i = 0; i < 2; ++i) from_start[i] = decayed(sums[i], {0, 0}), to_end[i] = decayed(last, sums[i]);
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
    warp_arrive(bar.made + j % 2);
    if (warp == 0) make_numbers();
  }
  if (!P::out && at.slice == 0 && !at.transition) {
    decay = __shfl_sync(~0u, decay, 0);
    if (warp == 0)
      for (int c = lane; c < P::d; c += 32)
        a.decays[(int64_t(at.s) * a.parts + at.part) * P::d + c] = exp2f(float(decay));
  }
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
      for (int i = 0; i < D / 2; ++i) state[i] = (part > 0 ? decay[i / 4 * 8 + i % 2] * state[i] : 0) + made[i];
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
    const float* from = at.transition || at.forgets || at.part > 0 || !a.in.state
                            ? nullptr
                            : a.in.state + at.s * a.in.state_stride[0];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      const int c = i / 4 * 8 + c0 + i % 2, v = column + i / 2 % 2 * 8;
      state[i] = at.transition                     ? float(c == v)
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
        for (int eight = 0; eight < P::rows / 8; ++eight)
          at_row[eight * 256] = a.in.scale * out[first / 2 + 4 * eight + i];
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
            a.to.out[(at.q + row0 + first + row) * a.to.out_stride + column_of] = *reinterpret_cast<const float*>(
                to + v / 32 * P::rows * 128 + swizzled(row, v % 32 / 4) + v % 4 * 4);
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
    warp_arrive(bar.done + j % 2);
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

/// make_chunks with a decay for each channel (recur_sm90_decay.cuh).
template <class P>
__device__ __forceinline__ void decay_chunks(const Direct& a, const Rows& at, uint8_t* memory, const Barriers& bar);

/// Grid: slices of columns (then, without Out, the transition matrix) × parts, segments.
template <class P>
__global__ void __launch_bounds__(256 + P::makers, 1) direct_kernel(const __grid_constant__ Direct a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // the build also makes PTX for GPUs that lack all this; nothing starts it there
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
      barrier_init(bar.made + i, P::makers / 32 * kWarpArrivals + P::delta),
          barrier_init(bar.done + i, uint32_t(4 * at.groups) * kWarpArrivals), barrier_init(bar.handed + i, 1);
    barrier_init_fence();
  }
  __syncthreads();
  const int group = uniform(threadIdx.x / 128);
  if (group >= 2) {
    registers_down<P::makes>();
    if (P::out && P::delta && at.part > 0) named_sync(3, 128 * at.groups + 128);  // until transitions are read
    if constexpr (P::vector) decay_chunks<P>(a, at, memory, bar);
    else make_chunks<P>(a, at, memory, bar);
  } else {
    registers_up<P::walks>();
    if (group < at.groups) walk_chunks<P>(a, at, memory, bar);
  }
#endif
}

}  // namespace
}  // namespace heed::cuda
