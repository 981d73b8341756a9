// proxy_reduce on Hopper: softmax weights summed without being written. Blocks take one pass over the products: each row
// leaves a maximum and the sum of its weights for every group of keys; what the row's whole sum is shows at the end, when
// rows and groups are put together. Columns take two: the sum of each row, then keys against rows.
#include <cmath>

#include "kernels/cuda/proxy.cuh"
#include "kernels/cuda/sm90.h"
#include "kernels/cuda/tensor_map.h"

namespace heed::cuda {
namespace {

using namespace sm90;

constexpr int kGroups = 3, kStages = 4, kKeys = 128, kRowsOfTile = 64 * kGroups, kThreads = 128 * kGroups + 32;

struct BlockScores {
  Scored from;  // its cells are those of out
  Reduce how;
  int group;  // keys whose weights a row adds up
  // Of segment s from part(s) on: [groups][rows, whole blocks of them]: maximum in powers of two, sum relative to it.
  float2* parts;
  float* lse;  // or, of each row of q, the logarithm of its sum, in powers of two; ∞ where it sees nothing
  float scale_log2;

  __device__ int blocks_across(int cols) const { return (cols + how.col_block - 1) / how.col_block; }
  __device__ int64_t padded_rows(int rows) const {
    return int64_t(rows + how.row_block - 1) / how.row_block * how.row_block;
  }
  __device__ int64_t part(int s) const { return from.at.begin(s) * how.row_block * (how.col_block / group); }
};

/// A block's stages in shared memory, with barriers for a loading warp and kGroups warpgroups that multiply.
template <class Stages>
__device__ __forceinline__ Stages& open_stages() {
  extern __shared__ uint8_t memory[];
  auto& sh = *reinterpret_cast<Stages*>((reinterpret_cast<uintptr_t>(memory) + 1023) & ~uintptr_t(1023));
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) barrier_init(&sh.full[i], 1), barrier_init(&sh.empty[i], 4 * kGroups);
    barrier_init_fence();
  }
  __syncthreads();
  return sh;
}

template <int D>
struct SharedKeys {
  alignas(1024) uint8_t k[kStages][D / 64 * kKeys * 128];
  uint64_t full[kStages], empty[kStages];
};

/// What a lane holds of its rows' channels as the A operand; row(r) → the number of a row of q, or −1.
template <int D, class Row>
__device__ inline void load_queries(uint32_t (&x)[D / 16][4], const Matrix& q, Row row) {
  const int lane = threadIdx.x % 32;
  const int64_t rows[2] = {row(lane / 4), row(lane / 4 + 8)};
#pragma unroll
  for (int step = 0; step < D / 16; ++step)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t r = rows[e % 2];
      const int c = 16 * step + 8 * (e / 2) + 2 * (lane % 4);
      if (r < 0) {
        x[step][e] = 0;
      } else if (q.type == Dtype::F32) {
        const float2 two = *reinterpret_cast<const float2*>(q.row<const float>(r) + c);
        x[step][e] = pack_bf16(two.x, two.y);
      } else {
        x[step][e] = *reinterpret_cast<const uint32_t*>(q.row<const __nv_bfloat16>(r) + c);
      }
    }
}

/// Logits of keys from `first` on that a row does not see become −∞.
[[maybe_unused]] __device__ __forceinline__ void hide_keys(float (&x)[kKeys / 2], int first, const int (&seen)[2]) {
#pragma unroll
  for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (first + 8 * i + int(threadIdx.x) % 4 * 2 + e % 2 >= seen[e / 2]) x[4 * i + e] = -INFINITY;
}

/// The largest logit of the thread's row r among kKeys keys or, with bounds, some of them.
template <int From = 0, int To = kKeys>
__device__ __forceinline__ float largest(const float (&x)[kKeys / 2], int r) {
  float top = -INFINITY;
#pragma unroll
  for (int i = From / 8; i < To / 8; ++i) top = fmaxf(top, fmaxf(x[4 * i + 2 * r], x[4 * i + 2 * r + 1]));
  top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
  return fmaxf(top, __shfl_xor_sync(~0u, top, 2));
}

