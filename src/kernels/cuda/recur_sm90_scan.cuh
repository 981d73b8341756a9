// Later steps of recur_sm90.cu: walking chunks with the state in registers, and handing states from part to part.
#pragma once
#include "kernels/cuda/recur_sm90_prepare.cuh"

namespace heed::cuda {
namespace {

/// A matrix in memory: the state's row is a channel.
struct States {
  float* data;
  int64_t row, column;
};

/// sum += A·B, of A and of B high and low where there are both.
template <int Steps, bool ALow, bool BLow, int N, class Multiply>
__device__ __forceinline__ void product(float (&sum)[N], const uint32_t* high, const uint32_t* low, uint64_t b,
                                        uint64_t b_low, bool start, Multiply multiply) {
#pragma unroll
  for (int k = 0; k < Steps; ++k) {
    multiply(sum, high + 4 * k, b, k, start && k == 0 ? 0 : 1);
    if constexpr (ALow) multiply(sum, low + 4 * k, b, k, 1);
    if constexpr (BLow) multiply(sum, high + 4 * k, b_low, k, 1);
  }
}
/// B as [N][K] in panels of 64 k.
struct AlongK {
  __device__ __forceinline__ void operator()(float (&sum)[32], const uint32_t* a, uint64_t b, int k, int accumulate) const {
    Product<64>::register_a_k(sum, a, b + k / 4 * (kPanel / 16) + k % 4 * 2, accumulate);
  }
};
/// B as [K][N].
template <int D> struct AcrossK {
  __device__ __forceinline__ void operator()(float (&sum)[D / 2], const uint32_t* a, uint64_t b, int k, int accumulate) const {
    Product<D>::register_a(sum, a, b + k * (2048 / 16), accumulate);
  }
};

/// What a block of the scan works on.
struct Place {
  int s, n, chunks, per, part, first, count, slice, columns, groups;
  bool transition;  // the slice is one of the transition matrix
};

/// Where things lie in a stage.
template <class F, bool Out>
struct Stage {
  static constexpr int bytes = F::template stage<Out>(), count = F::template stages<Out>();
  static constexpr int left = F::triangle * kPanel, keys = left + F::left * kPanel, values = F::keys * kPanel,
                       queries = values + F::values * kPanel, pairs = queries + F::rows * kPanel,
                       numbers = Out ? pairs + 2 * kPanel : queries;
};

/// One thread brings chunk after chunk.
template <class F, bool Out>
__device__ __forceinline__ void bring(const Job& a, const Place& at, uint8_t* memory, uint64_t* full, uint64_t* empty) {
  using S = Stage<F, Out>;
  const uint8_t* packet = a.packets + (first_packet(a, at.s) + at.first) * a.packet;
  for (int i = 0; i < at.count; ++i, packet += a.packet) {
    const int slot = i % S::count;
    barrier_wait(empty + slot, uint32_t(i / S::count + 1) & 1);
    const uint8_t* queries = packet + (F::keys + a.slices * F::values) * kPanel;
    uint8_t* to = memory + slot * S::bytes;
    barrier_expect(full + slot,
                   uint32_t(F::keys + (at.transition ? 0 : F::values) + (Out ? F::queries : 0)) * kPanel + F::numbers);
    bulk_load(to, packet, F::keys * kPanel, full + slot);
    if (!at.transition)
      bulk_load(to + S::values, packet + (F::keys + at.slice * F::values) * kPanel, F::values * kPanel, full + slot);
    if (Out) bulk_load(to + S::queries, queries, F::queries * kPanel, full + slot);
    bulk_load(to + S::numbers, queries + F::queries * kPanel, F::numbers, full + slot);
  }
}

/// A warpgroup's walk through the chunks. It holds 64 columns of the state, transposed: rows of the accumulators are
/// columns of the state, so that a product's sums are the next one's A operand, and only what all columns share lies in
/// shared memory.
template <class F, bool Out>
__device__ __forceinline__ void walk(const Job& a, const Place& at, uint8_t* memory, uint64_t* full, uint64_t* empty) {
  using S = Stage<F, Out>;
  constexpr int D = F::d;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4, c0 = lane % 4 * 2,
            column = at.slice * kSlice + group * 64 + warp % 4 * 16 + lane / 4;
  if (group >= at.groups) return;
  float state[D / 2];
  const int width = at.columns, s = at.s, n = at.n;
  const bool transition = at.transition;
  const int64_t piece = int64_t(s) * a.parts + at.part;
  {
    States from{nullptr, a.in.d_v, 1};
    if (at.part == 0) from = {const_cast<float*>(a.in.state), a.in.state_stride[1], a.in.state_stride[2]};
    else if (Out) from.data = a.local + (piece - 1) * a.in.d * a.in.d_v;
    if (at.part == 0 && from.data) from.data += s * a.in.state_stride[0];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      const int c = i / 4 * 8 + c0 + i % 2, v = column + i / 2 % 2 * 8;
      state[i] = transition                             ? float(c == v)
                 : from.data && c < a.in.d && v < width ? from.data[c * from.row + v * from.column]
                                                        : 0;
    }
  }

