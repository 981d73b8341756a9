// Gradients of exact attention on Hopper's tensor cores (Dao 2023, FlashAttention-2, algorithm 2; Shah et al. 2024). A block owns
// 128 keys and walks the query rows that see them, of every head that reads them. Two warpgroups hold 64 keys each: scores and d_p
// are computed with keys as rows, so that weights and their gradients are A operands in registers for d_v and d_k, which stay in
// registers. Gradients of scores go through shared memory: each warpgroup multiplies half of a tile of d_q, a step behind, so that
// neither waits for the other. A third warpgroup starts copies: in, and of tiles of d_q, which are added up in global memory in
// whatever order blocks come.
#include <algorithm>

#include "kernels/cuda/attend_sm90.h"
#include "kernels/cuda/longest_first.cuh"
#include "kernels/cuda/sm90.h"
#include "kernels/cuda/tensor_map.h"

namespace heed::sm90 {
namespace {

constexpr int kKeys = 128;               // of a block
constexpr int64_t kSection = 32 << 20;   // bytes of queries and gradients touched at one time should stay in L2 (50 MB)
constexpr float kLog2e = 1.4426950408889634f;

/// 128 keys of a segment and the rows that see them.
struct alignas(16) KeyTile {
  int k_row, v_row;  // first of the tile
  int keys;          // of the segment from there on
  int q_segment;     // of the first head that reads them
  int n;             // rows of each head
  int from, count;   // first row, tiles of rows
  int shift;         // tile to begin with
  int low, high;     // key r of the tile is seen by rows from low + r on, before high + r
};

struct Launch {
  AttendBackward a;
  const KeyTile* tiles;
  const int* total;
  float* d_q;              // chunk by chunk, in each 64 channels after 64 channels as a warpgroup's threads have them
  const float *lse, *dot;  // of rows, chunk by chunk: −lse·log2 e, −scale·Σ out · d_out
  float scale_log2;
};

/// Rows of a segment are kept in chunks of 64, whole ones, up to a whole tile of rows.
__device__ __forceinline__ int64_t first_chunk(int64_t begin, int segment) { return begin / 64 + 2 * segment; }

template <int D, int Rows, int Stages>
struct BackwardShape {
  static constexpr int d = D, rows = Rows, stages = Stages;
  static constexpr int panels = (D + 63) / 64;
  static constexpr int k_panel = kKeys * 128, q_panel = Rows * 128;
  static constexpr bool holds_values = D == 64;  // in registers: a fourth less is read from shared memory for d_p
  static constexpr int registers = 240, loader_registers = 24;
};

/// Where a step of the pipeline stands in a ring of slots, and the parity of the barriers there.
template <int Slots>
struct Slot {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ Slot next() const { return slot + 1 == Slots ? Slot{0, parity ^ 1} : Slot{slot + 1, parity}; }
};

/// Of a step: its rows.
struct alignas(16) Rows {
  int first;  // row of the segment
  int left;   // rows of the segment from there on
  int chunk;  // the first one's
  int flags;  // bit g: some row does not see some key of warpgroup g; bit 2: there are fewer rows than a tile has
};

template <class S>
struct BackwardShared {
  alignas(1024) uint8_t k[S::panels * S::k_panel];
  alignas(1024) uint8_t v[S::panels * S::k_panel];
  alignas(1024) uint8_t q[S::stages][S::panels * S::q_panel];
  alignas(1024) uint8_t d_out[S::stages][S::panels * S::q_panel];
  alignas(1024) uint8_t d_s[2][S::rows / 64 * kKeys * 128];  // [64 rows of q][key][row]
  alignas(1024) float d_q[2][64 * 64];  // of each warpgroup, as its threads have it
  alignas(16) float lse[S::stages][S::rows];
  alignas(16) float dot[S::stages][S::rows];
  Rows steps[8];  // step % 8
  KeyTile tile;
  uint64_t k_full, v_full, q_full[S::stages], d_out_full[S::stages], empty[S::stages], d_s_full[2], d_s_empty[2], d_q_full[2],
      d_q_empty[2];
};

__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

/// Rows `from` … `to` − 1 of swizzled panels become zeros: what lies there is another segment's or NaN, which a weight of 0 does not
/// silence. Every warpgroup that reads them writes the same and waits for its own writes only.
__device__ __forceinline__ void clear_rows(uint8_t* panels, int count, int panel, int from, int to) {
  const int each = (to - from) * 8;
  for (int i = threadIdx.x % 128; i < count * each; i += 128)
    reinterpret_cast<int4*>(panels + i / each * panel + from * 128)[i % each] = {0, 0, 0, 0};
}

template <class S>
struct KeySums {
  float d_k[S::d / 2], d_v[S::d / 2];
  uint32_t weights[S::rows / 4], d_s[S::rows / 4];  // in bf16
  uint32_t values[S::holds_values ? S::d / 4 : 1];
};

/// keys × rows: A and B with contiguous channels.
template <class S>
__device__ __forceinline__ void dots(float (&to)[S::rows / 2], uint64_t keys, uint64_t rows) {
#pragma unroll
  for (int i = 0; i < S::d / 16; ++i)
    Product<S::rows>::shared_a(to, keys + i / 4 * (S::k_panel / 16) + i % 4 * 2, rows + i / 4 * (S::q_panel / 16) + i % 4 * 2, i > 0);
}
/// keys × channels += weights · rows.
template <class S>
__device__ __forceinline__ void add_rows(float (&to)[S::d / 2], const uint32_t (&weights)[S::rows / 4], uint64_t rows) {
#pragma unroll
  for (int i = 0; i < S::rows / 16; ++i) Product<S::d>::register_a(to, weights + 4 * i, rows + i * (2048 / 16), 1);
}

/// A warpgroup's 64 keys of the tile.
template <class S>
__device__ void sum_keys(BackwardShared<S>& sh, const Launch& a, const KeyTile& t, int group) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, column = lane % 4 * 2;
  const int key = group * 64 + warp * 16 + lane / 4;  // and + 8
  const int total = uniform(t.count) * (a.a.heads / a.a.kv_heads);
  KeySums<S> x;
#pragma unroll
  for (int i = 0; i < S::d / 2; ++i) x.d_k[i] = x.d_v[i] = 0;
  const uint64_t k = descriptor_k(sh.k + group * 64 * 128), v = descriptor_k(sh.v + group * 64 * 128);
  const uint32_t d_s_row = shared_address(sh.d_s[0]) + (group * 64 + warp * 16 + lane % 16) * 128 + ((lane / 16 ^ lane % 8) << 4);
  if (total > 0) {
    barrier_wait(&sh.k_full, 0), barrier_wait(&sh.v_full, 0);
    if (uniform(t.keys) < kKeys) {
      clear_rows(sh.k, S::panels, S::k_panel, t.keys, kKeys), clear_rows(sh.v, S::panels, S::k_panel, t.keys, kKeys);
      proxy_fence();
      named_sync(1 + group, 128);
    }
  }
  if constexpr (S::holds_values)
#pragma unroll
    for (int i = 0; i < S::d / 16; ++i) {
      const int row = group * 64 + warp * 16 + lane % 16;
      load_tiles(x.values + 4 * i, shared_address(sh.v) + row * 128 + ((2 * i + lane / 16) ^ row % 8) * 16);
    }
  // Waits for the rows of a step; returns its flags.
  auto await = [&](int step, Slot<S::stages> at) {
    barrier_wait(&sh.q_full[at.slot], at.parity);
    const int flags = uniform(sh.steps[step % 8].flags);
    if (flags & 4) {
      const int left = sh.steps[step % 8].left;
      barrier_wait(&sh.d_out_full[at.slot], at.parity);
      clear_rows(sh.q[at.slot], S::panels, S::q_panel, left, S::rows);
      clear_rows(sh.d_out[at.slot], S::panels, S::q_panel, left, S::rows);
      proxy_fence();
      named_sync(1 + group, 128);
    }
    return flags;
  };
  // Numbers of 16 of the columns that this thread has: of 64 rows.
  auto numbers = [&](const float* rows, float (&to)[16]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float2 x = load_two(shared_address(rows + 8 * i + column));
      to[2 * i] = x.x, to[2 * i + 1] = x.y;
    }
  };
  float s[S::rows / 2];
  auto score = [&](int slot) {
    wgmma_fence();
    dots<S>(s, k, descriptor_k(sh.q[slot]));
    wgmma_commit();
  };
  // A quarter of the rows' gradients, 64 × 64, of which this warpgroup has its own: other rows or, with 64 rows, other channels.
  const int own_rows = S::rows == 64 ? 0 : group, own_channels = S::rows == 64 ? group : 0;
  auto multiply = [&](float(&d_q)[32], int slot) {
    const uint64_t d_s = descriptor_mn(sh.d_s[slot] + own_rows * kKeys * 128, 0), keys = descriptor_mn(sh.k + own_channels * S::k_panel, 0);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) Product<64>::shared_a_mn(d_q, d_s + i * (2048 / 16), keys + i * (2048 / 16), i > 0);
    wgmma_commit();
  };
  const uint32_t d_q_place = shared_address(sh.d_q[group]) + threadIdx.x % 128 * 16;
  auto send = [&](const float(&d_q)[32], Slot<2> from) {
    if (lane == 0) barrier_arrive(&sh.d_s_empty[from.slot]);
    barrier_wait(&sh.d_q_empty[group], from.slot ^ 1);
#pragma unroll
    for (int i = 0; i < 8; ++i) store_four(d_q_place + 2048 * i, d_q[4 * i], d_q[4 * i + 1], d_q[4 * i + 2], d_q[4 * i + 3]);
    proxy_fence();
    __syncwarp();
    if (lane == 0) barrier_arrive(&sh.d_q_full[group]);
  };
  Slot<S::stages> at;
  Slot<2> out, before;
  int flags = 0;
  if (total > 0) flags = await(0, at);
  score(0);
  float lse[16];
  numbers(sh.lse[0], lse);
  wgmma_wait<0>();
  pin(s);
  for (int step = 0; step < total; ++step) {
    float d_p[S::rows / 2];
    const Slot<S::stages> next = at.next();
    barrier_wait(&sh.d_out_full[at.slot], at.parity);
    wgmma_fence();
    const uint64_t d_out = descriptor_k(sh.d_out[at.slot]);
    if constexpr (S::holds_values) {
#pragma unroll
      for (int i = 0; i < S::d / 16; ++i) Product<S::rows>::register_a_k(d_p, x.values + 4 * i, d_out + 2 * i, i > 0);
    } else {
      dots<S>(d_p, v, d_out);
    }
    wgmma_commit();
    if (flags >> group & 1) {
      const int first = sh.steps[step % 8].first;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int from = (key + 8 * r < t.keys ? t.low + key + 8 * r : 1 << 30) - first - column, to = t.high + key + 8 * r - first - column;
#pragma unroll
        for (int i = 0; i < S::rows / 8; ++i)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& one = s[4 * i + 2 * r + e];
            one = 8 * i + e >= from && 8 * i + e < to ? one : -INFINITY;
          }
      }
    }
