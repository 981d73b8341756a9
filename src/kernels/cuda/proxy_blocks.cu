// proxy_blocks on Hopper: the share of each block of keys in the attention of a block of queries, in one pass over the products. Each row
// leaves the maximum and the sum of its weights for every group of keys; what the row's whole sum is shows at the end, when rows
// and groups are put together.
#include <cmath>

#include "kernels/cuda/proxy.cuh"
#include "kernels/cuda/sm90.h"
#include "kernels/cuda/tensor_map.h"

namespace heed::cuda {
namespace {

using namespace sm90;

constexpr int kGroups = 3, kStages = 4, kKeys = 128, kRowsOfTile = 64 * kGroups;

struct BlockScores {
  Scored from;  // its cells are those of out
  Reduce how;
  int group;  // keys whose weights a row adds up: 64 or 128
  float2* parts;  // of segment s from part(s) on: [groups][rows, whole blocks of them]: maximum in powers of two, sum relative to it
  float scale_log2;

  __device__ int blocks_across(int cols) const { return (cols + how.col_block - 1) / how.col_block; }
  __device__ int64_t padded_rows(int rows) const {
    return int64_t(rows + how.row_block - 1) / how.row_block * how.row_block;
  }
  __device__ int64_t part(int s) const { return from.at.begin(s) * how.row_block * (how.col_block / group); }
  /// Columns that row i sees.
  __device__ int seen(int i, int cols) const {
    if (!from.causal) return cols;
    const int64_t sees = from.offset + int64_t(i + 1) * from.q_tile - 1;
    return sees < 0 ? 0 : int(min(int64_t(cols), sees / from.k_tile + 1));
  }
};

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

/// Grid: tiles of rows, the last (which see most) first; segments of q.
template <int D, int Group>
__global__ void __launch_bounds__(128 * kGroups + 32, 1)
    block_scores_kernel(const __grid_constant__ BlockScores a, const __grid_constant__ CUtensorMap k_map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t memory[];
  auto& sh = *reinterpret_cast<SharedKeys<D>*>((reinterpret_cast<uintptr_t>(memory) + 1023) & ~uintptr_t(1023));
  const int s = blockIdx.y, rows = a.from.qs.length(s), kv = a.from.keys_of(s), cols = a.from.ks.length(kv);
  const int first_row = ((rows + kRowsOfTile - 1) / kRowsOfTile - 1 - int(blockIdx.x)) * kRowsOfTile;
  if (first_row < 0) return;
  const int stages = uniform((a.seen(min(first_row + kRowsOfTile, rows) - 1, cols) + kKeys - 1) / kKeys);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) barrier_init(&sh.full[i], 1), barrier_init(&sh.empty[i], 4 * kGroups);
    barrier_init_fence();
  }
  __syncthreads();
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
  const int seen[2] = {a.seen(own, cols), a.seen(own + 8, cols)},
            whole = uniform(a.seen(first_row + 64 * (warp / 4), cols));
  const int64_t high = a.padded_rows(rows);
  float2* parts = a.parts + a.part(s) + own;
  const uint64_t keys = descriptor_k(sh.k[0]);
  float x[kKeys / 2];
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
    if ((j + 1) * kKeys > whole) {
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (j * kKeys + 8 * i + lane % 4 * 2 + e % 2 >= seen[e / 2]) x[4 * i + e] = -INFINITY;
    }
#pragma unroll
    for (int g = 0; g < kKeys / Group; ++g)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float top = -INFINITY, sum = 0;
#pragma unroll
        for (int i = g * Group / 8; i < (g + 1) * Group / 8; ++i)
          top = fmaxf(top, fmaxf(x[4 * i + 2 * r], x[4 * i + 2 * r + 1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        const float base = top == -INFINITY ? 0 : top * a.scale_log2;
#pragma unroll
        for (int i = g * Group / 8; i < (g + 1) * Group / 8; ++i)
          sum += exp2_fast(fmaf(x[4 * i + 2 * r], a.scale_log2, -base)) +
                 exp2_fast(fmaf(x[4 * i + 2 * r + 1], a.scale_log2, -base));
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (lane % 4 == 0 && own + 8 * r < rows) {
          const int64_t column = int64_t(j) * (kKeys / Group) + g;
          if (column * Group < cols) parts[column * high + 8 * r] = {top == -INFINITY ? top : base, sum};
        }
      }
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
    const int count = min(a.how.row_block, rows - first), seen = a.seen(first + count - 1, cols),
              groups = (seen + a.group - 1) / a.group;
    const float2* parts = a.parts + a.part(s) + first;
    __syncthreads();
    for (int r = threadIdx.x; r < count; r += kJoinThreads) {
      const int own = (a.seen(first + r, cols) + a.group - 1) / a.group;
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
          if (g * a.group >= a.seen(first + r, cols)) continue;
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

bool proxy_blocks(Queue& queue, const Ragged& q, const Ragged& k, const Proxy& how, const Reduce& by, Grids out) {
  constexpr const char* where = "proxy_blocks";
  Scored from = scored(where, q, k, how, out);
  const int width = from.q.width;
  const auto aligned = [](const Matrix& x, int64_t numbers, uint64_t bytes) {
    return x.stride % numbers == 0 && reinterpret_cast<uint64_t>(x.data) % bytes == 0;
  };
  if (!hopper() || !encode_tiled() || !how.softmax || how.softcap > 0 || how.int8 || !(from.scale > 0) ||
      by.to != Reduce::To::Blocks || by.col_block % 64 != 0 || by.row_block > 8192 || (width != 64 && width != 128) ||
      from.k.type != Dtype::BF16 || from.q.type == Dtype::F16 || !aligned(from.k, 8, 16) || !aligned(from.q, 2, 8) ||
      from.k_rows == 0 || from.q_rows == 0 || from.k_rows > 1 << 30)
    return false;
  const int group = by.col_block % kKeys ? 64 : kKeys;
  const int64_t parts = out.cells.values.size[0] * by.row_block * (by.col_block / group);
  if (parts > int64_t(1) << 30) return false;
  Scratch scratch(queue.scratch);
  const BlockScores a{from, by, group,
                      reinterpret_cast<float2*>(queue.scratch.take(Dtype::F32, {2 * std::max<int64_t>(1, parts)}).data),
                      from.scale * 1.4426950408889634f};
  CUtensorMap map;
  if (!make_map(map, from.k.row<const __nv_bfloat16>(0), from.k_rows, width, from.k.stride, kKeys)) return false;
  const unsigned count = unsigned(q.segments());
  const auto start = [&]<int D, int Group>() {
    launch(queue, where, block_scores_kernel<D, Group>,
           dim3(unsigned(ceil_div(ceil_div(from.q_rows, from.h), kRowsOfTile)), count), 128 * kGroups + 32,
           sizeof(SharedKeys<D>) + 1024, a, map);
  };
  if (width == 64 && group == 64) start.template operator()<64, 64>();
  else if (width == 64) start.template operator()<64, 128>();
  else if (group == 64) start.template operator()<128, 64>();
  else start.template operator()<128, 128>();
  launch(queue, where, join_blocks_kernel,
         dim3(blocks_for(ceil_div(ceil_div(from.q_rows, from.h), by.row_block), count), count), kJoinThreads,
         size_t(by.row_block) * sizeof(float), a);
  return true;
}

}  // namespace heed::cuda
