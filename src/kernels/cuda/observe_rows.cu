#include "kernels/cuda/observe.cuh"
#include "kernels/cuda/tile.cuh"

namespace heed::cuda {
namespace {

struct RowResults {
  float* entropy;
  float* distance;
  int32_t* argmax;
  float* peak;
  float* lse;
  Matrix span;
  const int32_t* spans;
  int span_count;
  bool lse_alone;
  int shares;          // lse_alone: of the keys, one for each block along z, each with an lse of its own
  int64_t share_keys;  // of a share, Dense; the last takes what is left
  int64_t rows;
};

constexpr int kSpans = 16;  // held in registers at a time

/// Grid: row tiles. Two passes over the keys: the first for lse, the second for all that needs it.
__global__ void __launch_bounds__(kTileThreads)
    observe_rows_kernel(const __grid_constant__ AttentionView a, const __grid_constant__ RowTiles tiles,
                        const __grid_constant__ RowResults to) {
  __shared__ TileMemory memory;
  __shared__ int64_t q_rows[kRows];
  const int r = threadIdx.x / 8, lane = threadIdx.x % 8;
  const QueryRow at = tile_row(a, tiles, kRows, r);
  const bool there = at.i < at.n;
  if (!__syncthreads_or(there)) return;
  if (lane == 0) q_rows[r] = at.live ? at.row : -1;
  int from, limit;
  key_range(a, at, from, limit);
  const bool planned = a.plan.form != Plan::Form::Dense;
  const int64_t row_of_plan = block_plan_row(a, tiles);
  if (!planned && to.shares > 1) {
    from = max(from, int(blockIdx.z * to.share_keys));
    if (int(blockIdx.z) < to.shares - 1) limit = int(min(int64_t(limit), (blockIdx.z + 1) * to.share_keys));
  }

  float top = -kInfinity, sum = 0;
  auto each_stage = [&](auto body) {
    KeyStages<kKeys> stages(a.plan, row_of_plan, from, limit, -1);
    stages.keep_share(blockIdx.z, to.shares);
    while (stages.next()) {
      tile_dots(memory, a.d, numbers_of(a.q, [&](int i) { return q_rows[i]; }),
                numbers_of(a.k, [&](int j) { return stages.key(j) < 0 ? int64_t(-1) : at.k_first + stages.key(j); }));
      float logit[4];
      int key[4];
      for (int j = 0; j < 4; ++j) {
        key[j] = stages.key(lane + 8 * j);
        if (key[j] >= 0 &&
            !(sees(a, at, key[j]) && mask_shows(a.plan, stages.entry(lane + 8 * j), at.i % a.plan.q_tile, key[j])))
          key[j] = -1;
        logit[j] = key[j] < 0 ? -kInfinity : logit_of(a, at, key[j], memory.scores[r][lane + 8 * j]);
      }
      body(key, logit);
    }
  };
  each_stage([&](const int(&key)[4], const float(&logit)[4]) {
    float weight[4], highest = top;
    for (int j = 0; j < 4; ++j) {
      weight[j] = key[j] < 0 ? -kInfinity : log_weight(a, logit[j]);
      highest = fmaxf(highest, weight[j]);
    }
    highest = warp_max(highest, 8);
    float more = 0;
    for (int j = 0; j < 4; ++j) more += weight[j] == -kInfinity ? 0 : expf(weight[j] - highest);
    sum = sum * (top == -kInfinity ? 0 : expf(top - highest)) + warp_sum(more, 8);
    top = highest;
  });
  if (at.live && a.mods.sink_logits && blockIdx.z == 0) {
    const float sink = a.mods.sink_logits[at.head], highest = fmaxf(top, sink);
    sum = sum * (top == -kInfinity ? 0 : expf(top - highest)) + expf(sink - highest);
    top = highest;
  }
  const float lse = sum > 0 ? top + logf(sum) : -kInfinity;
  if (there && lane == 0 && to.lse) to.lse[blockIdx.z * to.rows + at.row] = lse;
  if (to.lse_alone) return;

  for (int first_span = 0; first_span == 0 || first_span < to.span_count; first_span += kSpans) {
    float entropy = 0, distance = 0, best = -kInfinity, peak = 0, span[kSpans] = {};
    int argmax = -1;
    each_stage([&](const int(&key)[4], const float(&logit)[4]) {
      for (int j = 0; j < 4; ++j) {
        if (key[j] < 0) continue;
        const float log_p = log_weight(a, logit[j]) - (a.mods.sigmoid ? 0 : lse), p = expf(log_p);
        if (p > 0) entropy -= p * log_p;
        distance += p * float(at.q_pos - (a.mods.k_pos ? a.mods.k_pos[at.k_first + key[j]] : key[j]));
        if (logit[j] > best || argmax < 0) {
          best = logit[j];
          argmax = key[j];
          peak = p;
        }
#pragma unroll
        for (int s = 0; s < kSpans; ++s)
          if (first_span + s < to.span_count && key[j] >= to.spans[2 * (first_span + s)] &&
              key[j] < to.spans[2 * (first_span + s) + 1])
            span[s] += p;
      }
    });
    entropy = warp_sum(entropy, 8);
    distance = warp_sum(distance, 8);
    for (int step = 4; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, best, step), other_peak = __shfl_xor_sync(0xffffffffu, peak, step);
      const int other_key = __shfl_xor_sync(0xffffffffu, argmax, step);
      if (other_key >= 0 && (argmax < 0 || other > best || (other == best && other_key < argmax))) {
        best = other;
        argmax = other_key;
        peak = other_peak;
      }
    }
#pragma unroll
    for (int s = 0; s < kSpans; ++s) {
      span[s] = warp_sum(span[s], 8);
      if (there && lane == 0 && to.span && first_span + s < to.span_count)
        to.span.row<float>(at.row)[first_span + s] = span[s];
    }
    if (!there || lane != 0 || first_span > 0) continue;
    if (to.entropy) to.entropy[at.row] = entropy;
    if (to.distance) to.distance[at.row] = distance;
    if (to.argmax) to.argmax[at.row] = argmax;
    if (to.peak) to.peak[at.row] = peak;
  }
}

/// Grid: rows (strided), segments of q.
__global__ void join_lse_kernel(Segments qs, const float* from, int64_t rows, int shares, float* to) {
  const int n = qs.length(blockIdx.y);
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    const int64_t row = qs.begin(blockIdx.y) + i;
    float top = -kInfinity, sum = 0;
    for (int s = 0; s < shares; ++s) top = fmaxf(top, from[s * rows + row]);
    if (top > -kInfinity)
      for (int s = 0; s < shares; ++s) sum += expf(from[s * rows + row] - top);
    to[row] = sum > 0 ? top + logf(sum) : -kInfinity;
  }
}

}  // namespace