#pragma unroll
    for (int i = 0; i < S::rows / 8; ++i) {
      if (i % 8 == 0 && i > 0) numbers(sh.lse[at.slot] + 8 * i, lse);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float *x0 = s + 4 * i + 2 * r, *l = lse + i % 8 * 2;
        x.weights[2 * i + r] = pack_bf16(exp2_fast(fmaf(x0[0], a.scale_log2, l[0])), exp2_fast(fmaf(x0[1], a.scale_log2, l[1])));
      }
    }
    pin(x.weights), pin(x.d_v);
    wgmma_fence();
    add_rows<S>(x.d_v, x.weights, descriptor_mn(sh.d_out[at.slot], S::q_panel));
    wgmma_commit();
    float dot[16];
    numbers(sh.dot[at.slot], dot);
    if (step + 1 < total) flags = await(step + 1, next);
    wgmma_wait<1>();
    pin(d_p);
#pragma unroll
    for (int i = 0; i < S::rows / 8; ++i) {
      if (i % 8 == 0 && i > 0) numbers(sh.dot[at.slot] + 8 * i, dot);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t w = x.weights[2 * i + r];  // the f32 ones would take registers that there are not
        const float low = __uint_as_float(w << 16), high = __uint_as_float(w & 0xffff0000u);
        const float *d = d_p + 4 * i + 2 * r, *o = dot + i % 8 * 2;
        x.d_s[2 * i + r] = pack_bf16(low * fmaf(d[0], a.a.scale, o[0]), high * fmaf(d[1], a.a.scale, o[1]));
      }
    }
    barrier_wait(&sh.d_s_empty[out.slot], out.parity ^ 1);