/// The thread's share of the weights of row r for keys From … To − 1.
template <int From, int To>
__device__ __forceinline__ float weights(const float (&x)[kKeys / 2], int r, float scale, float base) {
  float sum = 0;
#pragma unroll
  for (int i = From / 8; i < To / 8; ++i)
    sum += exp2_fast(fmaf(x[4 * i + 2 * r], scale, -base)) + exp2_fast(fmaf(x[4 * i + 2 * r + 1], scale, -base));
  return sum;
}

/// What rows `own` and own + 8 leave for the groups of key tile j. Groups of fewer than 64 keys share a maximum.
template <int Group, int From = 0>
__device__ __forceinline__ void write_groups(const BlockScores& a, const float (&x)[kKeys / 2], int j, int own, int rows,
                                             int cols, int64_t high, float2* parts, const float* shared_top = nullptr) {
  if constexpr (From < kKeys) {
    constexpr bool shares = Group < 64;
    float tops[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float top = !shares ? largest<From, From + Group>(x, r) : shared_top ? shared_top[r] : largest(x, r);
      tops[r] = top;
      const float base = top == -INFINITY ? 0 : top * a.scale_log2;
      float sum = weights<From, From + Group>(x, r, a.scale_log2, base);
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const int64_t column = int64_t(j) * (kKeys / Group) + From / Group;
      if (threadIdx.x % 4 == 0 && own + 8 * r < rows && column * Group < cols)
        parts[column * high + 8 * r] = {top == -INFINITY ? top : base, sum};
    }
    write_groups<Group, From + Group>(a, x, j, own, rows, cols, high, parts, tops);
  }
}

/// Grid: tiles of rows, the last (which see most) first; segments of q. Group 0: lse.
template <int D, int Group>
__global__ void __launch_bounds__(kThreads, 1)
    block_scores_kernel(const __grid_constant__ BlockScores a, const __grid_constant__ CUtensorMap k_map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const int s = blockIdx.y, rows = a.from.qs.length(s), kv = a.from.keys_of(s), cols = a.from.ks.length(kv);
  const int first_row = ((rows + kRowsOfTile - 1) / kRowsOfTile - 1 - int(blockIdx.x)) * kRowsOfTile;
  if (first_row < 0) return;
  const int stages = uniform((a.from.seen(min(first_row + kRowsOfTile, rows) - 1, cols) + kKeys - 1) / kKeys);
  auto& sh = open_stages<SharedKeys<D>>();
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  Ring<kStages> ring;
  if (warp == 4 * kGroups) {
    if (lane != 0) return;
    for (int j = 0; j < stages; ++j, ring.next()) {
      barrier_wait(&sh.empty[ring.slot], ring.parity ^ 1);
      barrier_expect(&sh.full[ring.slot], D / 64 * kKeys * 128);
      for (int p = 0; p < D / 64; ++p)
        tma_load(sh.k[ring.slot] + p * kKeys * 128, &k_map, &sh.full[ring.slot], 64 * p, int(a.from.ks.begin(kv)) + j * kKeys);
    }
    return;
  }
  const int own = first_row + 16 * warp + lane / 4;  // the thread's first row; the other is 8 further
  uint32_t q[D / 16][4];
  load_queries<D>(q, a.from.q, [&](int r) {
    const int i = first_row + 16 * warp + r;
    return i < rows ? a.from.qs.begin(s) + i : int64_t(-1);
  });
  const int seen[2] = {a.from.seen(own, cols), a.from.seen(own + 8, cols)},
            whole = uniform(a.from.seen(first_row + 64 * (warp / 4), cols));
  const int64_t high = a.padded_rows(rows);
  float2* parts = a.parts + a.part(s) + own;
  const uint64_t keys = descriptor_k(sh.k[0]);
  float x[kKeys / 2], top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  for (int j = 0; j < stages; ++j) {
    barrier_wait(&sh.full[ring.slot], ring.parity);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < D / 16; ++step)
      Product<kKeys>::register_a_k(
          x, q[step], keys + ring.slot * (D / 64 * kKeys * 128 / 16) + step / 4 * (kKeys * 128 / 16) + step % 4 * 2,
          step > 0);
    wgmma_commit();
    wgmma_wait<0>();
    pin(x);
    if (lane == 0) barrier_arrive(&sh.empty[ring.slot]);
    ring.next();
    if ((j + 1) * kKeys > whole) hide_keys(x, j * kKeys, seen);
    if constexpr (Group == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float highest = fmaxf(top[r], largest(x, r) * a.scale_log2), base = highest == -INFINITY ? 0 : highest;
        sum[r] = sum[r] * exp2_fast(top[r] - base) + weights<0, kKeys>(x, r, a.scale_log2, base);
        top[r] = highest;
      }
    } else {
      write_groups<Group>(a, x, j, own, rows, cols, high, parts);
    }
  }
  if constexpr (Group == 0)
    for (int r = 0; r < 2; ++r) {
      float all = sum[r];
      all += __shfl_xor_sync(~0u, all, 1);
      all += __shfl_xor_sync(~0u, all, 2);
      if (lane % 4 == 0 && own + 8 * r < rows)
        a.lse[a.from.qs.begin(s) + own + 8 * r] = all > 0 ? top[r] + log2f(all) : INFINITY;
    }
