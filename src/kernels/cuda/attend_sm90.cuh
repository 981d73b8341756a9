// The kernel of attend_sm90.cu. One warp loads (TMA), two or three warpgroups of 64 query rows each multiply (wgmma) and keep the
// softmax in registers. The product Q·K of a stage is under way together with P·V of the stage before, and the softmax of one
// warpgroup runs under the products of the other, which a token passed by named barriers arranges (Shah et al. 2024, FlashAttention-3).
#pragma once
#include "kernels/cuda/attend_sm90.h"
#include "kernels/cuda/sm90.h"

namespace heed::sm90 {

/// A tile of query rows and the keys it reads; made by schedule_tiles.
struct alignas(16) Tile {
  int q_row, rows;   // first row of q.values, rows of the segment in the tile
  int k_row, v_row;  // first rows of the segment's keys and values
  int m;             // its keys
  int diagonal;      // row r of the tile sees keys ≤ diagonal + r
  int low;           // and ≥ low + r; with Launch::row_low: low + 63 or more is seen by every row
  int head;
  int first, entries;  // dense: first key tile, key tiles; plan: first entry of index, entries
  int stages;          // steps of kN keys; 0: the rows see nothing
  int plan_row;        // row of the tile of bits that r = 0 is
};
constexpr int kNoKey = 1 << 30;  // past every key

/// What a launch does differently from the numbers in Tile.
struct Launch {
  const Tile* tiles;
  int* header;  // tiles in the list, tiles taken
  float scale_log2;
  float* out;
  int64_t out_stride;
  float* lse;
  const float* sink;
  const int32_t* row_low;  // the first key that each row's window holds; null: windows count keys, not positions
  const int32_t *index, *mask;
  const uint64_t* bits;
  int bit_rows, bit_shift, k_tile;  // row r of a tile reads row r >> bit_shift of its bit_rows rows of bits
  int k_rows, v_rows;
};

template <int D, int DV, int KN, int Groups, int Stages, bool Plan, bool Turns, int QSlots>
struct Shape {
  static constexpr int d = D, dv = DV, kN = KN, groups = Groups, stages = Stages, q_slots = QSlots;
  static constexpr bool plan = Plan, turns = Turns;
  static constexpr int rows = 64 * Groups;
  static constexpr int threads = 128 * (Groups + 1);
  static constexpr int panels = (D + 63) / 64, v_panels = (DV + 63) / 64;
  static constexpr int q_bytes = panels * rows * 128, k_bytes = panels * KN * 128, v_bytes = v_panels * KN * 128;
  static constexpr int registers = Groups == 2 ? 232 : 160, loader_registers = Groups == 2 ? 40 : 32;
};

template <class S>
struct Shared {
  alignas(1024) uint8_t q[S::q_slots][S::q_bytes];
  alignas(1024) uint8_t k[S::stages][S::k_bytes];
  alignas(1024) uint8_t v[S::stages][S::v_bytes];
  Tile tile[S::q_slots + 1];  // one more than Q needs: the rows of a tile are written when the next has begun
  int4 first_keys[S::q_slots], keys[S::stages];  // plan: first key of either half of a stage, tile of bits of either
  uint64_t q_full[S::q_slots], q_empty[S::q_slots], k_full[S::stages], k_empty[S::stages], v_full[S::stages],
      v_empty[S::stages];
};

/// First keys of the halves of stage j and their tiles of bits. Stages go from the last key to the first: under a causal mask the
/// tiles that need masking then come first, where no product waits for them.
template <class S>
__device__ __forceinline__ int4 stage_keys(const Launch& a, const Tile& t, int j) {
  if constexpr (!S::plan) {
    const int key = (t.first + t.entries - 1 - j) * S::kN;
    return {key, key + 64, -1, -1};
  } else if (a.k_tile == 64) {  // two blocks fill a stage
    const int e = t.entries - 1 - 2 * j;
    const int4 one = {a.index[t.first + e] * 64, kNoKey, a.mask ? a.mask[t.first + e] : -1, -1};
    if (e == 0) return one;
    return {a.index[t.first + e - 1] * 64, one.x, a.mask ? a.mask[t.first + e - 1] : -1, one.z};
  } else {
    const int e = t.stages - 1 - j, parts = a.k_tile / 128, entry = t.first + e / parts;
    const int key = a.index[entry] * a.k_tile + e % parts * 128, mask = a.mask ? a.mask[entry] : -1;
    return {key, key + 64, mask, mask};
  }
}

/// Copies a stage of keys or values, in one box a panel or, with a plan, two.
template <class S>
__device__ __forceinline__ void load_stage(uint8_t* to, const CUtensorMap& map, uint64_t* full, int panels, int row,
                                           int4 keys, int outside) {
  barrier_expect(full, panels * S::kN * 128);
  for (int p = 0; p < panels; ++p, to += S::kN * 128) {
    tma_load(to, &map, full, p * 64, row + keys.x);
    if constexpr (S::plan) tma_load(to + 64 * 128, &map, full, p * 64, keys.y == kNoKey ? outside : row + keys.y);
  }
}

template <class S>
__device__ void load_tiles(Shared<S>& sh, const Launch& a, const CUtensorMap& q_map, const CUtensorMap& k_map,
                           const CUtensorMap& v_map) {
  Ring<S::stages> k_ring, v_ring;
  Ring<S::q_slots> q_ring;
  Ring<S::q_slots + 1> tile_ring;
  const int total = a.header[0];
  int taken = atomicAdd(a.header + 1, 1);
  for (;; q_ring.next(), tile_ring.next()) {
    const int q = q_ring.slot;
    barrier_wait(&sh.q_empty[q], q_ring.parity ^ 1);
    if (taken >= total) {
      sh.tile[tile_ring.slot].rows = sh.tile[tile_ring.slot].stages = 0;
      barrier_arrive(&sh.q_full[q]);
      return;
    }
    const Tile t = a.tiles[taken];
    taken = atomicAdd(a.header + 1, 1);  // asked for early: the answer takes a microsecond
    sh.tile[tile_ring.slot] = t;
    if (t.stages == 0) {
      barrier_arrive(&sh.q_full[q]);
      continue;
    }
    int4 keys = stage_keys<S>(a, t, 0), before = keys;
    if constexpr (S::plan) sh.first_keys[q] = keys;
    barrier_expect(&sh.q_full[q], S::q_bytes);
    for (int p = 0; p < S::panels; ++p) tma_load(sh.q[q] + p * S::rows * 128, &q_map, &sh.q_full[q], p * 64, t.q_row);
    for (int j = 0; j <= t.stages; ++j) {
      if (j < t.stages) {
        const int4 now = keys;
        if (j + 1 < t.stages) keys = stage_keys<S>(a, t, j + 1);
        const int slot = k_ring.slot;
        barrier_wait(&sh.k_empty[slot], k_ring.parity ^ 1);
        k_ring.next();
        if constexpr (S::plan) sh.keys[k_ring.slot] = keys;  // of the next stage: read while this one's products run
        load_stage<S>(sh.k[slot], k_map, &sh.k_full[slot], S::panels, t.k_row, now, a.k_rows);
        if (j == 0) {
          before = now;
          continue;
        }
        barrier_wait(&sh.v_empty[v_ring.slot], v_ring.parity ^ 1);
        load_stage<S>(sh.v[v_ring.slot], v_map, &sh.v_full[v_ring.slot], S::v_panels, t.v_row, before, a.v_rows);
        before = now;
      } else {
        barrier_wait(&sh.v_empty[v_ring.slot], v_ring.parity ^ 1);
        load_stage<S>(sh.v[v_ring.slot], v_map, &sh.v_full[v_ring.slot], S::v_panels, t.v_row, before, a.v_rows);
      }
      v_ring.next();
    }
  }
}

/// What one warpgroup keeps of its 64 rows; a thread holds two of them (see sm90.h).
template <class S>
struct Rows {
  float s[S::kN / 2];  // logits, then weights, of a stage
  float o[S::dv / 2];
  uint32_t p[S::kN / 4];  // weights in bf16: the A operand of P·V
  float top[2], sum[2], factor[2];
  bool rescale;
};

/// The keys of a stage's halves that the thread's two rows see, a bit each. Asked for while products run.
struct Seen {
  uint64_t bits[2][2];  // [row][half]
};

/// The first and the last key in sight of a row of the tile.
__device__ __forceinline__ int2 sight(const Launch& a, const Tile& t, int row) {
  const bool told = a.row_low && row < t.rows;
  return {told ? a.row_low[t.q_row + row] : t.low + row, min(t.m - 1, t.diagonal + row)};
}

/// `keys`: of the stage's halves; `row`: the thread's first row in the tile.
template <class S>
__device__ __forceinline__ Seen seen_keys(const Launch& a, const Tile& t, int4 keys, int row) {
  Seen out;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int2 in_sight = sight(a, t, row + 8 * r);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first = half ? keys.y : keys.x, mask = half ? keys.w : keys.z, low = in_sight.x - first,
                high = in_sight.y - first;
      uint64_t seen = high < 0 || low > 63 ? 0 : ~uint64_t(0) >> (63 - min(high, 63)) & ~uint64_t(0) << max(low, 0);
      if (mask >= 0 && row + 8 * r < t.rows) {
        const int64_t tile_row = int64_t(mask) * a.bit_rows + ((t.plan_row + row + 8 * r) >> a.bit_shift);
        seen &= a.k_tile == 64 ? a.bits[tile_row] : a.bits[tile_row * 2 + half];
      }
      out.bits[r][half] = seen >> (threadIdx.x % 4 * 2);
    }
  }
  return out;
}

