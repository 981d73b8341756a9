// attend for every type, plan and mod, in f32: what the faster forms do not take.
#include "kernels/cuda/attend.cuh"
#include "kernels/cuda/tile.cuh"

namespace heed::cuda {
namespace {

constexpr int kChannels = 256;  // of v, for one block

/// Grid: row tiles, then (z) parts and slices of v's channels. Thread t works for row t / 8.
__global__ void __launch_bounds__(kTileThreads) attend_plain_kernel(const __grid_constant__ AttentionView a,
                                                                    const __grid_constant__ RowTiles tiles,
                                                                    const __grid_constant__ AttendOut to) {
  __shared__ TileMemory memory;
  __shared__ int64_t q_rows[kRows];
  const int r = threadIdx.x / 8, lane = threadIdx.x % 8;
  const int slices = (a.d_v + kChannels - 1) / kChannels, part = blockIdx.z / slices, channel = blockIdx.z % slices * kChannels;
  const QueryRow at = tile_row(a, tiles, kRows, r);
  const bool there = at.i < at.n;
  if (!__syncthreads_or(there)) return;
  if (lane == 0) q_rows[r] = at.live ? at.row : -1;
  int from, limit;
  key_range(a, at, from, limit);
  const int head = blockIdx.y % (a.h / tiles.pack) * tiles.pack;
  const int first_i = a.plan.form == Plan::Form::Dense ? 0 : blockIdx.x / tiles.chunks * a.plan.q_tile;
  const int sequence = blockIdx.y / (a.h / tiles.pack);
  const bool planned = first_i < a.qs.length(sequence * a.h) && a.plan.form != Plan::Form::Dense;
  KeyStages<kKeys> stages(a.plan, planned ? plan_row(a, sequence, head, first_i) : 0, from, limit, a.plan.parts > 1 ? part : -1);

  float top = -kInfinity, sum = 0, out[kChannels / kSlice][8] = {};
  while (stages.next()) {
    tile_dots(memory, a.q, [&](int i) { return q_rows[i]; }, a.k,
              [&](int j) { return stages.key(j) < 0 ? int64_t(-1) : at.k_first + stages.key(j); });
    float weight[4], highest = -kInfinity;
    for (int j = 0; j < 4; ++j) {
      const int key = stages.key(lane + 8 * j);
      weight[j] = -kInfinity;
      if (key >= 0 && sees(a, at, key) && mask_shows(a.plan, stages.entry(lane + 8 * j), at.i % a.plan.q_tile, key))
        weight[j] = log_weight(a, logit_of(a, at, key, memory.scores[r][lane + 8 * j]));
      highest = fmaxf(highest, weight[j]);
    }
    highest = fmaxf(top, warp_max(highest, 8));
    const float shrink = top == -kInfinity ? 0 : expf(top - highest);
    float more = 0;
    for (int j = 0; j < 4; ++j) {
      const float p = weight[j] == -kInfinity ? 0 : expf(weight[j] - highest);
      more += p;
      memory.scores[r][lane + 8 * j] = a.mods.sigmoid ? expf(weight[j]) : p;
    }
    sum = sum * shrink + warp_sum(more, 8);
    top = highest;
    const float keep = a.mods.sigmoid ? 1 : shrink;
#pragma unroll
    for (int slice = 0; slice < kChannels / kSlice; ++slice) {
      const int first = channel + slice * kSlice;
      if (first >= a.d_v) break;
      __syncthreads();
      load_slice(memory.b, kKeys, a.v, first, [&](int j) { return stages.key(j) < 0 ? int64_t(-1) : at.v_first + stages.key(j); });
      __syncthreads();
      for (int c = 0; c < 8; ++c) out[slice][c] *= keep;
      for (int j = 0; j < kKeys; ++j) {
        const float p = memory.scores[r][j];
        for (int c = 0; c < 8; ++c) out[slice][c] += p * memory.b[j][lane + 8 * c];
      }
    }
  }
  if (!there) return;
  float shrink = 1;
  if (at.live && a.mods.sink_logits && part == 0) {
    const float sink = a.mods.sink_logits[at.head], highest = fmaxf(top, sink);
    shrink = top == -kInfinity ? 0 : expf(top - highest);
    sum = sum * shrink + expf(sink - highest);
    top = highest;
  }
  const float gain = a.mods.gain ? a.mods.gain[at.row] : 1;
  const float factor = !at.live || sum == 0 ? 0 : a.mods.sigmoid ? gain : gain * shrink / sum;
  const int64_t row = at.row;
  float* result = to.out + part * to.part_stride + row * to.row_stride;
#pragma unroll
  for (int slice = 0; slice < kChannels / kSlice; ++slice)
    for (int c = 0; c < 8; ++c) {
      const int at_channel = channel + slice * kSlice + lane + 8 * c;
      if (at_channel < a.d_v) result[at_channel] = factor == 0 ? 0 : out[slice][c] * factor;
    }
  if (to.lse && lane == 0 && channel == 0)
    to.lse[part * to.lse_part + row * to.lse_row] = at.live && sum > 0 ? top + logf(sum) : -kInfinity;
}

}  // namespace

void attend_plain(Queue& queue, const AttentionView& a, const AttendOut& to) {
  const RowTiles tiles = row_tiles(a, kRows);
  dim3 grid = tiles.grid;
  grid.z = unsigned(a.plan.parts * ceil_div(a.d_v, kChannels));
  launch(queue, "attend", attend_plain_kernel, grid, kTileThreads, 0, a, tiles, to);
}

}  // namespace heed::cuda
