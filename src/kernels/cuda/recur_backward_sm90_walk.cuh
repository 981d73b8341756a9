// First step of recur_backward_sm90.cu: states before each block of 128 rows and gradients of states behind it, by two
// walks that know nothing of each other, one from the first chunk of 64 rows to the last and one back. With the delta rule
// they also leave what rows add to the state (U) and d_v. A warpgroup holds 64 columns of a state, transposed as in
// recur_sm90_direct.cuh, another makes what does not depend on the state, a thread loads.
//
// Of a chunk, with G the sums of its log decays, S the state before it and dS the gradient of the state behind it:
//   U = T β (V − e^G K S),                     S ← e^G_end S + (e^(G_end − G) K)^T U
//   dU = P^T dO + e^(G_end − G) K dS,          d_v = β T^T dU
//   dS ← e^G_end dS + scale (e^G Q)^T dO − (e^G K)^T d_v
// where T is the inverse of recur_sm90_inverse.cuh and P_ij = scale e^(G_i − G_j) q_i · k_j for j ≤ i; without the delta
// rule U is V and the term with d_v is not there (Yang et al. 2024, arXiv 2406.06484 and 2412.06464).
#pragma once
#include "kernels/cuda/recur_backward_sm90.h"
#include "kernels/cuda/recur_sm90_inverse.cuh"

namespace heed::cuda {
namespace {

/// Stores four 8 × 8 tiles of 16 bits, each transposed: what load_transposed reads.
__device__ __forceinline__ void store_transposed(uint32_t row, const uint32_t* tiles) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(tiles[0]),
               "r"(tiles[1]), "r"(tiles[2]), "r"(tiles[3])
               : "memory");
}

constexpr int kBlock = 128;        // rows of a block of gradients
constexpr int kHeld = 4 * kPanel;  // bytes of 128 rows of 128 bf16: two panels of 128 rows

constexpr int kNumbers = 5 * kChunk;  // of a chunk's rows: e^G, e^(G_end − G), β; G in log2, high and low

struct Back {
  CUtensorMap q, k, v, d_out, d_q, d_k, d_v;
  RecurView in;
  RecurBackward to;
  // kHeld bytes for each block (first_block). States and their gradients have rows for columns of v.
  uint8_t *states, *d_states, *d_outs, *values, *d_values;
  const uint8_t* inverse;          // of each chunk (first_chunk): T, high and low
  float* numbers;                  // of each chunk, where there is a decay or β: kNumbers of them
  bool lined_q, lined_k, lined_v;  // the copy engine can write the gradient
};

/// Blocks of a segment follow each other; no two segments share one.
__device__ __forceinline__ int64_t first_block(const Back& a, int s) { return a.in.qs.begin(s) / kBlock + s; }

template <bool Delta>
struct WalkLayout {
  static constexpr bool delta = Delta;
  static constexpr int channels = Delta ? 128 : 64, wide = channels / 64;  // that a block holds of the state
  // A stage: what adds to the state (keys, or on the way back queries), values (d_out: f32, then in its place bf16), then
  // keys on the way back and T.
  static constexpr int values = wide * kPanel, keys = values + 2 * kPanel, triangle = keys + 2 * kPanel,
                       stage = Delta ? triangle + kPanel : keys, stages = Delta ? 3 : 6;
  // P, twice; states on their way out (half of it each of two without the delta rule), and twice U or d_v.
  static constexpr int at_pairs = stages * stage, at_states = at_pairs + (Delta ? 2 * kPanel : 0),
                       at_rows = at_states + 2 * kPanel, at_numbers = at_rows + (Delta ? 2 * kPanel : 0),
                       at_barriers = at_numbers + stages * kNumbers * 4, shared = at_barriers + 192;
  static_assert(shared <= 227 * 1024);
};

struct Walker {
  int s, n, chunks, left, channel;  // left: first column
  bool back;
  int64_t q, k, v;
  __device__ __forceinline__ int chunk(int t) const { return back ? chunks - 1 - t : t; }
};