#endif
}

/// Both sides in chunks of 64 channels.
struct SharedChunks {
  alignas(1024) uint8_t q[kStages][kRowsOfTile * 128];
  alignas(1024) uint8_t k[kStages][kKeys * 128];
  uint64_t full[kStages], empty[kStages];
};

/// As block_scores_kernel, of bf16 rows of any multiple of 128 channels.
template <int Group>
__global__ void __launch_bounds__(kThreads, 1)
    wide_scores_kernel(const __grid_constant__ BlockScores a, const __grid_constant__ CUtensorMap q_map,
                       const __grid_constant__ CUtensorMap k_map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const int s = blockIdx.y, rows = a.from.qs.length(s), kv = a.from.keys_of(s), cols = a.from.ks.length(kv),
            chunks = a.from.q.width / 64;
  const int first_row = ((rows + kRowsOfTile - 1) / kRowsOfTile - 1 - int(blockIdx.x)) * kRowsOfTile;
  if (first_row < 0) return;
  const int tiles = uniform((a.from.seen(min(first_row + kRowsOfTile, rows) - 1, cols) + kKeys - 1) / kKeys);
  auto& sh = open_stages<SharedChunks>();
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  Ring<kStages> ring;
  if (warp == 4 * kGroups) {
    if (lane != 0) return;
    for (int j = 0; j < tiles; ++j)
      for (int c = 0; c < chunks; ++c, ring.next()) {
        barrier_wait(&sh.empty[ring.slot], ring.parity ^ 1);
        barrier_expect(&sh.full[ring.slot], (kRowsOfTile + kKeys) * 128);
        tma_load(sh.q[ring.slot], &q_map, &sh.full[ring.slot], 64 * c, int(a.from.qs.begin(s)) + first_row);
        tma_load(sh.k[ring.slot], &k_map, &sh.full[ring.slot], 64 * c, int(a.from.ks.begin(kv)) + j * kKeys);
      }
    return;
  }
  const int own = first_row + 16 * warp + lane / 4;
  const int seen[2] = {a.from.seen(own, cols), a.from.seen(own + 8, cols)},
            whole = uniform(a.from.seen(first_row + 64 * (warp / 4), cols));
  const int64_t high = a.padded_rows(rows);
  float2* parts = a.parts + a.part(s) + own;
  const uint64_t q0 = descriptor_k(sh.q[0] + warp / 4 * 64 * 128), k0 = descriptor_k(sh.k[0]);
  float x[kKeys / 2];
  for (int j = 0; j < tiles; ++j) {
    // No product is under way from one turn to the next: the other warpgroups fill the gap.
    for (int c = 0; c < chunks; c += 2) {
      barrier_wait(&sh.full[ring.slot], ring.parity), barrier_wait(&sh.full[ring.slot + 1], ring.parity);  // kStages is even
      wgmma_fence();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int slot = ring.slot + half;
#pragma unroll
        for (int step = 0; step < 4; ++step)
          Product<kKeys>::shared_a(x, q0 + slot * (kRowsOfTile * 128 / 16) + 2 * step,
                                   k0 + slot * (kKeys * 128 / 16) + 2 * step, c + half + step > 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
      pin(x);
      if (lane == 0) barrier_arrive(&sh.empty[ring.slot]), barrier_arrive(&sh.empty[ring.slot + 1]);
      ring.next(), ring.next();
    }
    if ((j + 1) * kKeys > whole) hide_keys(x, j * kKeys, seen);
    write_groups<Group>(a, x, j, own, rows, cols, high, parts);
  }
#endif
}

template <int D>
struct SharedRows {
  alignas(1024) uint8_t q[kStages][D / 64 * kKeys * 128];
  float lse[kStages][kKeys];
  uint64_t full[kStages], empty[kStages];
};

/// Sums over rows: keys in registers, rows of bf16 pass. Grid: tiles of keys, the first (which most rows see) first;
/// segments of q.
template <int D>
__global__ void __launch_bounds__(kThreads, 1)
    column_sums_kernel(const __grid_constant__ BlockScores a, const __grid_constant__ CUtensorMap q_map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const int s = blockIdx.y, rows = a.from.qs.length(s), kv = a.from.keys_of(s), cols = a.from.ks.length(kv),
            first_key = int(blockIdx.x) * kRowsOfTile;
  if (first_key >= cols) return;
  // The first row that sees a key of the tile.
  const int64_t sought = int64_t(first_key) * a.from.k_tile - a.from.offset + 1;
  const int64_t first_row = !a.from.causal || sought <= a.from.q_tile ? 0 : (sought + a.from.q_tile - 1) / a.from.q_tile - 1;
  const int start = uniform(int(min(first_row, int64_t(rows)) / kKeys)), end = uniform((rows + kKeys - 1) / kKeys);
  auto& sh = open_stages<SharedRows<D>>();
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  Ring<kStages> ring;
  if (warp == 4 * kGroups) {
    const int64_t q_row = a.from.qs.begin(s);
    for (int j = start; j < end; ++j, ring.next()) {
      barrier_wait(&sh.empty[ring.slot], ring.parity ^ 1);
      for (int r = lane; r < kKeys; r += 32)
        sh.lse[ring.slot][r] = j * kKeys + r < rows ? a.lse[q_row + j * kKeys + r] : INFINITY;
      __syncwarp();
      if (lane == 0) {
        barrier_expect(&sh.full[ring.slot], D / 64 * kKeys * 128);
        for (int p = 0; p < D / 64; ++p)
          tma_load(sh.q[ring.slot] + p * kKeys * 128, &q_map, &sh.full[ring.slot], 64 * p, int(q_row) + j * kKeys);
      }
    }
    return;
  }
  const int own = first_key + 16 * warp + lane / 4, last = first_key + 64 * (warp / 4) + 63;
  uint32_t k[D / 16][4];
  load_queries<D>(k, a.from.k, [&](int r) {
    const int key = first_key + 16 * warp + r;
    return key < cols ? a.from.ks.begin(kv) + key : int64_t(-1);
  });
  const uint64_t q0 = descriptor_k(sh.q[0]);
  float x[kKeys / 2], sum[2] = {};
  for (int j = start; j < end; ++j) {
    barrier_wait(&sh.full[ring.slot], ring.parity);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < D / 16; ++step)
      Product<kKeys>::register_a_k(
          x, k[step], q0 + ring.slot * (D / 64 * kKeys * 128 / 16) + step / 4 * (kKeys * 128 / 16) + step % 4 * 2, step > 0);
    wgmma_commit();
    wgmma_wait<0>();
    pin(x);
    const bool all = uniform((j + 1) * kKeys <= rows && a.from.seen(j * kKeys, cols) > min(last, cols - 1));
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
      const float2 lse = load_two(shared_address(&sh.lse[ring.slot][8 * i + lane % 4 * 2]));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float weight = exp2_fast(fmaf(x[4 * i + e], a.scale_log2, -(e % 2 ? lse.y : lse.x)));
        const int row = j * kKeys + 8 * i + lane % 4 * 2 + e % 2;
        if (all || (row < rows && a.from.seen(row, cols) > own + 8 * (e / 2))) sum[e / 2] += weight;
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(&sh.empty[ring.slot]);
    ring.next();
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float total = sum[r];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    if (rows == 0) total = -INFINITY;
    else if (a.how.kind == ReduceKind::Mean) total /= float(rows);
    if (lane % 4 == 0 && own + 8 * r < cols) a.from.cells.set(a.from.at.begin(s) + own + 8 * r, 0, total);
  }
#endif
}

