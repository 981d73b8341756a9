// Exact attention on Hopper's tensor cores: the list of tiles, the choice of kernel shapes, and the launch.
#include <algorithm>

#include "kernels/cuda/attend_sm90.cuh"
#include "kernels/cuda/grid.cuh"
#include "kernels/cuda/longest_first.cuh"
#include "kernels/cuda/tensor_map.h"

namespace heed::sm90 {
namespace {

constexpr int64_t kSection = 32 << 20;  // keys and values read at one time should stay in L2 (50 MB)

struct Scratch {
  int* header;
  Tile* tiles;
  int* first_tile;  // [segments + 1]
  int* plan_row;    // [segments]: first plan row of the segment
  int* row_low;     // [rows of q], where windows count positions: the first key inside a row's window
};

__device__ int64_t rows_of(const int64_t* begin, const int64_t* end, int64_t s) { return end[s] - begin[s]; }

/// First of `n` ascending entries with block · k_tile ≥ key.
__device__ int first_at(const int32_t* index, int n, int k_tile, int64_t key) {
  int low = 0;
  while (low < n) {
    const int middle = (low + n) / 2;
    if (int64_t(index[middle]) * k_tile < key) low = middle + 1;
    else n = middle;
  }
  return low;
}

__device__ int64_t key_segment(const Attend& a, int s) {
  const int head = s % a.heads;
  return int64_t(s / a.heads) * a.kv_heads + (a.k_map ? a.k_map[head] : head / (a.heads / a.kv_heads));
}

/// Positions ascend in a segment of keys, so that a window is a range that starts where a search finds it.
__global__ void find_windows(const Attend a, int* row_low) {
  const int s = blockIdx.y;
  const int64_t k_segment = key_segment(a, s), n = rows_of(a.q_begin, a.q_end, s),
                m = rows_of(a.k_begin, a.k_end, k_segment);
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t row = a.q_begin[s] + i, position = a.q_pos ? a.q_pos[row] : m - n + i;
    int64_t low = 0, high = m;
    while (low < high) {
      const int64_t middle = (low + high) / 2, key = a.k_pos ? a.k_pos[a.k_begin[k_segment] + middle] : middle;
      if (position - key < a.window) high = middle;
      else low = middle + 1;
    }
    row_low[row] = int(low);
  }
}

__device__ Job<Tile> make_tile(const Attend& a, const Scratch& to, int rows, int keys, int number) {
  int s = 0, end = a.segments;
  while (end - s > 1) {
    const int middle = (s + end) / 2;
    if (to.first_tile[middle] <= number) s = middle;
    else end = middle;
  }
  const int head = s % a.heads;
  const int64_t n = rows_of(a.q_begin, a.q_end, s);
  const int64_t k_segment = key_segment(a, s);
  const int64_t v_segment = int64_t(s / a.heads) * a.v_heads + (a.v_map ? a.v_map[head] : head / (a.heads / a.v_heads));
  const int64_t m = rows_of(a.k_begin, a.k_end, k_segment), i = int64_t(number - to.first_tile[s]) * rows;
  Job<Tile> job;
  Tile& t = job.tile;
  t.q_row = int(a.q_begin[s] + i), t.rows = int(min(int64_t(rows), n - i));
  t.k_row = int(a.k_begin[k_segment]), t.v_row = int(a.v_begin[v_segment]), t.m = int(m), t.head = head;
  const int64_t at = m - n + i;  // position of row 0
  t.diagonal = a.causal ? int(at) : kNoKey;
  t.low = a.window > 0 ? int(at - a.window + 1) : -kNoKey;
  int64_t low = max(0, t.low);
  if (to.row_low) {
    int least = to.row_low[t.q_row], most = least;
    for (int r = 1; r < t.rows; ++r)
      least = min(least, to.row_low[t.q_row + r]), most = max(most, to.row_low[t.q_row + r]);
    low = least, t.low = most - 63;
  }
  const int64_t last = a.causal ? min(m - 1, at + t.rows - 1) : m - 1;
  t.first = 0, t.entries = 0, t.stages = 0, t.plan_row = 0;
  if (last >= low) {
    if (a.k_tile == 0) {
      t.first = int(low / keys), t.entries = t.stages = int(last / keys) - t.first + 1;
    } else {
      const int64_t row = to.plan_row[s] + i / a.q_tile, begin = a.rowptr[row];
      const int all = a.count ? a.count[row] : int(a.rowptr[row + 1] - begin);
      const int from = first_at(a.index + begin, all, a.k_tile, low - a.k_tile + 1);
      t.entries = first_at(a.index + begin, all, a.k_tile, last + 1) - from;
      t.first = int(begin) + from;
      t.stages = a.k_tile == 64 ? (t.entries + 1) / 2 : t.entries * (a.k_tile / 128);
      t.plan_row = a.halves ? 0 : int(i % a.q_tile);
    }
  }
  job.length = t.stages;
  job.section = int(min(int64_t(63), t.k_row * int64_t(a.d + a.d_v) * 2 / kSection));
  return job;
}

/// Lists the tiles: sections of heads whose keys and values fit L2 one after another, in each the longest tiles first, so that no
/// long one is left at the end. One block.
__global__ void __launch_bounds__(1024) schedule_tiles(const Attend a, const Scratch to, int rows, int keys) {
  asm volatile("griddepcontrol.launch_dependents;");
  __shared__ int2 warps[32];
  __shared__ int longest;
  if (threadIdx.x == 0) longest = 1;
  __syncthreads();
  int2 base = {0, 0};
  for (int from = 0; from < a.segments; from += 1024) {
    const int s = from + int(threadIdx.x);
    int2 x = {0, 0};
    int per_head = 0;
    if (s < a.segments) {
      const int64_t n = rows_of(a.q_begin, a.q_end, s);
      x.x = int((n + rows - 1) / rows);
      if (a.k_tile > 0) per_head = int((n + a.q_tile - 1) / a.q_tile);
      if (s % a.heads == 0) x.y = per_head * a.plan_heads;
      if (s % a.heads < a.kv_heads) {
        const int64_t kv = int64_t(s / a.heads) * a.kv_heads + s % a.heads;
        atomicMax(&longest, int((rows_of(a.k_begin, a.k_end, kv) + keys - 1) / keys));
      }
    }
    const int2 total = block_prefix(x, warps);
    if (s < a.segments) {
      const int head = s % a.heads;
      to.first_tile[s] = base.x + x.x;
      to.plan_row[s] = base.y + x.y + (head * a.plan_heads / a.heads - (head > 0 ? a.plan_heads : 0)) * per_head;
    }
    base.x += total.x, base.y += total.y;
  }
  if (threadIdx.x == 0) to.first_tile[a.segments] = base.x, to.header[0] = base.x, to.header[1] = 0;
  __syncthreads();
  const int sections = int(min(int64_t(63), a.k_rows * int64_t(a.d + a.d_v) * 2 / kSection)) + 1;
  list_longest_first(to.tiles, base.x, sections, longest,
                     [&](int number) { return make_tile(a, to, rows, keys, number); });
}

int64_t most_tiles(const Attend& a) { return a.q_rows / 64 + a.segments; }

bool counts_positions(const Attend& a) { return a.window > 0 && (a.q_pos || a.k_pos); }

Scratch lay_out(const Attend& a, void* memory) {
  char* at = static_cast<char*>(memory);
  Scratch s;
  s.header = reinterpret_cast<int*>(at), at += 256;
  s.tiles = reinterpret_cast<Tile*>(at), at += most_tiles(a) * int64_t(sizeof(Tile));
  s.first_tile = reinterpret_cast<int*>(at), at += (a.segments + 1) * 4;
  s.plan_row = reinterpret_cast<int*>(at), at += a.segments * 4;
  s.row_low = counts_positions(a) ? reinterpret_cast<int*>(at) : nullptr;
  return s;
}

template <class S>
cudaError_t launch(const Attend& a, void* memory, cudaStream_t stream) {
  const Scratch scratch = lay_out(a, memory);
  CUtensorMap q, k, v;
  const int box = S::plan ? 64 : S::kN;
  if (!make_map(q, a.q, a.q_rows, a.d, a.q_stride, S::rows) || !make_map(k, a.k, a.k_rows, a.d, a.k_stride, box) ||
      !make_map(v, a.v, a.v_rows, a.d_v, a.v_stride, box))
    return cudaErrorInvalidValue;
  if (scratch.row_low) {
    const int64_t most = (a.q_rows + a.segments - 1) / a.segments;
    find_windows<<<dim3(unsigned(std::clamp<int64_t>((most + 127) / 128, 1, 64)), unsigned(a.segments)), 128, 0, stream>>>(
        a, scratch.row_low);
  }
  schedule_tiles<<<1, 1024, 0, stream>>>(a, scratch, S::rows, S::kN);
  Launch to{};
  to.tiles = scratch.tiles, to.header = scratch.header, to.scale_log2 = a.scale * 1.4426950408889634f;
  to.out = a.out, to.out_stride = a.out_stride, to.lse = a.lse, to.sink = a.sink, to.row_low = scratch.row_low;
  to.index = a.index, to.mask = a.mask, to.bits = a.bits, to.bit_rows = a.halves ? 2 : a.q_tile,
  to.bit_shift = a.halves ? 6 : 0, to.k_tile = a.k_tile;
  to.k_rows = int(a.k_rows), to.v_rows = int(a.v_rows);
  constexpr int bytes = sizeof(Shared<S>) + 1024;
  static_assert(bytes <= 232448);
  static const cudaError_t ready = cudaFuncSetAttribute(attend_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (ready != cudaSuccess) return ready;
  cudaLaunchConfig_t config{};
  config.gridDim = unsigned(std::min<int64_t>(cuda::multiprocessors(), most_tiles(a))), config.blockDim = S::threads,
  config.dynamicSmemBytes = bytes, config.stream = stream;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization, early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, attend_kernel<S>, to, q, k, v);
}

}  // namespace

