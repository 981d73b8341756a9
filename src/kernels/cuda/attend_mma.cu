// attend on the tensor cores for every plan, and every mod but sigmoid weights: bf16 keys and values of panels.
#include "kernels/cuda/attend.cuh"
#include "kernels/cuda/mma.cuh"

namespace heed::cuda {
namespace {

using mma::Held;
using mma::KeyRing;
using mma::kLog2e;
using mma::kWarps;
using mma::Stage;

static_assert(kMmaRows == mma::kBlockRows);
template <int D> constexpr int kStageKeys = D <= 128 ? 64 : 32;  // of a stage

/// Grid as attend_plain's. A warp has 16 rows, kMmaRows / 16 warps a block; a lane sums for rows lane / 4 and that + 8.
template <int D, int DV>
__global__ void __launch_bounds__(32 * kWarps)
    attend_mma_kernel(const __grid_constant__ AttentionView a, Matrix q, const __grid_constant__ RowTiles tiles,
                      KeyShares split, const __grid_constant__ AttendOut to) {
  constexpr int kStage = kStageKeys<D>;
  extern __shared__ __align__(16) char shared[];
  auto* k_stages = reinterpret_cast<Stage<D, kStage>*>(shared);
  __shared__ int keys[2][kStage];
  __shared__ int64_t entries[2][kStage];
  __shared__ int low, high;
  const KeyRing<D, DV, kStage> ring{k_stages, reinterpret_cast<Stage<DV, kStage>*>(k_stages + 2), keys, entries};
  const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16;
  const int part = blockIdx.z % a.plan.parts, share = blockIdx.z / a.plan.parts;
  const QueryRow leader = tile_row(a, tiles, kMmaRows, 0);  // its rows have the block's sequence and KV head
  if (leader.i >= leader.n) return;
  const QueryRow own_rows[2] = {tile_row(a, tiles, kMmaRows, own + lane / 4),
                                tile_row(a, tiles, kMmaRows, own + lane / 4 + 8)};
  const int m = leader.m, n = leader.n;

  mma::seen_range(a, own_rows, m, n, low, high);
  int from = min(low, high), limit = high;
  const bool planned = a.plan.form != Plan::Form::Dense;
  if (!planned && split.shares > 1) {
    from = max(from, int(share * split.keys));
    if (share < split.shares - 1) limit = int(min(int64_t(limit), (share + 1) * split.keys));
  }
  KeyStages<kStage> stages(a.plan, block_plan_row(a, tiles), from, limit, a.plan.parts > 1 ? part : -1);
  stages.keep_share(share, split.shares);

  Held<1, D> rows;
  rows.load(a.d, mma::lane_rows(q, own_rows));

  // Logits and their maxima in powers of two. Where every row sees every key of a stage, nobody asks again.
  const bool plain = a.mods.softcap == 0 && !a.mods.key_bias && !a.mods.row_factor;
  const bool asks = a.plan.mask || a.mods.until || a.mods.window > 0 || a.plan.parts > 1;
  const float factor[2] = {kLog2e * own_rows[0].factor, kLog2e * own_rows[1].factor};
  float top[2] = {-kInfinity, -kInfinity}, sum[2] = {}, out[DV / 8][4] = {};
  ring.each(a, leader, stages, [&](int slot) {
    float x[kStage / 8][4];
    const int farthest = keys[slot][kStage - 1];
    const bool all = !asks && farthest >= 0 && (!a.plan.causal || farthest - leader.i <= m - n);
#pragma unroll
    for (int column = 0; column < kStage / 8; ++column) {
      float dots[1][4];
      ring.k[slot].products(rows, column, dots);
#pragma unroll
      for (int e = 0; e < 4; ++e) x[column][e] = plain ? factor[e / 2] * dots[0][e] : dots[0][e];
    }
    if (!plain) {
#pragma unroll
      for (int column = 0; column < kStage / 8; ++column)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const QueryRow& at = own_rows[e / 2];
          const int key = max(0, keys[slot][8 * column + 2 * (lane % 4) + e % 2]);
          x[column][e] = kLog2e * logit_of(a, at, key, x[column][e]);
        }
    }
    if (!all) {
#pragma unroll
      for (int column = 0; column < kStage / 8; ++column)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const QueryRow& at = own_rows[e / 2];
          const int j = 8 * column + 2 * (lane % 4) + e % 2, key = keys[slot][j];
          const bool seen = asks ? ring.shows(a, at, slot, j) : key >= 0 && (!a.plan.causal || key - at.i <= m - n);
          if (!seen) x[column][e] = -kInfinity;
        }
    }
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      float highest = top[u];
      for (int column = 0; column < kStage / 8; ++column)
        highest = fmaxf(highest, fmaxf(x[column][2 * u], x[column][2 * u + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
      const float base = highest == -kInfinity ? 0 : highest;  // of a row that has seen nothing all weights are 0
      const float shrink = mma::power_of_two(top[u] - base);
      top[u] = highest;
      float all = 0;
      for (int column = 0; column < kStage / 8; ++column)
        for (int e = 2 * u; e < 2 * u + 2; ++e) {
          x[column][e] = mma::power_of_two(x[column][e] - base);
          all += x[column][e];
        }
      sum[u] = sum[u] * shrink + all;  // of this lane's keys
      for (int c = 0; c < DV / 8; ++c) out[c][2 * u] *= shrink, out[c][2 * u + 1] *= shrink;
    }
#pragma unroll
    for (int step = 0; step < kStage / 16; ++step) {
      uint32_t weights[4];
      mma::weights_of(x[2 * step], x[2 * step + 1], weights);
      ring.v[slot].add_rows(weights, step, out);
    }
  });

  const int64_t place = int64_t(share) * a.plan.parts + part;
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    const QueryRow& at = own_rows[u];
    sum[u] += __shfl_xor_sync(0xffffffffu, sum[u], 1);
    sum[u] += __shfl_xor_sync(0xffffffffu, sum[u], 2);
    if (at.i >= at.n) continue;
    float shrink = 1;
    if (at.live && a.mods.sink_logits && part == 0 && share == 0) {
      const float sink = kLog2e * a.mods.sink_logits[at.head], highest = fmaxf(top[u], sink);
      shrink = exp2f(top[u] - highest);
      sum[u] = sum[u] * shrink + exp2f(sink - highest);
      top[u] = highest;
    }
    const float factor = !at.live || sum[u] == 0 ? 0 : (a.mods.gain ? a.mods.gain[at.row] : 1) * shrink / sum[u];
    float* result = to.out + place * to.part_stride + at.row * to.row_stride;
#pragma unroll
    for (int c = 0; c < DV / 8; ++c)
      for (int e = 0; e < 2; ++e) {
        const int channel = 8 * c + 2 * (lane % 4) + e;
        if (channel < a.d_v) result[channel] = factor == 0 ? 0 : out[c][2 * u + e] * factor;
      }
    if (to.lse && lane % 4 == 0)
      to.lse[place * to.lse_part + at.row * to.lse_row] = at.live && sum[u] > 0 ? top[u] / kLog2e + logf(sum[u]) : -kInfinity;
  }
}

}  // namespace

