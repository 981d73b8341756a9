// The kernel of attend_sm90.cu. One warp loads (TMA), two or three warpgroups of 64 query rows each multiply (wgmma) and keep the
// softmax in registers. The product Q·K of a stage is under way together with P·V of the stage before, and the softmax of one
// warpgroup runs under the products of the other, which a token passed by named barriers arranges (Shah et al. 2024, FlashAttention-3).
#pragma once
#include "kernels/cuda/attend_sm90.h"
#include "kernels/cuda/sm90.h"

namespace heed::sm90 {

/// A tile of query rows and the keys it reads; made by schedule_tiles.
struct alignas(16) Tile {
  int q_row, rows;     // first row of q.values, rows of the segment in the tile
  int k_row, v_row;    // first rows of the segment's keys and values
  int m;               // its keys
  int diagonal;        // row r of the tile sees keys ≤ diagonal + r
  int low;             // and ≥ low + r
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
  const int32_t *index, *mask;
  const uint64_t* bits;
  int q_tile, k_tile;
  int k_rows, v_rows;
};

template <int D, int DV, int KN, int Groups, int Stages, bool Plan, bool Turns, int Poly>
struct Shape {
  static constexpr int d = D, dv = DV, kN = KN, groups = Groups, stages = Stages;
  static constexpr bool plan = Plan, turns = Turns;
  static constexpr int poly = Poly;  // one pair of exponentials in `poly` goes to the FMA pipe; 0: none
  static constexpr int rows = 64 * Groups;
  static constexpr int threads = 128 * (Groups + 1);
  static constexpr int panels = (D + 63) / 64, v_panels = (DV + 63) / 64;
  static constexpr int q_bytes = panels * rows * 128, k_bytes = panels * KN * 128, v_bytes = v_panels * KN * 128;
  static constexpr int registers = Groups == 2 ? 240 : 160, loader_registers = Groups == 2 ? 24 : 32;
};

template <class S>
struct Shared {
  alignas(1024) uint8_t q[S::q_bytes];
  alignas(1024) uint8_t k[S::stages][S::k_bytes];
  alignas(1024) uint8_t v[S::stages][S::v_bytes];
  Tile tile;
  int4 keys[S::stages];  // plan: first key of either half of a stage, tile of bits of either
  uint64_t q_full, q_empty, k_full[S::stages], k_empty[S::stages], v_full[S::stages], v_empty[S::stages];
};

/// The same value, known to the compiler to be equal in a warp: wgmma is serialised where control flow could diverge.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }
__device__ __forceinline__ int4 uniform(int4 x) { return {uniform(x.x), uniform(x.y), uniform(x.z), uniform(x.w)}; }
__device__ __forceinline__ Tile uniform(const Tile& t) {
  return {uniform(t.q_row),    uniform(t.rows), uniform(t.k_row), uniform(t.v_row), uniform(t.m),       uniform(t.diagonal), uniform(t.low), uniform(t.head),
          uniform(t.first), uniform(t.entries), uniform(t.stages), uniform(t.plan_row)};
}

/// Which stage of a ring and which phase the i-th use is.
template <int Stages>
struct Ring {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++slot == Stages) slot = 0, parity ^= 1;
  }
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

template <class S>
__device__ void load_tiles(Shared<S>& sh, const Launch& a, const CUtensorMap& q_map, const CUtensorMap& k_map, const CUtensorMap& v_map) {
  Ring<S::stages> k_ring, v_ring;
  const int total = a.header[0];
  int taken = atomicAdd(a.header + 1, 1);
  for (uint32_t turn = 0;; ++turn) {
    barrier_wait(&sh.q_empty, (turn & 1) ^ 1);
    if (taken >= total) {
      sh.tile.rows = 0;
      barrier_arrive(&sh.q_full);
      return;
    }
    const Tile t = a.tiles[taken];
    sh.tile = t;
    taken = atomicAdd(a.header + 1, 1);  // asked for early: the answer takes a microsecond
    if (t.stages == 0) {
      barrier_arrive(&sh.q_full);
      continue;
    }
    barrier_expect(&sh.q_full, S::q_bytes);
    for (int p = 0; p < S::panels; ++p) tma_load(sh.q + p * S::rows * 128, &q_map, &sh.q_full, p * 64, t.q_row);
    int4 keys = stage_keys<S>(a, t, 0);
    for (int j = 0;; ++j) {
      int4 before = keys;
      if (j < t.stages) {
        if (j > 0) keys = stage_keys<S>(a, t, j);
        barrier_wait(&sh.k_empty[k_ring.slot], k_ring.parity ^ 1);
        if constexpr (S::plan) sh.keys[k_ring.slot] = keys;
        barrier_expect(&sh.k_full[k_ring.slot], S::k_bytes);
        uint8_t* to = sh.k[k_ring.slot];
        for (int p = 0; p < S::panels; ++p)
          if constexpr (S::plan) {
            tma_load(to + p * S::kN * 128, &k_map, &sh.k_full[k_ring.slot], p * 64, t.k_row + keys.x);
            tma_load(to + p * S::kN * 128 + 64 * 128, &k_map, &sh.k_full[k_ring.slot], p * 64, keys.y == kNoKey ? a.k_rows : t.k_row + keys.y);
          } else {
            tma_load(to + p * S::kN * 128, &k_map, &sh.k_full[k_ring.slot], p * 64, t.k_row + keys.x);
          }
        k_ring.next();
      }
      if (j > 0) {
        barrier_wait(&sh.v_empty[v_ring.slot], v_ring.parity ^ 1);
        barrier_expect(&sh.v_full[v_ring.slot], S::v_bytes);
        uint8_t* to = sh.v[v_ring.slot];
        for (int p = 0; p < S::v_panels; ++p)
          if constexpr (S::plan) {
            tma_load(to + p * S::kN * 128, &v_map, &sh.v_full[v_ring.slot], p * 64, t.v_row + before.x);
            tma_load(to + p * S::kN * 128 + 64 * 128, &v_map, &sh.v_full[v_ring.slot], p * 64, before.y == kNoKey ? a.v_rows : t.v_row + before.y);
          } else {
            tma_load(to + p * S::kN * 128, &v_map, &sh.v_full[v_ring.slot], p * 64, t.v_row + before.x);
          }
        v_ring.next();
      }
      if (j == t.stages) break;
    }
  }
}