  for (int chunk = 0; chunk < at.count; ++chunk) {
    const int slot = chunk % S::count;
    barrier_wait(full + slot, uint32_t(chunk / S::count) & 1);
    const uint8_t* stage = memory + slot * S::bytes;
    const uint64_t triangle = descriptor_k(stage), left = descriptor_k(stage + S::left),
                   keys = descriptor_mn(stage + S::keys, kPanel), queries = descriptor_k(stage + S::queries),
                   pairs = descriptor_k(stage + S::pairs);
    constexpr uint64_t kLow = F::split ? F::wide * kPanel / 16 : 0;  // from high rows to low ones
    const float* numbers = reinterpret_cast<const float*>(stage + S::numbers);
    const float *from_start = numbers + c0, *to_end = from_start + kChunk, *through = numbers + 2 * kChunk + c0;
    float out[32], known[32];
    uint32_t high[D / 4], low[D / 4];
    if constexpr (Out || F::delta) {
#pragma unroll
      for (int i = 0; i < D / 4; ++i) split_bf16(state[2 * i], state[2 * i + 1], high[i], low[i]);
      pin(high), pin(low);
      wgmma_fence();
      if constexpr (F::delta) {
        product<D / 16, true, F::split>(known, high, low, left, left + kLow, true, AlongK());
        wgmma_commit();
      }
      if constexpr (Out) {
        product<D / 16, true, F::split>(out, high, low, queries, queries + kLow, true, AlongK());
        wgmma_commit();
      }
    }
    // Values: fragments as the accumulators' layout has them.
    uint32_t value[16], value_low[16];
    auto take_values = [&] {
      const int j = lane / 16 * 8 + lane % 8, piece_of = warp % 4 * 2 + lane / 8 % 2;
      const uint32_t panel = shared_address(stage + S::values + group * kPanel);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t x[4], y[4] = {};
        load_transposed(x, panel + swizzled(16 * k + j, piece_of));
        if constexpr (F::low) load_transposed(y, panel + 2 * kPanel + swizzled(16 * k + j, piece_of));
#pragma unroll
        for (int i = 0; i < 4; ++i)
          value[4 * k + i] = transition ? 0 : x[i], value_low[4 * k + i] = transition ? 0 : y[i];
      }
    };
    uint32_t last[F::vector ? 1 : 16], last_low[F::vector ? 1 : 16];  // values as the chunk's end sees them
    constexpr bool kValueLow = F::low || F::delta, kLastLow = kValueLow || !F::vector;
    if constexpr (F::delta) {
      wgmma_wait<0>();  // for queries too: their operand's registers are wanted
      pin(known), pin(high), pin(low);
      if constexpr (Out) pin(out);
      take_values();
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        float by[2] = {1, 1};
        if constexpr (!F::vector) by[0] = from_start[i / 2 * 8], by[1] = from_start[i / 2 * 8 + 1];
        float x = __uint_as_float(value[i] << 16) - by[0] * known[2 * i],
              y = __uint_as_float(value[i] & 0xffff0000u) - by[1] * known[2 * i + 1];
        if constexpr (F::low)
          x += __uint_as_float(value_low[i] << 16), y += __uint_as_float(value_low[i] & 0xffff0000u);
        split_bf16(x, y, value[i], value_low[i]);
      }
      pin(value), pin(value_low);
      wgmma_fence();
      product<4, true, true>(known, value, value_low, triangle, triangle + kPanel / 16, true, AlongK());
      wgmma_commit();
      wgmma_wait<0>();
      pin(known), pin(value), pin(value_low);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        split_bf16(known[2 * i], known[2 * i + 1], value[i], value_low[i]);
        if constexpr (!F::vector)
          split_bf16(known[2 * i] * to_end[i / 2 * 8], known[2 * i + 1] * to_end[i / 2 * 8 + 1], last[i], last_low[i]);
      }
    } else {
      take_values();
#pragma unroll
      for (int i = 0; i < 16; ++i)
        if constexpr (!F::vector) {
          float x = __uint_as_float(value[i] << 16), y = __uint_as_float(value[i] & 0xffff0000u);
          if constexpr (F::low)
            x += __uint_as_float(value_low[i] << 16), y += __uint_as_float(value_low[i] & 0xffff0000u);
          split_bf16(x * to_end[i / 2 * 8], y * to_end[i / 2 * 8 + 1], last[i], last_low[i]);
        }
      if constexpr (Out) {
        wgmma_wait<0>();
        pin(high), pin(low);
      }
    }
    if constexpr (Out) {
      pin(out);
      if constexpr (!F::vector)
#pragma unroll
        for (int i = 0; i < 32; ++i) out[i] *= from_start[i / 4 * 8 + i % 2];
      pin(out), pin(value), pin(value_low);
      wgmma_fence();
      product<4, kValueLow, true>(out, value, value_low, pairs, pairs + kPanel / 16, false, AlongK());
      wgmma_commit();
    }
