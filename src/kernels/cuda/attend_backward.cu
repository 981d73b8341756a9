// Gradients of attention in f32, without atomics: one kernel walks the keys of each query row for d_q, another the query
// rows of each key for d_k and d_v (Dao 2023, appendix B), so every sum has one order.
#include "kernels/cuda/attend_backward.cuh"
#include "kernels/cuda/attend_sm90.h"
#include "kernels/cuda/tile.cuh"

namespace heed::cuda {
namespace {

constexpr int kChannels = 256;  // of a gradient row, for one block

struct Gradient {
  Matrix d_out, out;
  const float *lse, *out_dot;  // out_dot: Σ out · d_out of a row
  Matrix to;
  float* bias;  // d_key_bias, or null
};

/// One warp a row: Σ out · d_out, and d_gain.
__global__ void out_dot_kernel(const __grid_constant__ AttentionView a, Matrix out, Matrix d_out, float* dots, float* d_gain) {
  const int segment = blockIdx.y, n = a.qs.length(segment), lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int i = blockIdx.x * warps + threadIdx.x / 32; i < n; i += gridDim.x * warps) {
    const int64_t row = a.qs.begin(segment) + i;
    float dot = 0;
    for (int c = lane; c < a.d_v; c += 32) dot += out.get(row, c) * d_out.get(row, c);
    dot = warp_sum(dot);
    if (lane != 0) continue;
    dots[row] = dot;
    const float gain = a.mods.gain ? a.mods.gain[row] : 1;
    if (d_gain) d_gain[row] = gain == 0 ? 0 : dot / gain;
  }
}

__device__ inline float probability(const AttentionView& a, float logit, float lse) {
  return a.mods.sigmoid ? 1 / (1 + expf(-logit)) : expf(logit - lse);
}
__device__ inline float d_logit(const AttentionView& a, float p, float d_p, float out_dot) {
  return a.mods.sigmoid ? p * (1 - p) * d_p : p * (d_p - out_dot);
}

/// Adds scores^T (or scores) · rows of `from` to a block's 32 × 256 sums: thread t holds output row t / 8.
template <bool kTransposed, class Row>
__device__ inline void add_products(TileMemory& memory, const Matrix& from, Row row, int channel,
                                    float (&sums)[kChannels / kSlice][8]) {
  const int r = threadIdx.x / 8, lane = threadIdx.x % 8;
#pragma unroll
  for (int slice = 0; slice < kChannels / kSlice; ++slice) {
    const int first = channel + slice * kSlice;
    if (first >= from.width) break;
    __syncthreads();
    load_slice(memory.b, from.width, first, numbers_of(from, row));
    __syncthreads();
    for (int j = 0; j < 32; ++j) {
      const float x = kTransposed ? memory.scores[j][r] : memory.scores[r][j];
      for (int c = 0; c < 8; ++c) sums[slice][c] += x * memory.b[j][lane + 8 * c];
    }
  }
}

__device__ inline void store_sums(const Matrix& to, int64_t row, int channel, const float (&sums)[kChannels / kSlice][8]) {
#pragma unroll
  for (int slice = 0; slice < kChannels / kSlice; ++slice)
    for (int c = 0; c < 8; ++c) {
      const int at = channel + slice * kSlice + threadIdx.x % 8 + 8 * c;
      if (at < to.width) to.row<float>(row)[at] = sums[slice][c];
    }
}

/// Grid as attend's; z: slices of q's channels.
__global__ void __launch_bounds__(kTileThreads)
    d_q_kernel(const __grid_constant__ AttentionView a, const __grid_constant__ RowTiles tiles,
               const __grid_constant__ Gradient gradient) {
  __shared__ TileMemory memory;
  __shared__ int64_t q_rows[kRows];
  const int r = threadIdx.x / 8, lane = threadIdx.x % 8, channel = blockIdx.z * kChannels;
  const QueryRow at = tile_row(a, tiles, kRows, r);
  const bool there = at.i < at.n;
  if (!__syncthreads_or(there)) return;
  if (lane == 0) q_rows[r] = at.live ? at.row : -1;
  int from, limit;
  key_range(a, at, from, limit);
  KeyStages<kKeys> stages(a.plan, block_plan_row(a, tiles), from, limit, -1);
  const float gain = at.live && a.mods.gain ? a.mods.gain[at.row] : 1, lse = at.live ? gradient.lse[at.row] : 0,
              out_dot = at.live ? gradient.out_dot[at.row] : 0;
  float sums[kChannels / kSlice][8] = {};
  while (stages.next()) {
    auto key_row = [&](int64_t first) {
      return [&stages, first](int j) { return stages.key(j) < 0 ? int64_t(-1) : first + stages.key(j); };
    };
    auto q_row = [&](int i) { return q_rows[i]; };
    tile_dots(memory, a.d, numbers_of(a.q, q_row), numbers_of(a.k, key_row(at.k_first)));
    float p[4], slope[4];
    for (int j = 0; j < 4; ++j) {
      const int key = stages.key(lane + 8 * j);
      p[j] = slope[j] = 0;
      if (key >= 0 && sees(a, at, key) && mask_shows(a.plan, stages.entry(lane + 8 * j), at.i % a.plan.q_tile, key))
        p[j] = probability(a, logit_of(a, at, key, memory.scores[r][lane + 8 * j], &slope[j]), lse);
    }
    tile_dots(memory, a.d_v, numbers_of(gradient.d_out, q_row), numbers_of(a.v, key_row(at.v_first)));
    for (int j = 0; j < 4; ++j) {
      float& x = memory.scores[r][lane + 8 * j];
      x = slope[j] == 0 ? 0 : d_logit(a, p[j], gain * x, out_dot) * slope[j];
    }
    add_products<false>(memory, a.k, key_row(at.k_first), channel, sums);
  }
  if (there) store_sums(gradient.to, at.row, channel, sums);
}

/// Grid: key tiles (strided), segments of k (or v), slices of channels. Rows of every query head that reads the segment
/// pass by in order.
template <bool kValues>
__global__ void __launch_bounds__(kTileThreads)
    d_key_kernel(const __grid_constant__ AttentionView a, const __grid_constant__ Gradient gradient) {
  __shared__ TileMemory memory;
  __shared__ int64_t q_rows[kRows];
  const int r = threadIdx.x / 8, lane = threadIdx.x % 8, channel = blockIdx.z * kChannels, segment = blockIdx.y;
  const Segments& own = kValues ? a.vs : a.ks;
  const int own_heads = kValues ? a.g_v : a.g, sequence = segment / own_heads, own_head = segment % own_heads;
  const int length = own.length(segment), n = a.qs.length(sequence * a.h);
  for (int first = blockIdx.x * kKeys; first < length; first += gridDim.x * kKeys) {
    float sums[kChannels / kSlice][8] = {}, bias = 0;
    for (int head = 0; head < a.h; ++head) {
      if ((kValues ? v_head(a, head) : k_head(a, head)) != own_head) continue;
      const int start = a.plan.causal ? max(0, first - (length - n)) / kRows * kRows : 0;
      for (int i0 = start; i0 < n; i0 += kRows) {
        const QueryRow at = query_row(a, sequence, head, i0 + r);
        const int64_t row_of_plan = at.i < at.n && a.plan.form != Plan::Form::Dense ? plan_row(a, sequence, head, at.i) : 0;
        bool seen[4], any = false;
        for (int j = 0; j < 4; ++j) {
          const int key = first + lane + 8 * j;
          seen[j] = sees(a, at, key) && named_in(a.plan, row_of_plan, at.i % a.plan.q_tile, key) >= 0;
          any |= seen[j];
        }
        if (!__syncthreads_or(any)) continue;
        if (lane == 0) q_rows[r] = at.live ? at.row : -1;
        auto q_row = [&](int i) { return q_rows[i]; };
        auto key_row = [&](int64_t begin) {
          return [=](int j) { return first + j < length ? begin + first + j : int64_t(-1); };
        };
        tile_dots(memory, a.d, numbers_of(a.q, q_row), numbers_of(a.k, key_row(at.k_first)));
        float p[4], slope[4];
        for (int j = 0; j < 4; ++j) {
          p[j] = slope[j] = 0;
          if (seen[j])
            p[j] = probability(a, logit_of(a, at, first + lane + 8 * j, memory.scores[r][lane + 8 * j], &slope[j]),
                               gradient.lse[at.row]);
        }
        const float gain = at.live && a.mods.gain ? a.mods.gain[at.row] : 1;
        if constexpr (kValues) {
          for (int j = 0; j < 4; ++j) memory.scores[r][lane + 8 * j] = gain * p[j];
          add_products<true>(memory, gradient.d_out, q_row, channel, sums);
        } else {
          tile_dots(memory, a.d_v, numbers_of(gradient.d_out, q_row), numbers_of(a.v, key_row(at.v_first)));
          float d[4];
          for (int j = 0; j < 4; ++j) {
            d[j] = seen[j] ? d_logit(a, p[j], gain * memory.scores[r][lane + 8 * j], gradient.out_dot[at.row]) : 0;
            memory.scores[r][lane + 8 * j] = d[j];
          }
          __syncthreads();
          if (gradient.bias)
            for (int q = 0; q < 4; ++q) bias += memory.scores[lane + 8 * q][r];
          __syncthreads();
          for (int j = 0; j < 4; ++j) memory.scores[r][lane + 8 * j] = d[j] * slope[j];
          add_products<true>(memory, a.q, q_row, channel, sums);
        }
        __syncthreads();
      }
    }
    if (first + r < length) {
      const int64_t row = own.begin(segment) + first + r;
      store_sums(gradient.to, row, channel, sums);
    }
    if (!kValues && gradient.bias) {
      bias = warp_sum(bias, 8);
      if (first + r < length && lane == 0 && channel == 0) gradient.bias[own.begin(segment) + first + r] = bias;
    }
  }
}

}  // namespace