template <class W>
__device__ __forceinline__ void load_rows(const Back& a, const Walker& at, uint8_t* memory, uint64_t* full, int t) {
  uint8_t* stage = memory + t % W::stages * W::stage;
  full += t % W::stages;
  const int row = at.chunk(t) * kChunk;
  const int64_t chunk = at.q / kChunk + at.s + at.chunk(t);  // first_chunk
  barrier_expect(full, uint32_t(W::wide + (at.back ? 2 : 1) + (W::delta ? (at.back ? 3 : 1) : 0)) * kPanel +
                           (a.numbers ? kNumbers * 4 : 0));
  for (int i = 0; i < W::wide; ++i)
    tma_load(stage + i * kPanel, at.back ? &a.q : &a.k, full, at.channel + 64 * i, int(at.back ? at.q : at.k) + row);
  if (at.back)
    for (int half = 0; half < 2; ++half)
      tma_load(stage + W::values + half * kPanel, &a.d_out, full, at.left + 32 * half, int(at.q) + row);
  else tma_load(stage + W::values, &a.v, full, at.left, int(at.v) + row);
  if constexpr (W::delta) {
    if (at.back)
      for (int i = 0; i < 2; ++i) tma_load(stage + W::keys + i * kPanel, &a.k, full, 64 * i, int(at.k) + row);
    bulk_load(stage + W::triangle, a.inverse + chunk * (2 * kPanel), kPanel, full);
  }
  if (a.numbers)
    bulk_load(memory + W::at_numbers + t % W::stages * kNumbers * 4, a.numbers + chunk * kNumbers, kNumbers * 4, full);
}

/// What of rows depends on decays and β alone. A warp a chunk.
__global__ void __launch_bounds__(256) numbers_kernel(const __grid_constant__ Back a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // the build also makes PTX for GPUs that lack all this; nothing starts it there
  const int s = blockIdx.y, n = a.in.qs.length(s), lane = threadIdx.x % 32;
  const int64_t q = a.in.qs.begin(s);
  const bool scalar = a.in.decay == Recur::Decay::Scalar;
  for (int j = blockIdx.x * 8 + threadIdx.x / 32; j * kChunk < n; j += gridDim.x * 8) {
    double sum[2];
    float beta[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = j * kChunk + 2 * lane + i;
      sum[i] = scalar && row < n ? fmaxf(*a.in.g.template row<float>(q + row), -1000.0f) : 0;
      beta[i] = a.in.beta && row < n ? some_beta(a.in.beta[q + row]) : 0;
    }
    sum_decays(sum);
    const float2 sums[2] = {in_two(sum[0]), in_two(sum[1])},
                 end = {__shfl_sync(~0u, sums[1].x, 31), __shfl_sync(~0u, sums[1].y, 31)};
    float* to = a.numbers + (q / kChunk + s + j) * kNumbers + 2 * lane;
    *reinterpret_cast<float2*>(to) = {decayed(sums[0], {0, 0}), decayed(sums[1], {0, 0})};
    *reinterpret_cast<float2*>(to + kChunk) = {decayed(end, sums[0]), decayed(end, sums[1])};
    *reinterpret_cast<float2*>(to + 2 * kChunk) = {beta[0], beta[1]};
    *reinterpret_cast<float4*>(to + 3 * kChunk + 2 * lane) = {sums[0].x, sums[0].y, sums[1].x, sums[1].y};
  }
#endif
}

/// One thread has chunks brought, and on the way back sends bf16 of d_out away.
template <class W>
__device__ __forceinline__ void bring_walk(const Back& a, const Walker& at, uint8_t* memory, const Barriers& bar) {
  for (int t = 0; t < min(W::stages, at.chunks); ++t) load_rows<W>(a, at, memory, bar.full, t);
  for (int t = 0; t < at.chunks; ++t) {
    const int slot = t % W::stages, j = at.chunk(t);
    if (at.back && (W::delta || j % 2 == at.channel / 64)) {
      barrier_wait(bar.made + slot, uint32_t(t / W::stages) & 1);
      bulk_store(a.d_outs + (first_block(a, at.s) + j / 2) * kHeld + at.left / 64 * 2 * kPanel + j % 2 * kPanel,
                 memory + slot * W::stage + W::values, kPanel);
    }
    if (t + W::stages >= at.chunks) continue;
    barrier_wait(bar.done + slot, uint32_t(t / W::stages) & 1);
    bulk_wait_read();
    load_rows<W>(a, at, memory, bar.full, t + W::stages);
  }
  bulk_wait_read();
}