#pragma unroll
    for (int i = 0; i < S::rows / 16; ++i)
      store_tiles((d_s_row + out.slot * int(sizeof sh.d_s[0]) + i / 4 * (kKeys * 128)) ^ (i % 4 << 5), x.d_s + 4 * i);
    proxy_fence();
    __syncwarp();
    if (lane == 0) barrier_arrive(&sh.d_s_full[out.slot]);
    pin(x.d_s), pin(x.d_k);
    wgmma_fence();
    add_rows<S>(x.d_k, x.d_s, descriptor_mn(sh.q[at.slot], S::q_panel));
    wgmma_commit();
    float d_q[32];
    if (step > 0) barrier_wait(&sh.d_s_full[before.slot], before.parity);
    wgmma_wait<1>();  // d_v: frees the registers of the weights
    pin(x.d_v), pin(x.weights);
    multiply(d_q, before.slot);
    score(next.slot);  // behind the last step of anything: a branch around the product would cost registers
    wgmma_wait<1>();
    pin(d_q), pin(x.d_k), pin(x.d_s);
    if (lane == 0) barrier_arrive(&sh.empty[at.slot]);
    if (step > 0) send(d_q, before);
    numbers(sh.lse[next.slot], lse);
    wgmma_wait<0>();
    pin(s);
    at = next, before = out, out = out.next();
  }
  if (total > 0) {
    float d_q[32];
    barrier_wait(&sh.d_s_full[before.slot], before.parity);
    multiply(d_q, before.slot);
    wgmma_wait<0>();
    pin(d_q);
    send(d_q, before);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (key + 8 * r >= t.keys) continue;
    float* d_k = a.a.d_k + (t.k_row + key + 8 * r) * a.a.d_k_stride + column;
    float* d_v = a.a.d_v + (t.v_row + key + 8 * r) * a.a.d_v_stride + column;
#pragma unroll
    for (int i = 0; i < S::d / 8; ++i) {
      *reinterpret_cast<float2*>(d_k + 8 * i) = {x.d_k[4 * i + 2 * r], x.d_k[4 * i + 2 * r + 1]};
      *reinterpret_cast<float2*>(d_v + 8 * i) = {x.d_v[4 * i + 2 * r], x.d_v[4 * i + 2 * r + 1]};
    }
  }
}