bool attend_fits(const Attend& a) {
  auto row = [](const void* p, int64_t stride) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % 8 == 0 && stride * 2 < (int64_t(1) << 40);
  };
  if (!row(a.q, a.q_stride) || !row(a.k, a.k_stride) || !row(a.v, a.v_stride) ||
      reinterpret_cast<uintptr_t>(a.out) % 8 || a.out_stride % 2)
    return false;
  if (a.q_rows >= kNoKey || a.k_rows >= kNoKey || a.v_rows >= kNoKey || !(a.scale > 0)) return false;
  if (a.k_tile > 0) {
    if (a.k_tile != 64 && a.k_tile % 128) return false;
    if (a.q_tile % 128 && !a.halves) return false;
    if (a.mask && a.k_tile > 128) return false;
    if (!(a.d == 64 && a.d_v == 64) && !(a.d == 128 && a.d_v == 128)) return false;
  }
  const bool width = (a.d == a.d_v && (a.d == 64 || a.d == 96 || a.d == 128 || a.d == 256)) || (a.d == 192 && a.d_v == 128);
  return width && encode_tiled();
}

int64_t attend_scratch(const Attend& a) {
  return 256 + most_tiles(a) * int64_t(sizeof(Tile)) + (2 * int64_t(a.segments) + 1) * 4 +
         (counts_positions(a) ? a.q_rows * 4 : 0);
}