/// The warpgroup that rounds d_out and makes P on the way back, of the delta rule.
template <class W>
__device__ __forceinline__ void make_walk(const Back& a, const Walker& at, uint8_t* memory, const Barriers& bar) {
  const int tid = threadIdx.x - 128, warp = uniform(tid / 32), lane = tid % 32;
  for (int t = 0; t < at.chunks; ++t) {
    const int slot = t % W::stages;
    uint8_t* stage = memory + slot * W::stage;
    if (W::delta && at.back && t >= 2)  // where P was
      barrier_wait(bar.done + (t - 2) % W::stages, uint32_t((t - 2) / W::stages) & 1);
    barrier_wait(bar.full + slot, uint32_t(t / W::stages) & 1);
    const int rows = min(kChunk, at.n - at.chunk(t) * kChunk);
    if (rows < kChunk) {  // rows of others, or of nobody
      const int panels = W::delta ? W::triangle / kPanel : W::stage / kPanel;
      for (int e = tid; e < (kChunk - rows) * panels * 8; e += 128)
        *reinterpret_cast<uint4*>(stage + e / 8 / (kChunk - rows) * kPanel + (rows + e / 8 % (kChunk - rows)) * 128 +
                                  e % 8 * 16) = {};
      proxy_fence();
      named_sync(1, 128);
    }
    if (at.back) {  // d_out in bf16
      const int half = tid / 64, row = tid % 64;
      uint8_t* panel = stage + W::values;
      uint4 x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 *from = reinterpret_cast<const float4*>(panel + half * kPanel + swizzled(row, 2 * i)),
                     *next = reinterpret_cast<const float4*>(panel + half * kPanel + swizzled(row, 2 * i + 1));
        const float4 y = *from, z = *next;
        x[i] = {pack_bf16(y.x, y.y), pack_bf16(y.z, y.w), pack_bf16(z.x, z.y), pack_bf16(z.z, z.w)};
      }
      named_sync(1, 128);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        *reinterpret_cast<uint4*>(panel + swizzled(row, 4 * half + i)) = row < rows ? x[i] : uint4{0, 0, 0, 0};
      proxy_fence();
      if (W::delta) named_sync(1, 128);
    }
    if constexpr (W::delta)
      if (at.back) {
        float pairs[32];
        const uint64_t keys = descriptor_k(stage + W::keys), queries = descriptor_k(stage);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < W::channels / 16; ++k) {
          const int step = k / 4 * (kPanel / 16) + k % 4 * 2;
          Product<64>::shared_a(pairs, queries + step, keys + step, k > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        pin(pairs);
        if (a.in.decay == Recur::Decay::Scalar)
          decay_pairs(pairs, reinterpret_cast<const float2*>(memory + W::at_numbers + (slot * kNumbers + 3 * kChunk) * 4));
        const int top = 16 * warp + lane / 4, c0 = lane % 4 * 2;
        uint8_t* to = memory + W::at_pairs + t % 2 * kPanel;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          const int row = top + i % 2 * 8, column = i / 2 * 8 + c0;
          *reinterpret_cast<uint32_t*>(to + swizzled(row, i / 2) + c0 * 2) = pack_bf16(
              column <= row ? a.in.scale * pairs[2 * i] : 0, column < row ? a.in.scale * pairs[2 * i + 1] : 0);
        }
      }
    proxy_fence();
    warp_arrive(bar.made + slot);
  }
}