/// What one warpgroup keeps of its 64 rows; a thread holds two of them (see sm90.h).
template <class S>
struct Rows {
  float s[S::kN / 2];       // logits, then weights, of a stage
  float o[S::dv / 2];
  uint32_t p[S::kN / 4];    // weights in bf16: the A operand of P·V
  float top[2], sum[2], factor[2];
  bool rescale;
};

/// Logits that a row does not see become −∞. `keys`: of the stage's halves; `row`: the thread's first row in the tile.
template <class S>
__device__ __forceinline__ void hide(Rows<S>& x, const Launch& a, const Tile& t, int4 keys, int row) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int last = min(t.m - 1, t.diagonal + row + 8 * r), low = t.low + row + 8 * r;
    if constexpr (!S::plan) {
#pragma unroll
      for (int i = 0; i < S::kN / 8; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = keys.x + 8 * i + column + e;
          float& s = x.s[4 * i + 2 * r + e];
          s = key <= last && key >= low ? s : -INFINITY;
        }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int first = half ? keys.y : keys.x, mask = half ? keys.w : keys.z;
        uint64_t seen = ~uint64_t(0);
        const int tile_row = t.plan_row + row + 8 * r;
        if (mask >= 0 && row + 8 * r < t.rows)
          seen = a.k_tile == 64 ? a.bits[int64_t(mask) * a.q_tile + tile_row] : a.bits[(int64_t(mask) * a.q_tile + tile_row) * 2 + half];
        seen >>= column;
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int key = first + 8 * i + column + e;
            float& s = x.s[32 * half + 4 * i + 2 * r + e];
            s = key <= last && key >= low && (seen >> (8 * i + e) & 1) ? s : -INFINITY;
          }
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
        const float y = fmaf(s, scale, -base);
        if constexpr (!Masked && S::poly > 0)
          s = i % S::poly == S::poly - 1 ? exp2_polynomial(y) : exp2_fast(y);
        else
          s = exp2_fast(y);
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
  for (int i = 0; i < S::kN / 16; ++i) Product<S::dv>::register_a(x.o, x.p + 4 * i, v + i * (2048 / 16), i > 0 ? 1 : accumulate);
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
__device__ __forceinline__ bool past_end(const Tile& t, int4 keys) {
  return keys.x + S::kN > t.m || (S::plan && keys.y + 64 > t.m);
}

/// Stages of the loop behind the first: scores of this one and outputs of the one before.
template <bool Masked, class S>
__device__ __forceinline__ void step(Rows<S>& x, Shared<S>& sh, const Launch& a, const Tile& t, int4 keys, Ring<S::stages>& k_ring,
                                     Ring<S::stages>& v_ring, uint64_t q, uint64_t k, uint64_t v, int accumulate, int group, int row) {
  if constexpr (S::turns) named_sync(1 + group, 256);
  wgmma_fence();
  score(x, q, k + k_ring.slot * (S::k_bytes / 16));
  wgmma_commit();
  barrier_wait(&sh.v_full[v_ring.slot], v_ring.parity);
  pin(x.p), pin(x.o);
  wgmma_fence();
  weigh(x, v + v_ring.slot * (S::v_bytes / 16), accumulate);
  wgmma_commit();
  if constexpr (S::turns) named_arrive(1 + (group + 1) % S::groups, 256);
  wgmma_wait<1>();
  pin(x.s);
  if (threadIdx.x % 32 == 0) barrier_arrive(&sh.k_empty[k_ring.slot]);
  k_ring.next();
  if constexpr (Masked) hide(x, a, t, keys, row);
  softmax<Masked>(x, a.scale_log2);
  wgmma_wait<0>();
  pin(x.o);
  if (threadIdx.x % 32 == 0) barrier_arrive(&sh.v_empty[v_ring.slot]);
  v_ring.next();
  rescale(x);
  round_weights(x);
}