#pragma unroll
    for (int i = 0; i < D / 2; ++i) state[i] *= through[i / 4 * 8 + i % 2];
    if constexpr (!F::vector) pin(last), pin(last_low);
    else if constexpr (!Out) pin(value), pin(value_low);
    pin(state);
    wgmma_fence();
    product<4, kLastLow, F::split>(state, F::vector ? value : last, F::vector ? value_low : last_low, keys, keys + kLow,
                                   false, AcrossK<D>());
    wgmma_commit();
    if constexpr (Out) {
      wgmma_wait<1>();
      pin(out);
      const int row0 = (at.first + chunk) * kChunk;
      float* to = a.to.out + (a.in.qs.begin(s) + row0) * a.to.out_stride;
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int row = i / 4 * 8 + c0 + i % 2, v = column + i / 2 % 2 * 8;
        if (row0 + row < n && v < width) to[row * a.to.out_stride + v] = a.in.scale * out[i];
      }
    }
    wgmma_wait<0>();
    pin(state), pin(value), pin(value_low);
    if constexpr (!F::vector) pin(last), pin(last_low);
    warp_arrive(empty + slot);
  }

  States to{nullptr, width, 1};
  if (!Out) to.data = (transition ? a.transit : a.local) + piece * a.in.d * width;
  else if (a.to.state && at.part == (at.chunks == 0 ? 0 : (at.chunks - 1) / at.per))
    to = {a.to.state + s * a.to.state_stride[0], a.to.state_stride[1], a.to.state_stride[2]};
  if (to.data)
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      const int c = i / 4 * 8 + c0 + i % 2, v = column + i / 2 % 2 * 8;
      if (c < a.in.d && v < width) to.data[c * to.row + v * to.column] = state[i];
    }
}