constexpr int kJoinThreads = 128;

/// Grid: blocks of rows (strided), segments.
__global__ void __launch_bounds__(kJoinThreads) join_blocks_kernel(const __grid_constant__ BlockScores a) {
  extern __shared__ float lse[];  // of the block's rows
  const int s = blockIdx.y, rows = a.from.qs.length(s), cols = a.from.ks.length(a.from.keys_of(s)),
            across = a.blocks_across(cols), each = a.how.col_block / a.group, lane = threadIdx.x % 32;
  const int64_t high = a.padded_rows(rows);
  for (int first = blockIdx.x * a.how.row_block; first < rows; first += gridDim.x * a.how.row_block) {
    const int count = min(a.how.row_block, rows - first), seen = a.from.seen(first + count - 1, cols),
              groups = (seen + a.group - 1) / a.group;
    const float2* parts = a.parts + a.part(s) + first;
    __syncthreads();
    for (int r = threadIdx.x; r < count; r += kJoinThreads) {
      const int own = (a.from.seen(first + r, cols) + a.group - 1) / a.group;
      float top = -kInfinity, sum = 0;
#pragma unroll 4
      for (int g = 0; g < own; ++g) {
        const float2 x = parts[g * high + r];
        const float most = fmaxf(top, x.x);
        if (most == -kInfinity) continue;
        sum = sum * exp2f(top - most) + x.y * exp2f(x.x - most);
        top = most;
      }
      lse[r] = sum > 0 ? top + log2f(sum) : kInfinity;
    }
    __syncthreads();
    for (int b = threadIdx.x / 32; b < across; b += kJoinThreads / 32) {
      float sum = 0, top = 0;
      for (int g = b * each; g < min((b + 1) * each, groups); ++g)
        for (int r = lane; r < count; r += 32) {
          if (g * a.group >= a.from.seen(first + r, cols)) continue;
          const float2 x = parts[g * high + r];
          const float peak = exp2f(x.x - lse[r]);
          sum += x.y * peak, top = fmaxf(top, peak);
        }
      sum = warp_sum(sum), top = warp_max(top);
      if (a.how.kind == ReduceKind::Mean)
        sum /= float(int64_t(count) * (min(cols, (b + 1) * a.how.col_block) - b * a.how.col_block));
      if (lane == 0)
        a.from.cells.set(a.from.at.begin(s) + int64_t(first / a.how.row_block) * across + b, 0,
                         a.how.kind == ReduceKind::Max ? top : sum);
    }
  }
}

}  // namespace