void attend_backward(Queue& queue, const Ragged& q, const Ragged& k, const Ragged& v, const Plan& plan,
                     const Mods& mods, Tensor out, Tensor lse, Tensor d_out, Tensor d_q, Tensor d_k, Tensor d_v,
                     Tensor d_key_bias, Tensor d_gain) {
  constexpr const char* where = "attend_backward";
  const AttentionView a = attention_view(where, q, k, v, &plan, mods);
  const int64_t rows = q.values.size[0], keys = k.values.size[0];
  check_tensor(where, "out", out, {rows, a.d_v});
  check_tensor(where, "lse", lse, {rows});
  check_tensor(where, "d_out", d_out, {rows, a.d_v});
  check_tensor(where, "d_q", d_q, {rows, a.d});
  check_tensor(where, "d_k", d_k, {keys, a.d});
  check_tensor(where, "d_v", d_v, {v.values.size[0], a.d_v});
  check_tensor(where, "d_key_bias", d_key_bias, {keys}, true);
  check_tensor(where, "d_gain", d_gain, {rows}, true);
  if (attend_backward_sm90(queue, q, k, v, plan, mods, out, lse, d_out, d_q, d_k, d_v, d_key_bias, d_gain)) return;
  Scratch scratch(queue.scratch);
  float* dots = queue.scratch.take(Dtype::F32, {std::max<int64_t>(rows, 1)}).as<float>();
  const unsigned q_segments = unsigned(q.segments());
  launch(queue, where, out_dot_kernel, dim3(blocks_for(ceil_div(a.n_bound, 8), q_segments), q_segments), 256, 0, a,
         matrix(out), matrix(d_out), dots, d_gain.as<float>());
  if (attend_backward_mma(
          queue, a,
          {{}, matrix(d_out), lse.as<float>(), dots, matrix(d_q), matrix(d_k), matrix(d_v), d_key_bias.as<float>()}))
    return;
  Gradient gradient{matrix(d_out), matrix(out), lse.as<float>(), dots, matrix(d_q), nullptr};
  const RowTiles tiles = row_tiles(a, kRows);
  dim3 grid = tiles.grid;
  grid.z = unsigned(ceil_div(a.d, kChannels));
  launch(queue, where, d_q_kernel, grid, kTileThreads, 0, a, tiles, gradient);
  auto key_grid = [](int64_t bound, int64_t segments, int64_t width) {
    return dim3(blocks_for(ceil_div(bound, kKeys), segments), unsigned(segments), unsigned(ceil_div(width, kChannels)));
  };
  gradient.to = matrix(d_v);
  launch(queue, where, d_key_kernel<true>, key_grid(v.values.size[0], v.segments(), a.d_v), kTileThreads, 0, a, gradient);
  gradient.to = matrix(d_k);
  gradient.bias = d_key_bias.as<float>();
  launch(queue, where, d_key_kernel<false>, key_grid(keys, k.segments(), a.d), kTileThreads, 0, a, gradient);
}

}  // namespace heed::cuda