/// Starts the copies of a step: `head` and `i` are its place among the tiles of rows.
template <class S>
__device__ __forceinline__ void load_rows(BackwardShared<S>& sh, const Launch& a, const CUtensorMap& q_map, const CUtensorMap& d_out_map,
                                          int step, Slot<S::stages> at, int head, int i) {
  const KeyTile& t = sh.tile;
  const int segment = t.q_segment + head, place = i + t.shift, first = t.from + (place < t.count ? place : place - t.count) * S::rows;
  const int64_t begin = a.a.q_begin[segment], chunk = first_chunk(begin, segment) + first / 64;
  const int row = int(begin) + first;
  int flags = (t.keys < kKeys ? 3 : 0) | (t.n - first < S::rows) << 2;
  for (int g = 0; g < 2; ++g) flags |= (first < t.low + 64 * g + 63 || first + S::rows > t.high + 64 * g) << g;
  barrier_wait(&sh.empty[at.slot], at.parity ^ 1);
  sh.steps[step % 8] = {first, t.n - first, int(chunk), flags};
  uint64_t *q_full = &sh.q_full[at.slot], *d_out_full = &sh.d_out_full[at.slot];
  barrier_expect(q_full, sizeof sh.q[0] + sizeof sh.lse[0]);
  for (int p = 0; p < S::panels; ++p) tma_load(sh.q[at.slot] + p * S::q_panel, &q_map, q_full, p * 64, row);
  bulk_load(sh.lse[at.slot], a.lse + chunk * 64, sizeof sh.lse[0], q_full);
  barrier_expect(d_out_full, sizeof sh.d_out[0] + sizeof sh.dot[0]);
  for (int p = 0; p < S::panels; ++p) tma_load(sh.d_out[at.slot] + p * S::q_panel, &d_out_map, d_out_full, p * 64, row);
  bulk_load(sh.dot[at.slot], a.dot + chunk * 64, sizeof sh.dot[0], d_out_full);
}

