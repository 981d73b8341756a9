// Small things that device code of every kernel needs: views of numbers, segments, reductions, launching.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "kernels/check.h"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/grid.cuh"

namespace heed::cuda {

constexpr float kInfinity = __builtin_huge_valf();

/// Throws what the driver said about `where`.
void check(cudaError_t status, const char* where);
cudaStream_t stream(Queue& queue);
/// Numbers beside every stream that are 0 before and behind each of its kernels (memory.cu).
constexpr int kCounters = 512;
int* counters(const Queue& queue);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Blocks along x for `items` a segment: each loops with the grid's stride, so that the bound, which may be far above
/// the true length, costs no blocks beyond those that fill the device. Results do not depend on it.
inline unsigned blocks_for(int64_t items, int64_t segments) {
  return unsigned(std::clamp<int64_t>(items, 1, std::max<int64_t>(1, 4096 / std::max<int64_t>(1, segments))));
}

/// More than 48 KB of shared memory must be asked for.
template <class... Formal>
void allow_shared(const char* where, void (*kernel)(Formal...), size_t shared) {
  if (shared > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), where);
}

/// Starts a kernel in the queue's order; a grid without blocks starts nothing.
template <class... Formal, class... Actual>
void launch(Queue& queue, const char* where, void (*kernel)(Formal...), dim3 grid, int threads, size_t shared,
            const Actual&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  allow_shared(where, kernel, shared);
  kernel<<<grid, threads, shared, stream(queue)>>>(args...);
  check(cudaGetLastError(), where);
}

/// As launch, for kernels that begin with await(): setting up such a kernel overlaps the end of the one before.
template <class... Formal, class... Actual>
void launch_early(Queue& queue, const char* where, void (*kernel)(Formal...), dim3 grid, int threads, size_t shared,
                  const Actual&... args) {
  if (!launches_early()) return launch(queue, where, kernel, grid, threads, shared, args...);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  allow_shared(where, kernel, shared);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t how{};
  how.gridDim = grid, how.blockDim = dim3(unsigned(threads)), how.dynamicSmemBytes = shared, how.stream = stream(queue);
  how.attrs = &early, how.numAttrs = 1;
  check(cudaLaunchKernelEx(&how, kernel, Formal(args)...), where);
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> __device__ T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

/// Rows of plain numbers.
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;
  int width = 1;
  Dtype type = Dtype::F32;

  __device__ float get(int64_t row, int c = 0) const {
    const int64_t at = row * stride + c;
    switch (type) {
      case Dtype::BF16: return to_float(static_cast<const __nv_bfloat16*>(data)[at]);
      case Dtype::F16: return to_float(static_cast<const __half*>(data)[at]);
      default: return static_cast<const float*>(data)[at];
    }
  }
  __device__ void set(int64_t row, int c, float x) const {
    const int64_t at = row * stride + c;
    switch (type) {
      case Dtype::BF16: static_cast<__nv_bfloat16*>(data)[at] = from_float<__nv_bfloat16>(x); break;
      case Dtype::F16: static_cast<__half*>(data)[at] = from_float<__half>(x); break;
      default: static_cast<float*>(data)[at] = x;
    }
  }
  template <class T> __host__ __device__ T* row(int64_t r) const { return static_cast<T*>(data) + r * stride; }
  __host__ __device__ explicit operator bool() const { return data != nullptr; }
};

/// A view of [rows] or [rows, width].
inline Matrix matrix(const Tensor& t) {
  if (!t) return {};
  return {t.data, t.stride[0], t.rank > 1 ? int(t.size[1]) : 1, t.type};
}

/// Eight numbers of 16 bits.
template <class T> __device__ inline void unpack8(const uint4& bits, float (&x)[8]) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, __half>) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    } else {
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
}

/// Eight numbers of a row from element `at` on; zeros past `count`. One 16-byte load (F32: two) where the address allows.
__device__ inline void load8(const void* data, Dtype type, int64_t at, int count, float (&x)[8]) {
  const char* p = static_cast<const char*>(data) + at * (type == Dtype::F32 ? 4 : 2);
  if (count >= 8 && reinterpret_cast<uint64_t>(p) % 16 == 0) {
    if (type == Dtype::F32) {
      const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
      x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
      return;
    }
    const uint4 bits = *reinterpret_cast<const uint4*>(p);
    if (type == Dtype::BF16) unpack8<__nv_bfloat16>(bits, x);
    else unpack8<__half>(bits, x);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    x[i] = 0;
    if (i >= count) continue;
    if (type == Dtype::F32) x[i] = reinterpret_cast<const float*>(p)[i];
    else if (type == Dtype::BF16) x[i] = to_float(reinterpret_cast<const __nv_bfloat16*>(p)[i]);
    else x[i] = to_float(reinterpret_cast<const __half*>(p)[i]);
  }
}