/// The warpgroup that walks. Back: from the last chunk to the first, with the gradient of the state.
template <class W, bool Backward>
__device__ __forceinline__ void walk_state(const Back& a, const Walker& at, uint8_t* memory, const Barriers& bar) {
  constexpr int N = W::channels;
  const int tid = threadIdx.x, warp = uniform(tid / 32), lane = tid % 32, c0 = lane % 4 * 2,
            column = at.left + 16 * warp + lane / 4;
  const int64_t block0 = first_block(a, at.s);
  float state[N / 2];
  {
    const float* from = Backward ? a.to.d_state : a.in.state;
    const int64_t* stride = Backward ? a.to.d_state_stride : a.in.state_stride;
    if (from) from += at.s * stride[0];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const int c = at.channel + i / 4 * 8 + c0 + i % 2, v = column + i / 2 % 2 * 8;
      state[i] = from && c < a.in.d && v < a.in.d_v ? from[c * stride[1] + v * stride[2]] : 0;
    }
  }
  // What leaves through shared memory: `write` puts it there, `send` has one thread start copies. A place is written again
  // only after another leaving, whose barrier says that all before it were read.
  auto leave = [&](auto write, auto send) {
    write();
    proxy_fence();
    if (tid == 0) bulk_wait_read();
    named_sync(2, 128);
    if (tid == 0) send();
  };
  const int turned = lane / 16 * 8 + lane % 8, turned_piece = warp * 2 + lane / 8 % 2;  // as load_transposed wants them
  for (int t = 0; t < at.chunks; ++t) {
    const int slot = t % W::stages, j = at.chunk(t);
    const uint8_t* stage = memory + slot * W::stage;
    const float* numbers = reinterpret_cast<const float*>(memory + W::at_numbers) + slot * kNumbers;
    const uint64_t rows = descriptor_mn(stage, kPanel), keys = descriptor_mn(stage + W::keys, kPanel);
    barrier_wait(bar.full + slot, uint32_t(t / W::stages) & 1);
    barrier_wait(bar.made + slot, uint32_t(t / W::stages) & 1);
    const bool kept = Backward ? j % 2 == 1 || t == 0 : j % 2 == 0;
    uint32_t high[N / 4], value[16], last[16];
    float known[32], given[32];
    {
      const uint32_t panel = shared_address(stage + W::values);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t x[4];
        load_transposed(x, panel + swizzled(16 * k + turned, turned_piece));
#pragma unroll
        for (int i = 0; i < 4; ++i) value[4 * k + i] = x[i];
      }
    }
    if (W::delta || kept) {
#pragma unroll
      for (int i = 0; i < N / 4; ++i) high[i] = pack_bf16(state[2 * i], state[2 * i + 1]);
    }
    if (a.in.decay == Recur::Decay::Scalar) {
      const float through = numbers[kChunk - 1];
#pragma unroll
      for (int i = 0; i < N / 2; ++i) state[i] *= through;
    }
    pin(state);
    // Columns of the accumulators are rows of the chunk: number `which` of those of value[i].
    auto columns = [&](int which, int i) {
      return *reinterpret_cast<const float2*>(numbers + which * kChunk + i / 2 * 8 + c0);
    };
    auto scaled = [&](int which, float by) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float2 x = a.numbers ? columns(which, i) : float2{1, 1};
        last[i] = pack_bf16(by * x.x * __uint_as_float(value[i] << 16), by * x.y * __uint_as_float(value[i] & 0xffff0000u));
      }
    };
    if constexpr (W::delta) {
      pin(high), pin(value);
      wgmma_fence();
      product<N / 16, false, false>(known, high, nullptr, descriptor_k(stage + (Backward ? W::keys : 0)), 0, true, AlongK());
      if constexpr (Backward)
        product<4, false, false>(given, value, nullptr, descriptor_mn(memory + W::at_pairs + t % 2 * kPanel, kPanel), 0,
                                 true, AcrossK<64>());
      wgmma_commit();
    }
    if (kept)
      leave(
          [&] {
            const uint32_t to = shared_address(memory + W::at_states + (W::delta ? 0 : j / 2 % 2 * kPanel));
#pragma unroll
            for (int k = 0; k < N / 16; ++k)
              store_tiles(to + k / 4 * kPanel + swizzled(16 * warp + lane / 8 % 2 * 8 + lane % 8, k % 4 * 2 + lane / 16),
                          high + 4 * k);
          },
          [&] {
            uint8_t* to = (Backward ? a.d_states : a.states) + (block0 + j / 2) * kHeld + at.left * 128;
            const uint8_t* from = memory + W::at_states + (W::delta ? 0 : j / 2 % 2 * kPanel);
            for (int i = 0; i < W::wide; ++i)
              bulk_store(to + (at.channel / 64 + i) * 2 * kPanel, from + i * kPanel, kPanel);
          });
    if constexpr (Backward) scaled(0, a.in.scale);
    else if constexpr (!W::delta) scaled(1, 1);
    if constexpr (W::delta) {
      wgmma_wait<0>();
      pin(known), pin(high), pin(value);
      if constexpr (Backward) pin(given);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        if constexpr (Backward) {
          const float2 by = columns(1, i);
          value[i] = pack_bf16(given[2 * i] + by.x * known[2 * i], given[2 * i + 1] + by.y * known[2 * i + 1]);
        } else {
          const float2 by = columns(0, i), beta = columns(2, i);
          value[i] = pack_bf16(beta.x * (__uint_as_float(value[i] << 16) - by.x * known[2 * i]),
                               beta.y * (__uint_as_float(value[i] & 0xffff0000u) - by.y * known[2 * i + 1]));
        }
      }
      pin(value);
      if constexpr (Backward) pin(last);
      wgmma_fence();
      if constexpr (Backward)
        product<4, false, false>(known, value, nullptr, descriptor_mn(stage + W::triangle, kPanel), 0, true, AcrossK<64>());
      else product<4, false, false>(known, value, nullptr, descriptor_k(stage + W::triangle), 0, true, AlongK());
      wgmma_commit();
      wgmma_wait<0>();
      pin(known), pin(value);
      if constexpr (Backward) {
        wgmma_fence();
        product<4, false, false>(state, last, nullptr, rows, 0, false, AcrossK<N>());
        wgmma_commit();
      }
      uint32_t to_state[16];  // U to the end of the chunk, or what the delta rule takes from the gradient
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float2 by = columns(Backward ? 0 : 1, i);
        if constexpr (Backward) {
          const float2 beta = columns(2, i);
          known[2 * i] *= -beta.x, known[2 * i + 1] *= -beta.y;
        }
        to_state[i] = pack_bf16(by.x * known[2 * i], by.y * known[2 * i + 1]);
        value[i] = pack_bf16(known[2 * i], known[2 * i + 1]) ^ (Backward ? 0x80008000u : 0);
      }
      pin(to_state);
      if constexpr (!Backward) pin(state);
      wgmma_fence();
      product<4, false, false>(state, to_state, nullptr, Backward ? keys : rows, 0, false, AcrossK<N>());
      wgmma_commit();
      uint8_t* place = memory + W::at_rows + t % 2 * kPanel;
      leave(
          [&] {
#pragma unroll
            for (int k = 0; k < 4; ++k)
              store_transposed(shared_address(place) + swizzled(16 * k + turned, turned_piece), value + 4 * k);
          },
          [&] {
            uint8_t* to = (Backward ? a.d_values : a.values) + (block0 + j / 2) * kHeld;
            bulk_store(to + at.left / 64 * 2 * kPanel + j % 2 * kPanel, place, kPanel);
          });
      wgmma_wait<0>();
      pin(to_state);
    } else {
      pin(last);
      wgmma_fence();
      product<4, false, false>(state, last, nullptr, rows, 0, false, AcrossK<N>());
      wgmma_commit();
      wgmma_wait<0>();
    }
    pin(state);
    if constexpr (Backward || !W::delta) pin(last);
    warp_arrive(bar.done + slot);
  }
  if (tid == 0) bulk_wait_read();
  if (Backward && a.to.state) {
    float* to = a.to.state + at.s * a.to.state_stride[0];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const int c = at.channel + i / 4 * 8 + c0 + i % 2, v = column + i / 2 % 2 * 8;
      if (c < a.in.d && v < a.in.d_v) to[c * a.to.state_stride[1] + v * a.to.state_stride[2]] = state[i];
    }
  }
}

