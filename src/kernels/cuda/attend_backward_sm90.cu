// Gradients of exact attention on Hopper's tensor cores: what goes before and behind the kernel, the list of tiles, and the launch.
#include <algorithm>

#include "kernels/cuda/attend_backward_sm90.cuh"
#include "kernels/cuda/longest_first.cuh"
#include "kernels/cuda/tensor_map.h"

namespace heed::sm90 {
namespace {

using namespace backward;

constexpr int64_t kSection = 32 << 20;  // bytes of queries and gradients touched at one time should stay in L2 (50 MB)

/// One warp a row: Σ out · d_out, lse in the kernel's form, d_out in bf16.
__global__ void prepare_rows(const __grid_constant__ AttendBackward a, float* lse, float* dots, __nv_bfloat16* d_out,
                             int tile) {
  const int segment = blockIdx.y, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int64_t begin = a.q_begin[segment], n = a.q_end[segment] - begin, chunk = first_chunk(begin, segment);
  for (int64_t i = blockIdx.x * warps + threadIdx.x / 32; i < (n + tile - 1) / tile * tile; i += gridDim.x * warps) {
    const int64_t row = begin + i, place = chunk * 64 + i;
    if (i >= n) {
      if (lane == 0) lse[place] = -INFINITY, dots[place] = 0;
      continue;
    }
    float dot = 0;
    for (int c = 4 * lane; c < a.d; c += 128) {
      const float4 o = *reinterpret_cast<const float4*>(a.out + row * a.out_stride + c),
                   g = *reinterpret_cast<const float4*>(a.d_out + row * a.d_out_stride + c);
      dot += o.x * g.x + o.y * g.y + o.z * g.z + o.w * g.w;
      *reinterpret_cast<uint2*>(d_out + row * a.d + c) = {pack_bf16(g.x, g.y), pack_bf16(g.z, g.w)};
    }
    for (int step = 16; step > 0; step /= 2) dot += __shfl_xor_sync(~0u, dot, step);
    if (lane != 0) continue;
    const float x = a.lse[row];  // −∞: the row sees nothing
    lse[place] = x == -INFINITY ? x : -x * kLog2e;
    dots[place] = -a.scale * dot;
    if (a.out_dot) a.out_dot[row] = dot;
  }
}

/// A block: 64 rows and channels of d_q, from threads' order to rows.
__global__ void __launch_bounds__(128) write_d_q(const __grid_constant__ AttendBackward a, const float* from) {
  const int segment = blockIdx.y, panels = (a.d + 63) / 64, row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  const int64_t begin = a.q_begin[segment], n = a.q_end[segment] - begin;
  for (int64_t tile = blockIdx.x; tile < (n + 63) / 64 * panels; tile += gridDim.x) {
    const int64_t first = tile / panels * 64;
    const int channel = int(tile % panels) * 64;
    const float4* x = reinterpret_cast<const float4*>(
        from + ((first_chunk(begin, segment) + first / 64) * panels + channel / 64) * 4096);
    float* to = a.d_q + (begin + first + row) * a.d_q_stride + channel + threadIdx.x % 4 * 2;
    float4 y[8];
    for (int i = 0; i < 8; ++i) y[i] = x[128 * i + threadIdx.x];
    for (int i = 0; i < 8 && channel + 8 * i < a.d; ++i) {
      if (first + row < n) *reinterpret_cast<float2*>(to + 8 * i) = {y[i].x, y[i].y};
      if (first + row + 8 < n) *reinterpret_cast<float2*>(to + 8 * a.d_q_stride + 8 * i) = {y[i].z, y[i].w};
    }
  }
}

struct BackwardScratch {
  int* total;
  KeyTile* tiles;
  int* first_tile;  // [segments of k + 1]
  float *d_q, *lse, *dot;
  __nv_bfloat16* d_out;
  int64_t bytes;
};

int64_t key_segments(const AttendBackward& a) { return int64_t(a.segments) / a.heads * a.kv_heads; }
int64_t most_key_tiles(const AttendBackward& a) { return a.k_rows / kKeys + key_segments(a); }

BackwardScratch lay_out(const AttendBackward& a, void* memory) {
  char* at = static_cast<char*>(memory);
  auto take = [&]<class T>(T*& to, int64_t count) {
    to = reinterpret_cast<T*>(at);
    at += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
  };
  BackwardScratch s;
  const int64_t chunks = a.q_rows / 64 + 2 * (int64_t(a.segments) + 1);
  take(s.total, 1), take(s.tiles, most_key_tiles(a)), take(s.first_tile, key_segments(a) + 1);
  take(s.d_q, chunks * ((a.d + 63) / 64) * 4096), take(s.lse, chunks * 64), take(s.dot, chunks * 64),
      take(s.d_out, a.q_rows * a.d);
  s.bytes = at - static_cast<char*>(memory);
  return s;
}

/// Key tiles, those that most rows see first. One block.
__global__ void __launch_bounds__(1024)
    schedule_key_tiles(const __grid_constant__ AttendBackward a, const __grid_constant__ BackwardScratch to, int rows) {
  __shared__ int2 warps[32];
  __shared__ int longest;
  const int group = a.heads / a.kv_heads, segments = a.segments / group;
  if (threadIdx.x == 0) longest = 1;
  __syncthreads();
  int total = 0;
  for (int from = 0; from < segments; from += 1024) {
    const int s = from + int(threadIdx.x);
    int2 x = {0, 0};
    if (s < segments) {
      const int q = s / a.kv_heads * a.heads;
      x.x = int((a.k_end[s] - a.k_begin[s] + kKeys - 1) / kKeys);
      atomicMax(&longest, int((a.q_end[q] - a.q_begin[q] + rows - 1) / rows) * group);
    }
    const int all = block_prefix(x, warps).x;
    if (s < segments) to.first_tile[s] = total + x.x;
    total += all;
  }
  if (threadIdx.x == 0) to.first_tile[segments] = total, *to.total = total;
  __syncthreads();
  auto make = [&](int number) {
    int s = 0, end = segments;
    while (end - s > 1) {
      const int middle = (s + end) / 2;
      if (to.first_tile[middle] <= number) s = middle;
      else end = middle;
    }
    Job<KeyTile> job;
    KeyTile& t = job.tile;
    const int tile = number - to.first_tile[s], first = tile * kKeys, m = int(a.k_end[s] - a.k_begin[s]);
    t.k_row = int(a.k_begin[s]) + first, t.v_row = int(a.v_begin[s]) + first, t.keys = m - first;
    t.q_segment = s / a.kv_heads * a.heads + s % a.kv_heads * group;
    t.n = int(a.q_end[t.q_segment] - a.q_begin[t.q_segment]);
    const int at = t.n - m + first;  // the row whose position is that of key 0 of the tile
    t.low = a.causal ? at : -(1 << 30), t.high = a.window > 0 ? at + a.window : 1 << 30;
    t.from = max(0, t.low) / rows * rows;
    const int last = min(t.n, a.window > 0 ? t.high + min(kKeys, t.keys) - 1 : t.n);
    t.count = last > t.from ? (last - t.from + rows - 1) / rows : 0;
    job.length = t.count * group;
    job.section = int(min(int64_t(63), a.q_begin[t.q_segment] * 8 * a.d / kSection));
    return job;
  };
  list_longest_first(to.tiles, total, int(min(int64_t(63), a.q_rows * 8 * a.d / kSection)) + 1, longest, make);
}

template <class S>
cudaError_t launch(const AttendBackward& a, void* memory, cudaStream_t stream) {
  const BackwardScratch scratch = lay_out(a, memory);
  CUtensorMap q, k, v, d_out;
  if (!make_map(q, a.q, a.q_rows, a.d, a.q_stride, S::rows) || !make_map(k, a.k, a.k_rows, a.d, a.k_stride, kKeys) ||
      !make_map(v, a.v, a.v_rows, a.d, a.v_stride, kKeys) || !make_map(d_out, scratch.d_out, a.q_rows, a.d, a.d, S::rows))
    return cudaErrorInvalidValue;
  const int64_t each = (a.q_rows + a.segments - 1) / a.segments;
  prepare_rows<<<dim3(unsigned(std::clamp<int64_t>((each + 15) / 16, 1, 1024)), unsigned(a.segments)), 256, 0, stream>>>(
      a, scratch.lse, scratch.dot, scratch.d_out, S::rows);
  cudaMemsetAsync(scratch.d_q, 0, size_t(reinterpret_cast<char*>(scratch.lse) - reinterpret_cast<char*>(scratch.d_q)), stream);
  schedule_key_tiles<<<1, 1024, 0, stream>>>(a, scratch, S::rows);
  constexpr int bytes = sizeof(BackwardShared<S>);
  static_assert(bytes <= 232448);
  static const cudaError_t ready = cudaFuncSetAttribute(attend_backward_kernel<S>,
                                                        cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (ready != cudaSuccess) return ready;
  const Launch to{a, scratch.tiles, scratch.total, scratch.d_q, scratch.lse, scratch.dot, a.scale * kLog2e};
  attend_backward_kernel<S><<<unsigned(most_key_tiles(a)), 384, bytes, stream>>>(to, q, k, v, d_out);
  write_d_q<<<dim3(unsigned(std::clamp<int64_t>((each + 63) / 64 * S::panels, 1, 4096)), unsigned(a.segments)), 128, 0, stream>>>(
      a, scratch.d_q);
  return cudaGetLastError();
}

}  // namespace

bool attend_backward_fits(const AttendBackward& a) {
  auto row = [](const void* p, int64_t stride, int64_t elements) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % elements == 0 && stride < (int64_t(1) << 38);
  };
  return a.d >= 8 && a.d <= 128 && a.d % 8 == 0 && row(a.q, a.q_stride, 8) && row(a.k, a.k_stride, 8) &&
         row(a.v, a.v_stride, 8) && row(a.out, a.out_stride, 4) && row(a.d_out, a.d_out_stride, 4) &&
         row(a.d_q, a.d_q_stride, 4) && row(a.d_k, a.d_k_stride, 4) && row(a.d_v, a.d_v_stride, 4) &&
         a.heads % a.kv_heads == 0 && a.q_rows < 1 << 30 && a.k_rows < 1 << 30 && a.v_rows < 1 << 30 && a.scale > 0 &&
         encode_tiled();
}

int64_t attend_backward_scratch(const AttendBackward& a) { return lay_out(a, nullptr).bytes; }

#ifndef HEED_ATTEND_BACKWARD_SHAPES
cudaError_t attend_backward_launch(const AttendBackward& a, void* memory, cudaStream_t stream) {
  if (a.d <= 64) return launch<BackwardShape<64, 128, 2>>(a, memory, stream);
  if (a.d <= 96) return launch<BackwardShape<96, 64, 3>>(a, memory, stream);
  return launch<BackwardShape<128, 64, 3>>(a, memory, stream);
}
#endif

}  // namespace heed::sm90