#ifndef HEED_ATTEND_SHAPES
// Chosen by measurement (docs/performance.md, NVIDIA Hopper). Two stages of 192-wide keys leave no room for a second Q.
cudaError_t attend_launch(const Attend& a, void* memory, cudaStream_t stream) {
  if (a.k_tile > 0) {
    if (a.d == 64) return launch<Shape<64, 64, 128, 2, 3, true, true, 2>>(a, memory, stream);
    return launch<Shape<128, 128, 128, 2, 2, true, true, 2>>(a, memory, stream);
  }
  if (a.d == 64) return launch<Shape<64, 64, 128, 3, 3, false, true, 2>>(a, memory, stream);
  if (a.d == 96) return launch<Shape<96, 96, 128, 2, 2, false, true, 2>>(a, memory, stream);
  if (a.d == 128) {
    if (a.causal || a.window > 0) return launch<Shape<128, 128, 128, 2, 2, false, true, 2>>(a, memory, stream);
    return launch<Shape<128, 128, 160, 2, 2, false, true, 2>>(a, memory, stream);
  }
  if (a.d == 192) return launch<Shape<192, 128, 128, 2, 2, false, false, 1>>(a, memory, stream);
  return launch<Shape<256, 256, 80, 2, 2, false, true, 1>>(a, memory, stream);
}
#endif

}  // namespace heed::sm90