/// Two warpgroups that compute and one whose first thread loads. Grid: slices of columns (then, without Out, of the
/// transition matrix) × parts, segments.
template <class F, bool Out>
__global__ void __launch_bounds__(384, 1) scan_kernel(const __grid_constant__ Job a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // the build also makes PTX for GPUs that lack all this; nothing starts it there
  extern __shared__ __align__(1024) uint8_t memory[];
  using S = Stage<F, Out>;
  uint64_t *full = reinterpret_cast<uint64_t*>(memory + S::count * S::bytes), *empty = full + S::count;
  Place at;
  at.s = blockIdx.y, at.n = a.in.qs.length(at.s), at.chunks = (at.n + kChunk - 1) / kChunk;
  at.per = (at.chunks + a.parts - 1) / a.parts, at.part = blockIdx.x % a.parts, at.first = at.part * at.per;
  at.count = max(0, min(at.per, at.chunks - at.first)), at.slice = blockIdx.x / a.parts;
  at.transition = !Out && at.slice >= a.slices;
  if (at.transition) at.slice -= a.slices;
  at.columns = at.transition ? a.in.d : a.in.d_v;
  at.groups = min(2, (at.columns - at.slice * kSlice + 63) / 64);
  if (!Out && (at.part == a.parts - 1 || (at.transition && at.part == 0))) return;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::count; ++i)
      barrier_init(full + i, 1), barrier_init(empty + i, uint32_t(4 * at.groups) * kWarpArrivals);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= 256) {
    registers_down<40>();
    if (threadIdx.x == 256) bring<F, Out>(a, at, memory, full, empty);
  } else {
    registers_up<232>();
    walk<F, Out>(a, at, memory, full, empty);
  }
#endif
}

constexpr int kJoined = 16;  // columns that a block of `join` holds

/// The state behind each part but the last: local_p += transition_p · local_(p − 1). Grid: column slices, segments.
template <class F>
__global__ void __launch_bounds__(256) join_kernel(const __grid_constant__ Job a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // the build also makes PTX for GPUs that lack all this; nothing starts it there
  constexpr int D = F::d;
  __shared__ float state[D][kJoined], by[D][33];
  const int s = blockIdx.y, tid = threadIdx.x, d = a.in.d, d_v = a.in.d_v, left = blockIdx.x * kJoined;
  const int chunks = (a.in.qs.length(s) + kChunk - 1) / kChunk, per = (chunks + a.parts - 1) / a.parts;
  float* local = a.local + int64_t(s) * a.parts * d * d_v;
  constexpr int kLanes = 256 / D, kHeld = kJoined / kLanes;  // threads a row, columns a thread
  const int row = tid / kLanes, v0 = tid % kLanes * kHeld;
  for (int p = 0; p + 1 < a.parts; ++p, local += int64_t(d) * d_v) {
    float sum[kHeld] = {};
    if constexpr (F::delta) {
      const float* transit = a.transit + (int64_t(s) * a.parts + p) * d * d;
      for (int c = 0; c < D && p > 0; c += 32) {
        for (int e = tid; e < D * 32; e += 256)
          by[e / 32][e % 32] = e / 32 < d && c + e % 32 < d ? transit[int64_t(e / 32) * d + c + e % 32] : 0;
        __syncthreads();
#pragma unroll 8
        for (int i = 0; i < 32; ++i)
#pragma unroll
          for (int v = 0; v < kHeld; ++v) sum[v] += by[row][i] * state[c + i][v0 + v];
        __syncthreads();
      }
    } else if (p > 0) {  // decay alone: the product over the part's chunks
      float product = 1;
      for (int i = p * per + tid % kLanes; i < min((p + 1) * per, chunks); i += kLanes) {
        const uint8_t* packet = a.packets + (first_packet(a, s) + i + 1) * a.packet - 1024;
        product *= reinterpret_cast<const float*>(packet)[2 * kChunk + row];
      }
#pragma unroll
      for (int step = 1; step < kLanes; step *= 2) product *= __shfl_xor_sync(~0u, product, step);
#pragma unroll
      for (int v = 0; v < kHeld; ++v) sum[v] = product * state[row][v0 + v];
      __syncthreads();
    }
#pragma unroll
    for (int v = 0; v < kHeld; ++v) {
      const bool in = row < d && left + v0 + v < d_v;
      float* at = local + int64_t(row) * d_v + left + v0 + v;
      state[row][v0 + v] = in ? sum[v] + *at : 0;
      if (in) *at = state[row][v0 + v];
    }
    __syncthreads();
  }
#endif
}

}  // namespace
}  // namespace heed::cuda