void row_lse(Queue& queue, const AttentionView& a, float* lse) {
  const RowTiles tiles = row_tiles(a, kRows);
  RowResults to{};
  to.lse = lse;
  to.lse_alone = true;
  to.rows = a.q_rows;
  // A few last rows over many keys: in shares, whose width does not depend on how loose the bound is (see attend_plain).
  const int64_t expected = ceil_div(a.m_bound, a.g);  // keys of a segment, where heads hold equally many
  to.share_keys = 512;
  while (ceil_div(expected, to.share_keys) > 32) to.share_keys *= 2;
  to.shares = a.n_bound <= 256 ? int(std::max<int64_t>(1, ceil_div(expected, to.share_keys))) : 1;
  dim3 grid = tiles.grid;
  grid.z = unsigned(to.shares);
  Scratch scratch(queue.scratch);
  if (to.shares > 1) to.lse = queue.scratch.take(Dtype::F32, {to.shares, a.q_rows}).as<float>();
  if (observes_on_tensor_cores(a)) row_lse_mma(queue, a, to.share_keys, to.shares, to.lse);
  else launch(queue, "observe", observe_rows_kernel, grid, kTileThreads, 0, a, tiles, to);
  if (to.shares == 1) return;
  const unsigned count = unsigned(a.sequences * a.h);
  launch(queue, "observe", join_lse_kernel, dim3(blocks_for(ceil_div(a.n_bound, 128), count), count), 128, 0, a.qs,
         to.lse, a.q_rows, to.shares, lse);
}

void observe_rows(Queue& queue, const Ragged& q, const Keys& keys, const Plan* plan, const Mods& mods, const RowStats& stats) {
  constexpr const char* where = "observe_rows";
  Scratch scratch(queue.scratch);
  const Observed from(queue, where, keys, mods);
  AttentionView a = attention_view(where, q, from.k, {}, plan, from.mods);
  a.mods.gain = nullptr;  // as in observe
  const int64_t rows = q.values.size[0], spans = stats.spans ? stats.spans.size[0] : 0;
  check_tensor(where, "entropy", stats.entropy, {rows}, true);
  check_tensor(where, "distance", stats.distance, {rows}, true);
  check_tensor(where, "argmax", stats.argmax, {rows}, true, Dtype::I32);
  check_tensor(where, "peak", stats.peak, {rows}, true);
  check_tensor(where, "lse", stats.lse, {rows}, true);
  check_tensor(where, "spans", stats.spans, {spans, 2}, true, Dtype::I32);
  check_tensor(where, "span", stats.span, {rows, spans}, true);
  RowResults to{stats.entropy.as<float>(),
                stats.distance.as<float>(),
                stats.argmax.as<int32_t>(),
                stats.peak.as<float>(),
                stats.lse.as<float>(),
                matrix(stats.span),
                stats.spans.as<int32_t>(),
                int(spans),
                false,
                1,
                0,
                0};
  to.lse_alone = !to.entropy && !to.distance && !to.argmax && !to.peak && !to.span;
  if (to.lse_alone) return to.lse ? row_lse(queue, a, to.lse) : void();
  const RowTiles tiles = row_tiles(a, kRows);
  launch(queue, where, observe_rows_kernel, tiles.grid, kTileThreads, 0, a, tiles, to);
}

}  // namespace heed::cuda