/// Logits that a row does not see become −∞.
template <class S>
__device__ __forceinline__ void hide(Rows<S>& x, const Launch& a, const Tile& t, int4 keys, int row, const Seen& seen) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if constexpr (!S::plan) {
      const int2 in_sight = sight(a, t, row + 8 * r);
#pragma unroll
      for (int i = 0; i < S::kN / 8; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = keys.x + 8 * i + threadIdx.x % 4 * 2 + e;
          float& s = x.s[4 * i + 2 * r + e];
          s = key <= in_sight.y && key >= in_sight.x ? s : -INFINITY;
        }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& s = x.s[32 * half + 4 * i + 2 * r + e];
            s = seen.bits[r][half] >> (8 * i + e) & 1 ? s : -INFINITY;
          }
    }
  }
}

/// Logits → weights 2^(s·scale − top), sums. The reference `top` only follows the maximum when a weight would pass 2^8: sums and
/// outputs are f32, so nothing is lost, and outputs need rescaling rarely (Zadouri et al. 2026, FlashAttention-4).
template <bool Masked, class S>
__device__ __forceinline__ void softmax(Rows<S>& x, float scale) {
  float top[2];
  bool grows = false;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float a = x.s[2 * r], b = x.s[2 * r + 1];
#pragma unroll
    for (int i = 1; i < S::kN / 8; ++i) a = fmaxf(a, x.s[4 * i + 2 * r]), b = fmaxf(b, x.s[4 * i + 2 * r + 1]);
    a = fmaxf(a, b);
    a = fmaxf(a, __shfl_xor_sync(~0u, a, 1));
    a = fmaxf(a, __shfl_xor_sync(~0u, a, 2));
    top[r] = fmaxf(a, x.top[r]);
    grows |= (top[r] - x.top[r]) * scale > 8.f;
    x.factor[r] = 1;
  }
  x.rescale = __any_sync(~0u, grows);
  if (x.rescale) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      x.factor[r] = top[r] == -INFINITY ? 1.f : exp2_fast((x.top[r] - top[r]) * scale);
      x.top[r] = top[r];
      x.sum[r] *= x.factor[r];
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float base = Masked && x.top[r] == -INFINITY ? 0.f : x.top[r] * scale;
    float sums[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < S::kN / 8; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& s = x.s[4 * i + 2 * r + e];
        s = exp2_fast(fmaf(s, scale, -base));
        sums[e] += s;
      }
    x.sum[r] += sums[0] + sums[1];
  }
}