bool attends_on_tensor_cores(const AttentionView& a) {
  const int width = mma::width_for(a.d);
  return mma::rows_fit(a.k) && mma::rows_fit(a.v) && !a.mods.sigmoid && width > 0 && a.d_v <= width && a.q_rows > 0;
}

void attend_mma(Queue& queue, const AttentionView& a, const RowTiles& tiles, dim3 grid, const KeyShares& split,
                const AttendOut& to) {
  const Scratch scratch(queue.scratch);
  const Tensor narrow = queue.scratch.take(Dtype::BF16, {a.q_rows, int64_t(a.d)});
  round_rows(queue, "attend", a.q, a.q_rows, matrix(narrow));
  mma::with_width(a.d, [&]<int D>() {
    auto start = [&]<int DV>() {
      constexpr size_t shared = 2 * sizeof(Stage<D, kStageKeys<D>>) + 2 * sizeof(Stage<DV, kStageKeys<D>>);
      launch(queue, "attend", attend_mma_kernel<D, DV>, grid, 32 * kWarps, shared, a, matrix(narrow), tiles, split, to);
    };
    if constexpr (D == 192) {
      if (a.d_v <= 128) return start.template operator()<128>();
    }
    start.template operator()<D>();
  });
}

}  // namespace heed::cuda
