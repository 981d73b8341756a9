// The kernel of attend_backward_sm90.cu (Dao 2023, FlashAttention-2, algorithm 2; Shah et al. 2024). A block owns
// 128 keys and walks the query rows that see them, of every head that reads them. Two warpgroups hold 64 keys each: scores and d_p
// are computed with keys as rows, so that weights and their gradients are A operands in registers for d_v and d_k, which stay in
// registers. Gradients of scores go through shared memory: each warpgroup multiplies half of a tile of d_q, a step behind, so that
// neither waits for the other's. A third warpgroup starts copies: in, and of tiles of d_q, which are added up in global memory in
// whatever order blocks come.
#pragma once
#include "kernels/cuda/attend_sm90.h"
#include "kernels/cuda/sm90.h"

namespace heed::sm90::backward {

constexpr int kKeys = 128;  // of a block
constexpr float kLog2e = 1.4426950408889634f;

/// 128 keys of a segment and the rows that see them.
struct alignas(16) KeyTile {
  int k_row, v_row;  // first of the tile
  int keys;          // of the segment from there on
  int q_segment;     // of the first head that reads them
  int n;             // rows of each head
  int from, count;   // first row, tiles of rows
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

/// D: at least the heads' width, and at most 64 if that is.
template <int D, int Rows, int Stages>
struct BackwardShape {
  static constexpr int d = D, rows = Rows, stages = Stages;
  static constexpr int panels = (D + 63) / 64;
  static constexpr int k_panel = kKeys * 128, q_panel = Rows * 128;
  static constexpr bool holds_values = D == 64;  // in registers: a fourth less is read from shared memory for d_p
  static constexpr int registers = 240, loader_registers = 24;
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
  alignas(1024) float d_q[2][64 * 64];                       // of each warpgroup, as its threads have it
  alignas(16) float lse[S::stages][S::rows];
  alignas(16) float dot[S::stages][S::rows];
  Rows steps[8];  // step % 8
  KeyTile tile;
  uint64_t k_full, v_full, q_full[S::stages], d_out_full[S::stages], empty[S::stages], d_s_full[2], d_s_empty[2],
      d_q_full[2], d_q_empty[2];
};

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
    Product<S::rows>::shared_a(to, keys + i / 4 * (S::k_panel / 16) + i % 4 * 2,
                               rows + i / 4 * (S::q_panel / 16) + i % 4 * 2, i > 0);
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
  const uint32_t d_s_row = shared_address(sh.d_s[0]) + (group * 64 + warp * 16 + lane % 16) * 128 +
                           ((lane / 16 ^ lane % 8) << 4);
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
  auto await = [&](int step, Ring<S::stages> at) {
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
  auto numbers = [&](const float* rows, float(&to)[16]) {
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
    const uint64_t d_s = descriptor_mn(sh.d_s[slot] + own_rows * kKeys * 128, 0),
                   keys = descriptor_mn(sh.k + own_channels * S::k_panel, 0);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i)
      Product<64>::shared_a_mn(d_q, d_s + i * (2048 / 16), keys + i * (2048 / 16), i > 0);
    wgmma_commit();
  };
  const uint32_t d_q_place = shared_address(sh.d_q[group]) + threadIdx.x % 128 * 16;
  auto send = [&](const float(&d_q)[32], Ring<2> from) {
    if (lane == 0) barrier_arrive(&sh.d_s_empty[from.slot]);
    barrier_wait(&sh.d_q_empty[group], from.slot ^ 1);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      store_four(d_q_place + 2048 * i, d_q[4 * i], d_q[4 * i + 1], d_q[4 * i + 2], d_q[4 * i + 3]);
    proxy_fence();
    __syncwarp();
    if (lane == 0) barrier_arrive(&sh.d_q_full[group]);
  };
  Ring<S::stages> at;
  Ring<2> out, before;
  int flags = 0;
  if (total > 0) flags = await(0, at);
  // Warpgroups take turns in making weights, so that one multiplies meanwhile; the first turn is warpgroup 0's.
  if (total > 0 && group == 1) named_arrive(3, 256);
  score(0);
  float lse[16];
  numbers(sh.lse[0], lse);
  wgmma_wait<0>();
  pin(s);
  for (int step = 0; step < total; ++step) {
    float d_p[S::rows / 2];
    Ring<S::stages> next = at;
    next.next();
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
    named_sync(3 + group, 256);
    if (flags >> group & 1) {
      const int first = sh.steps[step % 8].first;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int from = (key + 8 * r < t.keys ? t.low + key + 8 * r : 1 << 30) - first - column,
                  to = t.high + key + 8 * r - first - column;
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
        x.weights[2 * i + r] = pack_bf16(exp2_fast(fmaf(x0[0], a.scale_log2, l[0])),
                                         exp2_fast(fmaf(x0[1], a.scale_log2, l[1])));
      }
    }
    pin(x.weights), pin(x.d_v);
    wgmma_fence();
    add_rows<S>(x.d_v, x.weights, descriptor_mn(sh.d_out[at.slot], S::q_panel));
    wgmma_commit();
    named_arrive(3 + (group ^ 1), 256);
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
    at = next, before = out, out.next();
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
      if (8 * i >= a.a.d) break;
      *reinterpret_cast<float2*>(d_k + 8 * i) = {x.d_k[4 * i + 2 * r], x.d_k[4 * i + 2 * r + 1]};
      *reinterpret_cast<float2*>(d_v + 8 * i) = {x.d_v[4 * i + 2 * r], x.d_v[4 * i + 2 * r + 1]};
    }
  }
}

/// Starts the copies of a step: `head` and `i` are its place among the tiles of rows.
template <class S>
__device__ __forceinline__ void load_rows(BackwardShared<S>& sh, const Launch& a, const CUtensorMap& q_map,
                                          const CUtensorMap& d_out_map, int step, Ring<S::stages> at, int head, int i) {
  const KeyTile& t = sh.tile;
  const int segment = t.q_segment + head, first = t.from + i * S::rows;
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
  Ring<S::stages> at;
  for (int head = 0, step = 0; head < heads; ++head)
    for (int i = 0; i < count; ++i, ++step, at.next()) {
      load_rows(sh, a, q_map, d_out_map, step, at, head, i);
      if (step == 0)
        for (int p = 0; p < S::panels; ++p) tma_load(sh.v + p * S::k_panel, &v_map, &sh.v_full, p * 64, t.v_row);
    }
}

/// Adds what a warpgroup leaves of d_q to global memory.
template <class S>
__device__ void send_d_q(BackwardShared<S>& sh, const Launch& a, int group) {
  const int total = sh.tile.count * (a.a.heads / a.a.kv_heads), own_rows = S::rows == 64 ? 0 : group,
            own_channels = S::rows == 64 ? group : 0;
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

}  // namespace heed::sm90::backward