template <class S>
__device__ __forceinline__ void round_weights(Rows<S>& x) {
#pragma unroll
  for (int i = 0; i < S::kN / 4; ++i) x.p[i] = pack_bf16(x.s[2 * i], x.s[2 * i + 1]);
}

template <class S>
__device__ __forceinline__ void rescale(Rows<S>& x) {
  if (x.rescale)
#pragma unroll
    for (int i = 0; i < S::dv / 2; ++i) x.o[i] *= x.factor[i / 2 % 2];
}

/// S = Q·K^T. The first product overwrites.
template <class S>
__device__ __forceinline__ void score(Rows<S>& x, uint64_t q, uint64_t k) {
#pragma unroll
  for (int i = 0; i < S::d / 16; ++i) {
    const int panel = i / 4, step = i % 4 * 2;
    Product<S::kN>::shared_a(x.s, q + panel * (S::rows * 128 / 16) + step, k + panel * (S::kN * 128 / 16) + step, i > 0);
  }
}

/// O += P·V.
template <class S>
__device__ __forceinline__ void weigh(Rows<S>& x, uint64_t v, int accumulate) {
#pragma unroll
  for (int i = 0; i < S::kN / 16; ++i)
    Product<S::dv>::register_a(x.o, x.p + 4 * i, v + i * (2048 / 16), i > 0 ? 1 : accumulate);
}

