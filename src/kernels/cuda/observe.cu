#include "kernels/cuda/observe.cuh"

#include "kernels/cuda/page.cuh"
#include "kernels/cuda/tile.cuh"

namespace heed::cuda {

Observed::Observed(Queue& queue, const char* where, const Keys& keys, const Mods& given) : mods(given) {
  require(!keys.panel != !keys.pages, where, "keys come from a panel or from pages");
  if (keys.panel) {
    k = *keys.panel;
    return;
  }
  const Unpacked panel = unpack(queue, where, *keys.pages, keys.read, true, false);
  k = panel.k;
  mods.key_bias = panel.bias;
  mods.k_pos = panel.positions;
  mods.until = mods.key_factor = mods.row_factor = {};
}

namespace {

using Rows = Observe::Rows;
using Heads = Observe::Heads;

/// Grid: key tiles (strided), segments of k. Thread (w, j) of eight by 32 folds rows w, w + 8, … of key j.
__global__ void __launch_bounds__(kTileThreads)
    observe_kernel(const __grid_constant__ AttentionView a, const __grid_constant__ ObservedColumns to) {
  __shared__ TileMemory memory;
  __shared__ int64_t q_rows[kRows];
  __shared__ float folds[8][kKeys + 1], counts[8][kKeys + 1];
  const int r = threadIdx.x / 8, lane = threadIdx.x % 8, w = threadIdx.x / 32, own_key = threadIdx.x % 32;
  const int segment = blockIdx.y, sequence = segment / a.g, own_head = segment % a.g;
  const int m = a.ks.length(segment), n = a.qs.length(sequence * a.h);
  const bool largest = to.rows == Rows::Max, last = to.rows == Rows::Last;
  const float nothing = to.logits && (largest || last) ? -kInfinity : 0;
  for (int first = blockIdx.x * kKeys; first < m; first += gridDim.x * kKeys) {
    int group = 0;
    float sum = 0, top = -kInfinity;
    for (int head = 0; head < a.h; ++head) {
      if (k_head(a, head) != own_head) continue;
      float fold = nothing, count = 0;
      int start = last ? (n - 1) / kRows * kRows : 0;
      if (a.plan.causal) start = max(start, max(0, first - (m - n)) / kRows * kRows);
      for (int i0 = start; i0 < n; i0 += kRows) {
        const QueryRow row = query_row(a, sequence, head, i0 + r);
        const int64_t row_of_plan = row.live && a.plan.form != Plan::Form::Dense ? plan_row(a, sequence, head, row.i) : 0;
        bool seen[4], any = false;
        for (int j = 0; j < 4; ++j) {
          const int key = first + lane + 8 * j;
          seen[j] = (!last || row.i == n - 1) && sees(a, row, key) &&
                    named_in(a.plan, row_of_plan, row.i % a.plan.q_tile, key) >= 0;
          any |= seen[j];
        }
        if (!__syncthreads_or(any)) continue;
        if (lane == 0) q_rows[r] = row.live ? row.row : -1;
        tile_dots(memory, a.d, numbers_of(a.q, [&](int i) { return q_rows[i]; }),
                  numbers_of(a.k, [&](int j) { return first + j < m ? row.k_first + first + j : int64_t(-1); }));
        float by = 1;
        if (to.rows == Rows::Decayed && row.live) by = powf(to.decay, float(n - 1 - row.i));
        for (int j = 0; j < 4; ++j) {
          float& x = memory.scores[r][lane + 8 * j];
          if (!seen[j]) {
            x = __int_as_float(0x7fffffff);  // NaN: not seen
            continue;
          }
          const float logit = logit_of(a, row, first + lane + 8 * j, x);
          x = by * (to.logits ? logit : a.mods.sigmoid ? 1 / (1 + expf(-logit)) : expf(logit - to.lse[row.row]));
        }
        __syncthreads();
        for (int q = w; q < kRows; q += 8) {
          const float x = memory.scores[q][own_key];
          if (isnan(x)) continue;
          count += 1;
          fold = largest ? fmaxf(fold, x) : last ? x : fold + x;
        }
      }
      folds[w][own_key] = fold;
      counts[w][own_key] = count;
      __syncthreads();
      if (w == 0) {
        for (int other = 1; other < 8; ++other) {
          const float x = folds[other][own_key];
          if (largest) fold = fmaxf(fold, x);
          else if (!last) fold += x;
          else if (counts[other][own_key] > 0) fold = x;
          count += counts[other][own_key];
        }
        if (to.rows == Rows::Mean && n > 0) fold /= float(n);
        if (to.rows == Rows::Seen && count > 0) fold /= count;
        if (to.heads == Heads::Each && first + own_key < m)
          to.values.set(to.at.begin(segment) + first + own_key, group, fold);
        sum += fold;
        top = fmaxf(top, fold);
      }
      ++group;
      __syncthreads();
    }
    if (w == 0 && first + own_key < m && to.heads != Heads::Each) {
      float result = nothing;
      if (group > 0)
        result = to.heads == Heads::GroupMean ? sum / float(group) : to.heads == Heads::GroupMax ? top : sum;
      else if (to.heads == Heads::LayerMean) result = 0;
      to.values.set(to.at.begin(segment) + first + own_key, 0, result);
    }
  }
}

/// Means over all heads of a sequence, of the KV heads' sums.
__global__ void layer_mean_kernel(Matrix sums, Segments at, int g, int h, Matrix to) {
  const int segment = blockIdx.y, sequence = segment / g, m = at.length(segment);
  for (int j = blockIdx.x * blockDim.x + threadIdx.x; j < m; j += gridDim.x * blockDim.x) {
    float sum = 0;
    for (int head = 0; head < g; ++head) {
      const int other = sequence * g + head;
      if (j < at.length(other)) sum += sums.get(at.begin(other) + j);
    }
    to.set(at.begin(segment) + j, 0, sum / float(h));
  }
}

}  // namespace

void observe(Queue& queue, const Ragged& q, const Keys& keys, const Plan* plan, const Mods& mods, const Observe& how,
             Ragged columns) {
  constexpr const char* where = "observe";
  if (observe_last(queue, q, keys, plan, mods, how, columns)) return;
  Scratch scratch(queue.scratch);
  const Observed from(queue, where, keys, mods);
  AttentionView a = attention_view(where, q, from.k, {}, plan, from.mods);
  a.mods.gain = nullptr;  // observations are of probabilities, whatever an output is multiplied by
  require(columns.segments() == from.k.segments(), where, "columns have the keys' segments");
  const int64_t width = columns.values.rank == 2 ? columns.values.size[1] : 1;
  require(how.heads != Heads::Each || (!mods.k_map && width == a.h / a.g), where,
          "each head apart needs columns [keys, group] and no k_map");
  check_tensor(where, "lse", how.lse, {q.values.size[0]}, true);
  const float* lse = how.lse.as<float>();
  if (!lse && !how.logits && !a.mods.sigmoid) {
    float* sums = queue.scratch.take(Dtype::F32, {std::max<int64_t>(1, q.values.size[0])}).as<float>();
    row_lse(queue, a, sums);
    lse = sums;
  }
  const unsigned segments_of = unsigned(from.k.segments());
  ObservedColumns to{matrix(columns.values),
                     segments(columns),
                     columns.values.size[0],
                     lse,
                     how.rows,
                     how.heads,
                     how.decay,
                     how.logits};
  if (how.heads == Heads::LayerMean)
    to.values = matrix(queue.scratch.take(Dtype::F32, {std::max<int64_t>(1, columns.values.size[0])}));
  if (observes_on_tensor_cores(a) && !(how.logits && how.rows == Rows::Decayed)) {
    observe_mma(queue, a, to);
  } else {
    const dim3 grid(blocks_for(ceil_div(a.m_bound, kKeys), segments_of), segments_of);
    launch(queue, where, observe_kernel, grid, kTileThreads, 0, a, to);
  }
  if (how.heads == Heads::LayerMean)
    launch(queue, where, layer_mean_kernel, dim3(blocks_for(ceil_div(a.m_bound, 256), segments_of), segments_of), 256,
           0, to.values, to.at, a.g, a.h, matrix(columns.values));
}

}  // namespace heed::cuda