template <class S>
__device__ void load_tile(BackwardShared<S>& sh, const Launch& a, const CUtensorMap& q_map, const CUtensorMap& k_map,
                          const CUtensorMap& v_map, const CUtensorMap& d_out_map) {
  const KeyTile& t = sh.tile;
  const int count = t.count, heads = a.a.heads / a.a.kv_heads;
  if (count == 0) return;
  barrier_expect(&sh.k_full, sizeof sh.k), barrier_expect(&sh.v_full, sizeof sh.v);
  for (int p = 0; p < S::panels; ++p) tma_load(sh.k + p * S::k_panel, &k_map, &sh.k_full, p * 64, t.k_row);
  Slot<S::stages> at;
  for (int head = 0, step = 0; head < heads; ++head)
    for (int i = 0; i < count; ++i, ++step, at = at.next()) {
      load_rows(sh, a, q_map, d_out_map, step, at, head, i);
      if (step == 0)
        for (int p = 0; p < S::panels; ++p) tma_load(sh.v + p * S::k_panel, &v_map, &sh.v_full, p * 64, t.v_row);
    }
}

/// Adds what a warpgroup leaves of d_q to global memory.
template <class S>
__device__ void send_d_q(BackwardShared<S>& sh, const Launch& a, int group) {
  const int total = sh.tile.count * (a.a.heads / a.a.kv_heads), own_rows = S::rows == 64 ? 0 : group, own_channels = S::rows == 64 ? group : 0;
  const uint32_t bytes = min(64, S::d - 64 * own_channels) * 64 * 4;
  for (int step = 0; step < total; ++step) {
    barrier_wait(&sh.d_q_full[group], step & 1);
    bulk_add(a.d_q + (int64_t(sh.steps[step % 8].chunk + own_rows) * S::panels + own_channels) * 4096, sh.d_q[group], bytes);
    bulk_wait_read();
    barrier_arrive(&sh.d_q_empty[group]);
  }
}

template <class S>
__global__ void __launch_bounds__(384, 1)
    attend_backward_kernel(const __grid_constant__ Launch a, const __grid_constant__ CUtensorMap q_map,
                           const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
                           const __grid_constant__ CUtensorMap d_out_map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // the build also makes PTX for GPUs that lack all this; nothing starts it there
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& sh = *reinterpret_cast<BackwardShared<S>*>(memory);
  if (int(blockIdx.x) >= *a.total) return;
  if (threadIdx.x == 0) {
    sh.tile = a.tiles[blockIdx.x];
    prefetch_map(&q_map), prefetch_map(&k_map), prefetch_map(&v_map), prefetch_map(&d_out_map);
    barrier_init(&sh.k_full, 1), barrier_init(&sh.v_full, 1);
    for (int i = 0; i < S::stages; ++i)
      barrier_init(&sh.q_full[i], 1), barrier_init(&sh.d_out_full[i], 1), barrier_init(&sh.empty[i], 8);
    for (int i = 0; i < 2; ++i) {
      barrier_init(&sh.d_s_full[i], 8), barrier_init(&sh.d_s_empty[i], 8);
      barrier_init(&sh.d_q_full[i], 4), barrier_init(&sh.d_q_empty[i], 1);
    }
    barrier_init_fence();
  }
  __syncthreads();
  const int group = uniform(threadIdx.x / 128);
  if (group == 2) {
    registers_down<S::loader_registers>();
    const int warp = threadIdx.x / 32 - 8;
    if (threadIdx.x % 32 == 0) {
      if (warp == 0) load_tile<S>(sh, a, q_map, k_map, v_map, d_out_map);
      else if (warp < 3) send_d_q<S>(sh, a, warp - 1);
    }
  } else {
    registers_up<S::registers>();
    sum_keys<S>(sh, a, sh.tile, group);
  }
#endif
}