/// Rows of V past the segment's end belong to others and may hold NaN, which a weight of 0 does not silence: zeros instead. Both
/// warpgroups write the same; each waits for its own writes only.
template <class S>
__device__ __forceinline__ void clear_tail(uint8_t* v, const Tile& t, int4 keys, int group) {
  const int thread = threadIdx.x % 128;
  for (int i = thread; i < S::v_panels * S::kN * 8; i += 128) {  // pieces of 16 bytes
    const int row = i / 8 % S::kN;
    const int key = S::plan && row >= 64 ? keys.y + row - 64 : keys.x + row;
    if (key >= t.m) reinterpret_cast<int4*>(v)[i] = {0, 0, 0, 0};
  }
  proxy_fence();
  named_sync(8 + group, 128);
}

template <class S>
__device__ __forceinline__ bool past_end(int m, int4 keys) {
  return keys.x + S::kN > m || (S::plan && keys.y + 64 > m);
}

/// Normalised outputs and lse of a tile's rows.
template <class S>
__device__ __forceinline__ void write_rows(const Rows<S>& x, const Launch& a, const Tile& t, const float (&top)[2],
                                           const float (&sums)[2], int row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = sums[r];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    float log2_sum = top[r] == -INFINITY ? -INFINITY : fmaf(top[r], a.scale_log2, __log2f(sum));
    float gain = sum > 0 ? 1 / sum : 0;
    if (a.sink) {  // one more weight in the denominator
      const float sink = a.sink[t.head] * 1.4426950408889634f;
      const float high = fmaxf(sink, log2_sum);
      const float all = high == -INFINITY ? high : high + __log2f(exp2_fast(sink - high) + exp2_fast(log2_sum - high));
      gain = log2_sum == -INFINITY ? 0 : gain * exp2_fast(log2_sum - all);
      log2_sum = all;
    }
    if (row + 8 * r >= t.rows) continue;
    const int64_t at = t.q_row + row + 8 * r;
    float* out = a.out + at * a.out_stride + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < S::dv / 8; ++i)
      *reinterpret_cast<float2*>(out + 8 * i) = {x.o[4 * i + 2 * r] * gain, x.o[4 * i + 2 * r + 1] * gain};
    if (a.lse && lane % 4 == 0) a.lse[at] = log2_sum * 0.6931471805599453f;
  }
}

/// What a warpgroup knows of where it stands.
template <class S>
struct Place {
  Ring<S::stages> k_ring, v_ring;
  uint64_t k, v;   // descriptors of slot 0
  int group, row;  // the thread's first row in the tile
};

template <class S>
__device__ __forceinline__ void release(uint64_t* empty, Ring<S::stages>& ring) {
  if (threadIdx.x % 32 == 0) barrier_arrive(empty + ring.slot);
  ring.next();
}

/// Goes on to the keys of the next stage.
template <class S>
__device__ __forceinline__ void next_keys(int4& keys, const Shared<S>& sh, const Place<S>& at) {
  if constexpr (S::plan) keys = uniform(sh.keys[(at.k_ring.slot + 1) % S::stages]);
  else keys.x -= S::kN;
}