/// Stores eight numbers of a row of f32 from element `at` on; of those past `count` none.
__device__ inline void store8(float* data, int64_t at, int count, const float (&x)[8]) {
  float* p = data + at;
  if (count >= 8 && reinterpret_cast<uint64_t>(p) % 16 == 0) {
    reinterpret_cast<float4*>(p)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4*>(p)[1] = make_float4(x[4], x[5], x[6], x[7]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) p[i] = x[i];
}

/// Eight numbers of a row of F32 or BF16 from column c on; of those past its width none.
__device__ inline void store8(const Matrix& to, int64_t row, int c, const float (&x)[8]) {
  const int64_t at = row * to.stride + c;
  if (to.type == Dtype::F32) return store8(static_cast<float*>(to.data), at, to.width - c, x);
  __nv_bfloat16* p = static_cast<__nv_bfloat16*>(to.data) + at;
  if (to.width - c >= 8 && reinterpret_cast<uint64_t>(p) % 16 == 0) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
      words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    *reinterpret_cast<uint4*>(p) = make_uint4(words[0], words[1], words[2], words[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < to.width - c) p[i] = from_float<__nv_bfloat16>(x[i]);
}

/// Calls body(row, first column) for every eight columns of [rows, width], shared out over the grid.
template <class Body>
__device__ inline void each_eight(int64_t rows, int width, Body body) {
  const unsigned groups = unsigned(width + 7) / 8;
  const int64_t count = rows * groups, step = int64_t(gridDim.x) * blockDim.x;
  if (count + step < int64_t(1) << 32) {  // 64-bit divisions take longer than all else
    for (unsigned e = blockIdx.x * blockDim.x + threadIdx.x; e < count; e += unsigned(step))
      body(int64_t(e / groups), int(e % groups) * 8);
    return;
  }
  for (int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; e < count; e += step)
    body(e / groups, int(e % groups) * 8);
}
/// Blocks of 256 threads for each_eight.
inline unsigned blocks_for_eights(int64_t rows, int64_t width) {
  return blocks_for(ceil_div(rows * ceil_div(width, 8), 256), 1);
}

/// from [rows, width] in bf16 → to, zeros in columns past from's; to is aligned and its width a multiple of eight
/// (round_rows.cu).
void round_rows(Queue& queue, const char* where, const Matrix& from, int64_t rows, const Matrix& to);

struct Segments {
  const int64_t* offsets = nullptr;
  const int64_t* ends = nullptr;
  int count = 0, heads = 1;
  __device__ int64_t begin(int s) const { return offsets[s]; }
  __device__ int64_t end(int s) const { return ends ? ends[s] : offsets[s + 1]; }
  __device__ int length(int s) const { return int(end(s) - begin(s)); }
};
inline Segments segments(const Ragged& r) {
  return {r.offsets.as<int64_t>(), r.ends.as<int64_t>(), int(r.segments()), int(r.heads)};
}

template <class T>
__device__ inline T warp_sum(T x, int lanes = 32) {
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
__device__ inline float warp_max(float x, int lanes = 32) {
  for (int step = lanes / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}
/// The sum over a block of at most 1024 threads, in a fixed order, for every thread.
__device__ inline float block_sum(float x) {
  __shared__ float sums[32];
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  float out = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) out += sums[w];
  return out;
}

/// The sequence that token t belongs to: first[s] ≤ t < first[s + 1]; −1 when none.
__device__ inline int sequence_of(const int64_t* first, int sequences, int64_t t) {
  if (sequences == 0 || t < first[0] || t >= first[sequences]) return -1;
  int low = 0, high = sequences;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (first[middle] <= t ? low : high) = middle;
  }
  return low;
}

__device__ inline float activate(Activation how, float x) {
  if (how == Activation::Silu) return __fdividef(x, 1 + expf(-x));
  return 0.5f * x * (1 + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));  // √(2/π)
}

/// Turns a pair of channels by `angle` (Su et al. 2021).
__device__ inline void turn(float& a, float& b, float angle) {
  float s, c;
  sincosf(angle, &s, &c);
  const float turned = a * c - b * s;
  b = a * s + b * c;
  a = turned;
}

/// Rope as kernels take it; without inv_freq nothing turns.
struct RopeView {
  const float* inv_freq = nullptr;
  int dims = 0;
  bool neox = true;
  __device__ int first(int pair) const { return neox ? pair : 2 * pair; }
  __device__ int second(int pair) const { return neox ? pair + dims / 2 : 2 * pair + 1; }
};
inline RopeView rope_view(const Rope* rope) {
  return rope ? RopeView{rope->inv_freq.as<float>(), rope->dims, rope->neox} : RopeView{};
}

}  // namespace heed::cuda