bool proxy_reduce(Queue& queue, const Ragged& q, const Ragged& k, const Proxy& how, const Reduce& by, Grids out) {
  constexpr const char* where = "proxy_reduce";
  using To = Reduce::To;
  Scored from = scored(where, q, k, how, out);
  const int width = from.q.width;
  const auto aligned = [](const Matrix& x, int64_t numbers, uint64_t bytes) {
    return x.stride % numbers == 0 && reinterpret_cast<uint64_t>(x.data) % bytes == 0;
  };
  if (!hopper() || !encode_tiled() || !how.softmax || how.softcap > 0 || how.int8 || !(from.scale > 0) ||
      from.q_rows == 0 || from.k_rows == 0 || from.q_rows > 1 << 30 || from.k_rows > 1 << 30 ||
      from.k.type != Dtype::BF16 || from.q.type == Dtype::F16 || !aligned(from.k, 8, 16) || !aligned(from.q, 2, 8))
    return false;
  const bool narrow = width == 64 || width == 128;
  const int group = by.col_block % kKeys == 0 ? kKeys : by.col_block % 64 == 0 ? 64 : 16;
  const bool blocks = by.to == To::Blocks && by.row_block <= 8192 && by.col_block % group == 0,
             columns = by.to == To::Columns && by.kind != ReduceKind::Max;
  const bool wide = width > 128 && width % 128 == 0 && from.q.type == Dtype::BF16 && aligned(from.q, 8, 16) &&
                    (group >= 64 || by.kind != ReduceKind::Max);
  if (!(narrow && ((blocks && group >= 64) || columns)) && !(blocks && wide)) return false;
  Scratch scratch(queue.scratch);
  BlockScores a{from, by, group, nullptr, nullptr, from.scale * 1.4426950408889634f};
  CUtensorMap k_map, q_map;
  if (!make_map(k_map, from.k.row<const __nv_bfloat16>(0), from.k_rows, width, from.k.stride, kKeys)) return false;
  const unsigned count = unsigned(q.segments());
  const int64_t rows = ceil_div(from.q_rows, from.h);
  const dim3 row_tiles(unsigned(ceil_div(rows, kRowsOfTile)), count);
  const auto score = [&]<int D, int Group>() {
    launch(queue, where, block_scores_kernel<D, Group>, row_tiles, kThreads, sizeof(SharedKeys<D>) + 1024, a, k_map);
  };
  if (columns) {
    Matrix narrowed = from.q;
    if (from.q.type == Dtype::F32 || !aligned(from.q, 8, 16)) {
      narrowed = matrix(queue.scratch.take(Dtype::BF16, {from.q_rows, int64_t(width)}));
      round_rows(queue, where, from.q, from.q_rows, narrowed);
    }
    if (!make_map(q_map, narrowed.row<const __nv_bfloat16>(0), from.q_rows, width, narrowed.stride, kKeys))
      return false;
    a.lse = queue.scratch.take(Dtype::F32, {from.q_rows}).as<float>();
    const dim3 key_tiles(unsigned(ceil_div(from.k_rows, kRowsOfTile)), count);
    const auto sum = [&]<int D>() {
      score.template operator()<D, 0>();
      launch(queue, where, column_sums_kernel<D>, key_tiles, kThreads, sizeof(SharedRows<D>) + 1024, a, q_map);
    };
    if (width == 64) sum.template operator()<64>();
    else sum.template operator()<128>();
    return true;
  }
  const int64_t parts = out.cells.values.size[0] * by.row_block * (by.col_block / group);
  if (parts > int64_t(1) << 30) return false;
  a.parts = reinterpret_cast<float2*>(queue.scratch.take(Dtype::F32, {2 * std::max<int64_t>(1, parts)}).data);
  if (wide) {
    if (!make_map(q_map, from.q.row<const __nv_bfloat16>(0), from.q_rows, width, from.q.stride, kRowsOfTile))
      return false;
    const auto start = [&]<int Group>() {
      launch(queue, where, wide_scores_kernel<Group>, row_tiles, kThreads, sizeof(SharedChunks) + 1024, a, q_map, k_map);
    };
    if (group == 16) start.template operator()<16>();
    else if (group == 64) start.template operator()<64>();
    else start.template operator()<128>();
  } else if (width == 64) {
    if (group == 64) score.template operator()<64, 64>();
    else score.template operator()<64, 128>();
  } else {
    if (group == 64) score.template operator()<128, 64>();
    else score.template operator()<128, 128>();
  }
  launch(queue, where, join_blocks_kernel, dim3(blocks_for(ceil_div(rows, by.row_block), count), count), kJoinThreads,
         size_t(by.row_block) * sizeof(float), a);
  return true;
}

}  // namespace heed::cuda