/// One warp a row: Σ out · d_out, lse in the kernel's form, d_out in bf16.
__global__ void prepare_rows(const __grid_constant__ AttendBackward a, float* lse, float* dots, __nv_bfloat16* d_out, int tile) {
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
    const float4* x = reinterpret_cast<const float4*>(from + ((first_chunk(begin, segment) + first / 64) * panels + channel / 64) * 4096);
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
  take(s.d_q, chunks * ((a.d + 63) / 64) * 4096), take(s.lse, chunks * 64), take(s.dot, chunks * 64), take(s.d_out, a.q_rows * a.d);
  s.bytes = at - static_cast<char*>(memory);
  return s;
}

/// Key tiles, those that most rows see first. One block.
__global__ void __launch_bounds__(1024) schedule_key_tiles(const __grid_constant__ AttendBackward a, const __grid_constant__ BackwardScratch to, int rows) {
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
    // Where all rows see all keys, blocks of a head begin at different rows, so as not to add to the same ones at one time.
    t.shift = a.causal || t.count == 0 ? 0 : int(int64_t(tile) * (kKeys / rows) % t.count);
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
  static const cudaError_t ready = cudaFuncSetAttribute(attend_backward_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (ready != cudaSuccess) return ready;
  const Launch to{a, scratch.tiles, scratch.total, scratch.d_q, scratch.lse, scratch.dot, a.scale * kLog2e};
  attend_backward_kernel<S><<<unsigned(most_key_tiles(a)), 384, bytes, stream>>>(to, q, k, v, d_out);
  write_d_q<<<dim3(unsigned(std::clamp<int64_t>((each + 63) / 64 * S::panels, 1, 4096)), unsigned(a.segments)), 128, 0, stream>>>(a, scratch.d_q);
  return cudaGetLastError();
}

}  // namespace

bool attend_backward_fits(const AttendBackward& a) {
  auto row = [](const void* p, int64_t stride, int64_t elements) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % elements == 0 && stride < (int64_t(1) << 38);
  };
  return (a.d == 64 || a.d == 96 || a.d == 128) && row(a.q, a.q_stride, 8) && row(a.k, a.k_stride, 8) && row(a.v, a.v_stride, 8) &&
         row(a.out, a.out_stride, 4) && row(a.d_out, a.d_out_stride, 4) && row(a.d_q, a.d_q_stride, 4) &&
         row(a.d_k, a.d_k_stride, 4) && row(a.d_v, a.d_v_stride, 4) && a.heads % a.kv_heads == 0 && a.q_rows < 1 << 30 &&
         a.k_rows < 1 << 30 && a.v_rows < 1 << 30 && a.scale > 0 && encode_tiled();
}

int64_t attend_backward_scratch(const AttendBackward& a) { return lay_out(a, nullptr).bytes; }

#ifndef HEED_ATTEND_BACKWARD_SHAPES
cudaError_t attend_backward_launch(const AttendBackward& a, void* memory, cudaStream_t stream) {
  if (a.d == 64) return launch<BackwardShape<64, 128, 2>>(a, memory, stream);
  if (a.d == 96) return launch<BackwardShape<96, 64, 3>>(a, memory, stream);
  return launch<BackwardShape<128, 64, 3>>(a, memory, stream);
}
#endif

}  // namespace heed::sm90