template <class S>
__device__ void multiply_tiles(Shared<S>& sh, const Launch& a, int group) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int row = group * 64 + warp * 16 + lane / 4;
  const uint64_t q = descriptor_k(sh.q + group * 64 * 128), k = descriptor_k(sh.k[0]), v = descriptor_mn(sh.v[0], S::kN * 128);
  Ring<S::stages> k_ring, v_ring;
  if (S::turns && group == S::groups - 1) named_arrive(1, 256);
  Rows<S> x;
  for (uint32_t turn = 0;; ++turn) {
    barrier_wait(&sh.q_full, turn & 1);
    const Tile t = uniform(sh.tile);
    if (t.rows == 0) break;
#pragma unroll
    for (int r = 0; r < 2; ++r) x.top[r] = -INFINITY, x.sum[r] = 0;
    if (t.stages > 0) {
      auto keys_of = [&](int j) { return S::plan ? uniform(sh.keys[k_ring.slot]) : stage_keys<S>(a, t, j); };
      auto masked = [&](int4 keys) {
        const int last = min(t.m - 1, t.diagonal + group * 64) - 63, low = t.low + group * 64 + 63;
        if constexpr (!S::plan) return keys.x > last - (S::kN - 64) || keys.x < low;
        return keys.x > last || keys.y > last || keys.x < low || keys.y < low || keys.z >= 0 || keys.w >= 0;
      };
      barrier_wait(&sh.k_full[k_ring.slot], k_ring.parity);
      int4 keys = keys_of(0);
      wgmma_fence();
      score(x, q, k + k_ring.slot * (S::k_bytes / 16));
      wgmma_commit();
      wgmma_wait<0>();
      pin(x.s);
      if (lane == 0) barrier_arrive(&sh.k_empty[k_ring.slot]);
      k_ring.next();
      if (masked(keys)) hide(x, a, t, keys, row);
      softmax<true>(x, a.scale_log2);
      round_weights(x);
      for (int j = 1; j < t.stages; ++j) {
        const bool tail = past_end<S>(t, keys);
        if (tail) {
          barrier_wait(&sh.v_full[v_ring.slot], v_ring.parity);
          clear_tail<S>(sh.v[v_ring.slot], t, keys, group);
        }
        barrier_wait(&sh.k_full[k_ring.slot], k_ring.parity);
        keys = keys_of(j);
        if (masked(keys))
          step<true>(x, sh, a, t, keys, k_ring, v_ring, q, k, v, j > 1, group, row);
        else
          step<false>(x, sh, a, t, keys, k_ring, v_ring, q, k, v, j > 1, group, row);
      }
      if (lane == 0) barrier_arrive(&sh.q_empty);  // the next rows may come while these end
      barrier_wait(&sh.v_full[v_ring.slot], v_ring.parity);
      if (past_end<S>(t, keys)) clear_tail<S>(sh.v[v_ring.slot], t, keys, group);
      pin(x.p), pin(x.o);
      wgmma_fence();
      weigh(x, v + v_ring.slot * (S::v_bytes / 16), t.stages > 1);
      wgmma_commit();
      wgmma_wait<0>();
      pin(x.o);
      if (lane == 0) barrier_arrive(&sh.v_empty[v_ring.slot]);
      v_ring.next();
    } else {
      __syncwarp();
      if (lane == 0) barrier_arrive(&sh.q_empty);
#pragma unroll
      for (int i = 0; i < S::dv / 2; ++i) x.o[i] = 0;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = x.sum[r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      float log2_sum = x.top[r] == -INFINITY ? -INFINITY : fmaf(x.top[r], a.scale_log2, __log2f(sum));
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
}

template <class S>
__global__ void __launch_bounds__(S::threads, 1)
    attend_kernel(const Launch a, const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map) {
  extern __shared__ uint8_t memory[];
  Shared<S>& sh = *reinterpret_cast<Shared<S>*>((reinterpret_cast<uintptr_t>(memory) + 1023) & ~uintptr_t(1023));
  const int group = uniform(threadIdx.x / 128);
  if (threadIdx.x == 0) {
    prefetch_map(&q_map), prefetch_map(&k_map), prefetch_map(&v_map);
    barrier_init(&sh.q_full, 1), barrier_init(&sh.q_empty, 4 * S::groups);
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
}

}  // namespace heed::sm90