/// One turn of the pipeline: scores of a stage, outputs of the stage before and, under these, the softmax of the scores. With `Last`
/// the stage before was the last of tile `old`, whose rows are written. `keys` becomes those of the next stage.
template <bool Masked, bool Last, class S>
__device__ __forceinline__ void step(Rows<S>& x, Shared<S>& sh, const Launch& a, const Tile& t, const Tile& old,
                                     int4& keys, Place<S>& at, uint64_t q, int accumulate) {
  if constexpr (S::turns) named_sync(1 + at.group, 256);
  wgmma_fence();
  score(x, q, at.k + at.k_ring.slot * (S::k_bytes / 16));
  wgmma_commit();
  barrier_wait(&sh.v_full[at.v_ring.slot], at.v_ring.parity);
  pin(x.p), pin(x.o);
  wgmma_fence();
  weigh(x, at.v + at.v_ring.slot * (S::v_bytes / 16), accumulate);
  wgmma_commit();
  if constexpr (S::turns) named_arrive(1 + (at.group + 1) % S::groups, 256);
  const int4 now = keys;
  next_keys<S>(keys, sh, at);
  Seen seen;
  if constexpr (Masked && S::plan) seen = seen_keys<S>(a, t, now, at.row);
  float top[2], sum[2];
  if constexpr (Last)
    for (int r = 0; r < 2; ++r) top[r] = x.top[r], sum[r] = x.sum[r], x.top[r] = -INFINITY, x.sum[r] = 0;
  wgmma_wait<1>();
  pin(x.s);
  release<S>(sh.k_empty, at.k_ring);
  if constexpr (Masked) hide(x, a, t, now, at.row, seen);
  softmax<Masked>(x, a.scale_log2);
  wgmma_wait<0>();
  pin(x.o);
  release<S>(sh.v_empty, at.v_ring);
  if constexpr (Last) write_rows(x, a, old, top, sum, at.row);
  else rescale(x);
  round_weights(x);
}