/// Grid: the two ways × two slices of columns × slices of channels, segments.
template <class W>
__global__ void __launch_bounds__(384, 1) walk_kernel(const __grid_constant__ Back a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // the build also makes PTX for GPUs that lack all this; nothing starts it there
  extern __shared__ __align__(1024) uint8_t memory[];
  uint64_t* barriers = reinterpret_cast<uint64_t*>(memory + W::at_barriers);
  const Barriers bar{barriers, barriers + 8, barriers + 16, nullptr};
  Walker at;
  at.s = blockIdx.y, at.n = a.in.qs.length(at.s), at.chunks = (at.n + kChunk - 1) / kChunk;
  at.back = blockIdx.x % 2 == 0, at.left = blockIdx.x / 2 % 2 * 64, at.channel = blockIdx.x / 4 * 64;
  at.q = a.in.qs.begin(at.s), at.k = a.in.ks.begin(at.s), at.v = a.in.vs.begin(at.s);
  if (threadIdx.x == 0) {
    for (int i = 0; i < W::stages; ++i)
      barrier_init(bar.full + i, 1), barrier_init(bar.made + i, 4 * kWarpArrivals),
          barrier_init(bar.done + i, 4 * kWarpArrivals);
    barrier_init_fence();
  }
  __syncthreads();
  const int group = uniform(threadIdx.x / 128);
  if (group == 2) {
    registers_down<40>();
    if (threadIdx.x == 256) bring_walk<W>(a, at, memory, bar);
  } else if (group == 1) {
    registers_down<160>();
    make_walk<W>(a, at, memory, bar);
  } else {
    registers_up<240>();
    if (at.back) walk_state<W, true>(a, at, memory, bar);
    else walk_state<W, false>(a, at, memory, bar);
  }
#endif
}

}  // namespace
}  // namespace heed::cuda
