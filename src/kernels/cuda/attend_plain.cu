// attend for every type, plan and mod, in f32, over panels or pages: what the faster forms do not take.
#include "kernels/cuda/attend.cuh"
#include "kernels/cuda/tile.cuh"

namespace heed::cuda {
namespace {

constexpr int kChannels = 256;  // of v, for one block

struct PanelNumbers {
  Matrix k_rows, v_rows;
  __device__ void k(const QueryRow& at, int key, int c, float (&x)[8]) const {
    load8(k_rows.data, k_rows.type, (at.k_first + key) * k_rows.stride + c, k_rows.width - c, x);
  }
  __device__ void v(const QueryRow& at, int key, int c, float (&x)[8]) const {
    load8(v_rows.data, v_rows.type, (at.v_first + key) * v_rows.stride + c, v_rows.width - c, x);
  }
};

/// Pages read in place; plain keys are turned as they are read.
struct PageNumbers {
  PagesView pages;
  RopeView rope;
  ReadPlaces places;
  __device__ void k(const QueryRow& at, int key, int c, float (&x)[8]) const {
    const LayoutView& l = pages.layout_of(at.k_segment, key / kPage);
    char* page = pages.page(at.k_segment, key / kPage);
    const int entry = key % kPage;
    l.k.get8(page, entry, c, x);
    if (!rope.inv_freq || c >= rope.dims) return;
    const int half = rope.dims / 2;
    const float position = float(places.at(at.k_segment, key, l, page));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (c + i >= rope.dims) break;
      const int pair = rope.neox ? (c + i) % half : (c + i) / 2;
      const bool first = rope.first(pair) == c + i;
      float other = l.k.one(page, entry, first ? rope.second(pair) : rope.first(pair));
      if (first) turn(x[i], other, position * rope.inv_freq[pair]);
      else turn(other, x[i], position * rope.inv_freq[pair]);
    }
  }
  __device__ void v(const QueryRow& at, int key, int c, float (&x)[8]) const {
    pages.layout_of(at.k_segment, key / kPage).v.get8(pages.page(at.k_segment, key / kPage), key % kPage, c, x);
  }
};

/// Grid: row tiles, then (z) shares of the keys, parts, and slices of v's channels. Thread t works for row t / 8.
template <class Numbers>
__global__ void __launch_bounds__(kTileThreads)
    attend_plain_kernel(const __grid_constant__ AttentionView a, const __grid_constant__ Numbers numbers,
                        const __grid_constant__ RowTiles tiles, KeyShares split, const __grid_constant__ AttendOut to) {
  __shared__ TileMemory memory;
  __shared__ int64_t q_rows[kRows];
  const int r = threadIdx.x / 8, lane = threadIdx.x % 8;
  const int slices = (a.d_v + kChannels - 1) / kChannels, channel = blockIdx.z % slices * kChannels;
  const int part = blockIdx.z / slices % a.plan.parts, share = blockIdx.z / (slices * a.plan.parts);
  const QueryRow at = tile_row(a, tiles, kRows, r);
  const bool there = at.i < at.n;
  if (!__syncthreads_or(there)) return;
  if (lane == 0) q_rows[r] = at.live ? at.row : -1;
  int from, limit;
  key_range(a, at, from, limit);
  const bool planned = a.plan.form != Plan::Form::Dense;
  if (!planned && split.shares > 1) {
    from = max(from, int(share * split.keys));
    if (share < split.shares - 1) limit = int(min(int64_t(limit), (share + 1) * split.keys));
  }
  KeyStages<kKeys> stages(a.plan, block_plan_row(a, tiles), from, limit, a.plan.parts > 1 ? part : -1);
  stages.keep_share(share, split.shares);

  float top = -kInfinity, sum = 0, out[kChannels / kSlice][8] = {};
  while (stages.next()) {
    tile_dots(memory, a.d, numbers_of(a.q, [&](int i) { return q_rows[i]; }), [&](int j, int c, float(&x)[8]) {
      const int key = stages.key(j);
      if (key >= 0) numbers.k(at, key, c, x);
    });
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
      load_slice(memory.b, a.d_v, first, [&](int j, int c, float(&x)[8]) {
        const int key = stages.key(j);
        if (key >= 0) numbers.v(at, key, c, x);
      });
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
  if (at.live && a.mods.sink_logits && part == 0 && share == 0) {
    const float sink = a.mods.sink_logits[at.head], highest = fmaxf(top, sink);
    shrink = top == -kInfinity ? 0 : expf(top - highest);
    sum = sum * shrink + expf(sink - highest);
    top = highest;
  }
  const float gain = a.mods.gain ? a.mods.gain[at.row] : 1;
  const float factor = !at.live || sum == 0 ? 0 : a.mods.sigmoid ? gain : gain * shrink / sum;
  const int64_t row = at.row, place = int64_t(share) * a.plan.parts + part;
  float* result = to.out + place * to.part_stride + row * to.row_stride;
#pragma unroll
  for (int slice = 0; slice < kChannels / kSlice; ++slice)
    for (int c = 0; c < 8; ++c) {
      const int at_channel = channel + slice * kSlice + lane + 8 * c;
      if (at_channel < a.d_v) result[at_channel] = factor == 0 ? 0 : out[slice][c] * factor;
    }
  if (to.lse && lane == 0 && channel == 0)
    to.lse[place * to.lse_part + row * to.lse_row] = at.live && sum > 0 ? top + logf(sum) : -kInfinity;
}

/// Shares of one row → the row, in order of shares. Grid: rows (strided), segments of q, parts.
__global__ void join_kernel(const __grid_constant__ AttentionView a, int shares, const __grid_constant__ AttendOut from,
                            const __grid_constant__ AttendOut to) {
  const int part = blockIdx.z, n = a.qs.length(blockIdx.y);
  for (int i = blockIdx.x; i < n; i += gridDim.x) {
    const int64_t row = a.qs.begin(blockIdx.y) + i;
    auto log_sum = [&](int s) { return from.lse[(int64_t(s) * a.plan.parts + part) * from.lse_part + row]; };
    float top = -kInfinity, sum = 0;
    for (int s = 0; s < shares; ++s) top = fmaxf(top, log_sum(s));
    if (top > -kInfinity)
      for (int s = 0; s < shares; ++s) sum += expf(log_sum(s) - top);
    for (int c = threadIdx.x; c < a.d_v; c += blockDim.x) {
      float x = 0;
      for (int s = 0; top > -kInfinity && s < shares; ++s)
        x += expf(log_sum(s) - top) / sum *
             from.out[(int64_t(s) * a.plan.parts + part) * from.part_stride + row * from.row_stride + c];
      to.out[part * to.part_stride + row * to.row_stride + c] = x;
    }
    if (to.lse && threadIdx.x == 0)
      to.lse[part * to.lse_part + row * to.lse_row] = sum > 0 ? top + logf(sum) : -kInfinity;
  }
}

/// start(tiles, grid, shares, out) launches a kernel whose blocks take `block_rows` rows and one of `slices` of the channels.
template <class Start>
void run(Queue& queue, const char* where, const AttentionView& a, int64_t expected_keys, int block_rows, int64_t slices,
         const AttendOut& to, Start start) {
  const RowTiles tiles = row_tiles(a, block_rows);
  // Not by the device, so that a result does not depend on it, nor by how loose the bound is: shares are 256 keys wide
  // (at most 64 of them, so a power of two wider over very many keys), and those past the last key weigh exactly
  // nothing. A plan's entries are divided by 16. Sigmoid weights have no denominator to join by.
  KeyShares split{1, expected_keys};
  if (a.n_bound <= 16 && !a.mods.sigmoid) {
    split.keys = 256;
    while (ceil_div(expected_keys, split.keys) > 64) split.keys *= 2;
    split.shares = a.plan.form == Plan::Form::Dense ? int(std::max<int64_t>(1, ceil_div(expected_keys, split.keys))) : 16;
  }
  dim3 grid = tiles.grid;
  grid.z = unsigned(split.shares * a.plan.parts * slices);
  if (split.shares == 1) return start(tiles, grid, split, to);
  Scratch scratch(queue.scratch);
  const int64_t rows = a.q_rows, places = int64_t(split.shares) * a.plan.parts;
  const AttendOut partial{queue.scratch.take(Dtype::F32, {places, rows, a.d_v}).as<float>(), rows * a.d_v, a.d_v,
                          queue.scratch.take(Dtype::F32, {places, rows}).as<float>(),        rows,         1};
  start(tiles, grid, split, partial);
  const unsigned count = unsigned(a.sequences * a.h);
  launch(queue, where, join_kernel, dim3(blocks_for(a.n_bound, count), count, unsigned(a.plan.parts)), 128, 0, a,
         split.shares, partial, to);
}

template <class Numbers>
void run_plain(Queue& queue, const char* where, const AttentionView& a, const Numbers& numbers, int64_t expected_keys,
               const AttendOut& to) {
  run(queue, where, a, expected_keys, kRows, ceil_div(a.d_v, kChannels), to,
      [&](const RowTiles& tiles, dim3 grid, const KeyShares& split, const AttendOut& out) {
        launch(queue, where, attend_plain_kernel<Numbers>, grid, kTileThreads, 0, a, numbers, tiles, split, out);
      });
}

}  // namespace

void attend_plain(Queue& queue, const AttentionView& a, const AttendOut& to) {
  const int64_t expected = ceil_div(a.m_bound, a.g);
  if (!attends_on_tensor_cores(a)) return run_plain(queue, "attend", a, PanelNumbers{a.k, a.v}, expected, to);
  run(queue, "attend", a, expected, kMmaRows, 1, to,
      [&](const RowTiles& tiles, dim3 grid, const KeyShares& split, const AttendOut& out) {
        attend_mma(queue, a, tiles, grid, split, out);
      });
}

void attend_pages(Queue& queue, const AttentionView& a, const PagesView& pages, const RopeView& rope,
                  const ReadPlaces& places, int64_t most_keys, const AttendOut& to) {
  run_plain(queue, "attend_store", a, PageNumbers{pages, rope, places}, most_keys, to);
}

}  // namespace heed::cuda