template <class S>
__device__ void multiply_tiles(Shared<S>& sh, const Launch& a, int group) {
  const int lane = threadIdx.x % 32;
  Place<S> at;
  at.k = descriptor_k(sh.k[0]), at.v = descriptor_mn(sh.v[0], S::kN * 128);
  at.group = group, at.row = group * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;
  const uint64_t q0 = descriptor_k(sh.q[0] + group * 64 * 128);
  Ring<S::q_slots> q_ring;
  Ring<S::q_slots + 1> tile_ring;
  if (S::turns && group == S::groups - 1) named_arrive(1, 256);
  Rows<S> x;
  int4 keys = {0, 0, 0, 0}, v_keys = keys;  // of the stage whose scores come next, of the one whose outputs do
  bool pending = false;                     // the outputs of the last stage of tile `old` are still to come
  int old = 0, m = 0;
  bool more = false;  // it is not its only stage
  auto clear = [&](const Tile& t) {
    if (!past_end<S>(m, v_keys)) return;
    barrier_wait(&sh.v_full[at.v_ring.slot], at.v_ring.parity);
    clear_tail<S>(sh.v[at.v_ring.slot], t, v_keys, group);
  };
  auto finish = [&] {
    clear(sh.tile[old]);
    barrier_wait(&sh.v_full[at.v_ring.slot], at.v_ring.parity);
    pin(x.p), pin(x.o);
    wgmma_fence();
    weigh(x, at.v + at.v_ring.slot * (S::v_bytes / 16), more);
    wgmma_commit();
    wgmma_wait<0>();
    pin(x.o);
    release<S>(sh.v_empty, at.v_ring);
    write_rows(x, a, sh.tile[old], x.top, x.sum, at.row);
    pending = false;
  };
  for (;; q_ring.next(), tile_ring.next()) {
    if (S::q_slots == 1 && pending) finish();
    barrier_wait(&sh.q_full[q_ring.slot], q_ring.parity);
    const Tile& t = sh.tile[tile_ring.slot];
    const int stages = uniform(t.stages);
    if (S::q_slots > 1 && pending && stages == 0) finish();
    if (uniform(t.rows) == 0) break;
    if (stages == 0) {
#pragma unroll
      for (int i = 0; i < S::dv / 2; ++i) x.o[i] = 0;
      for (int r = 0; r < 2; ++r) x.top[r] = -INFINITY, x.sum[r] = 0;
      write_rows(x, a, t, x.top, x.sum, at.row);
      __syncwarp();
      if (lane == 0) barrier_arrive(&sh.q_empty[q_ring.slot]);
      continue;
    }
    const uint64_t q = q0 + q_ring.slot * (S::q_bytes / 16);
    keys = S::plan ? uniform(sh.first_keys[q_ring.slot]) : int4{uniform(t.first + t.entries - 1) * S::kN, 0, -1, -1};
    if (pending) clear(sh.tile[old]);
    m = uniform(t.m), v_keys = keys;
    const int last = min(m - 1, uniform(t.diagonal) + group * 64) - 63, low = uniform(t.low) + group * 64 + 63;
    barrier_wait(&sh.k_full[at.k_ring.slot], at.k_ring.parity);
    if (pending) {
      step<true, true>(x, sh, a, t, sh.tile[old], keys, at, q, more);
    } else {
      wgmma_fence();
      score(x, q, at.k + at.k_ring.slot * (S::k_bytes / 16));
      wgmma_commit();
      for (int r = 0; r < 2; ++r) x.top[r] = -INFINITY, x.sum[r] = 0;
      next_keys<S>(keys, sh, at);
      Seen seen;
      if constexpr (S::plan) seen = seen_keys<S>(a, t, v_keys, at.row);
      wgmma_wait<0>();
      pin(x.s);
      release<S>(sh.k_empty, at.k_ring);
      hide(x, a, t, v_keys, at.row, seen);
      softmax<true>(x, a.scale_log2);
      round_weights(x);
    }
    for (int j = 1; j < stages; ++j) {
      clear(t);
      v_keys = keys;
      barrier_wait(&sh.k_full[at.k_ring.slot], at.k_ring.parity);
      const bool masked = S::plan ? keys.x > last || keys.y > last || keys.x < low || keys.y < low || keys.z >= 0 ||
                                        keys.w >= 0
                                  : keys.x > last - (S::kN - 64) || keys.x < low;
      if (masked) step<true, false>(x, sh, a, t, t, keys, at, q, j > 1);
      else step<false, false>(x, sh, a, t, t, keys, at, q, j > 1);
    }
    if (lane == 0) barrier_arrive(&sh.q_empty[q_ring.slot]);
    old = tile_ring.slot, more = stages > 1, pending = true;
  }
}

template <class S>
__global__ void __launch_bounds__(S::threads, 1)
    attend_kernel(const Launch a, const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                  const __grid_constant__ CUtensorMap v_map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // the build also makes PTX for GPUs that lack all this; nothing starts it there
  extern __shared__ uint8_t memory[];
  Shared<S>& sh = *reinterpret_cast<Shared<S>*>((reinterpret_cast<uintptr_t>(memory) + 1023) & ~uintptr_t(1023));
  const int group = uniform(threadIdx.x / 128);
  if (threadIdx.x == 0) {
    prefetch_map(&q_map), prefetch_map(&k_map), prefetch_map(&v_map);
    for (int i = 0; i < S::q_slots; ++i) barrier_init(&sh.q_full[i], 1), barrier_init(&sh.q_empty[i], 4 * S::groups);
    for (int i = 0; i < S::stages; ++i) {
      barrier_init(&sh.k_full[i], 1), barrier_init(&sh.v_full[i], 1);
      barrier_init(&sh.k_empty[i], 4 * S::groups), barrier_init(&sh.v_empty[i], 4 * S::groups);
    }
    barrier_init_fence();
  }
  __syncthreads();
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (group == 0) {
    registers_down<S::loader_registers>();
    if (threadIdx.x == 0) load_tiles<S>(sh, a, q_map, k_map, v_map);
  } else {
    registers_up<S::registers>();
    multiply_tiles<S>(sh, a, group - 1);
  }
#endif
}

}  // namespace heed::sm90
