// observe and lse of rows on the tensor cores: bf16 keys, dense plans, and the mods that language models have.
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/observe.cuh"

namespace heed::cuda {
namespace {

using mma::Held;
using mma::kHeld;
using mma::kLog2e;
using mma::kWarps;
using mma::Stage;
using Rows = Observe::Rows;

constexpr int kStage = 64;

/// q's rows in bf16, as many as there were.
Matrix rounded(Queue& queue, const AttentionView& a) {
  const Tensor narrow = queue.scratch.take(Dtype::BF16, {a.q_rows, int64_t(a.d)});
  round_rows(queue, "observe", a.q, a.q_rows, matrix(narrow));
  return matrix(narrow);
}

/// Folds of rows, before heads are put together: [shares, columns' rows, group].
struct Folds {
  float *fold, *count;  // count: rows that see the key, for Rows::Seen, else null
  int64_t rows;
  int shares;
  __device__ int64_t at(int share, int64_t row, int group, int member) const {
    return (share * rows + row) * group + member;
  }
};

__device__ inline bool takes_largest(const ObservedColumns& to) {
  return to.rows == Rows::Max || (to.rows == Rows::Last && to.logits);
}

/// Grid: blocks of keys (strided), segments of k, shares of the stages of query rows. A warp holds 16 · kHeld keys and folds
/// rows as they pass.
template <int D, bool kLogits>
__global__ void __launch_bounds__(32 * kWarps)
    observe_mma_kernel(const __grid_constant__ AttentionView a, Matrix q, const __grid_constant__ ObservedColumns to,
                       const __grid_constant__ Folds folds) {
  extern __shared__ __align__(16) char shared[];
  Stage<D>* stages = reinterpret_cast<Stage<D>*>(shared);
  __shared__ float lse[2][kStage];
  __shared__ int q_pos[2][kStage];
  constexpr int kTiles = kHeld<D>, kOwn = 16 * kTiles, kBlock = kWarps * kOwn;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int segment = blockIdx.y, sequence = segment / a.g, own_head = segment % a.g, group = a.h / a.g;
  const int m = a.ks.length(segment), n = a.qs.length(sequence * a.h);
  const int64_t k_first = a.ks.begin(segment), out_first = to.at.begin(segment);
  const bool largest = takes_largest(to), last = to.rows == Rows::Last;
  // Probabilities are powers of two: logits are kept in that unit.
  const float nothing = kLogits && largest ? -kInfinity : 0, unit = kLogits ? 1 : kLog2e, scale = unit * a.mods.scale,
              cap = unit * a.mods.softcap;
  for (int first = blockIdx.x * kBlock; first < m; first += gridDim.x * kBlock) {
    const int own = first + warp * kOwn;
    Held<kTiles, D> keys;
    keys.load(a.d, [&](int r) { return own + r < m ? a.k.row<const __nv_bfloat16>(k_first + own + r) : nullptr; });
    // Of the keys that this lane has sums of, tile t, lower and upper: number own + 16 t + lane / 4 (+ 8).
    int position[kTiles][2];
    float bias[kTiles][2];
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
      for (int u = 0; u < 2; ++u) {
        const int key = min(own + 16 * t + lane / 4 + 8 * u, m - 1);
        position[t][u] = a.mods.k_pos ? a.mods.k_pos[k_first + key] : key;
        bias[t][u] = a.mods.key_bias ? unit * a.mods.key_bias[k_first + key] : 0;
      }
    int start = last ? max(n - 1, 0) : 0;
    if (a.plan.causal) start = max(start, first - (m - n));
    start = start / kStage * kStage + int(blockIdx.z) * kStage;
    const int stride = kStage * folds.shares;
    for (int member = 0; member < group; ++member) {
      const int64_t rows = a.qs.begin(sequence * a.h + own_head * group + member);
      float fold[kTiles][2], count[kTiles][2];
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
        for (int u = 0; u < 2; ++u) fold[t][u] = nothing, count[t][u] = 0;
      auto fetch = [&](int i0, int slot) {
        stages[slot].load(a.d, q.row<const __nv_bfloat16>(0),
                          [&](int r) { return i0 + r < n ? q.row<const __nv_bfloat16>(rows + i0 + r) : nullptr; });
        mma::copies_begun();
        for (int r = threadIdx.x; r < kStage; r += blockDim.x) {
          const int i = min(i0 + r, n - 1);
          q_pos[slot][r] = a.mods.q_pos ? a.mods.q_pos[rows + i] : m - n + i;
          if (kLogits) continue;
          // e^(logit − lse) · decay^(n − 1 − i) as a power of two; a row that sees nothing weighs nothing.
          float x = to.lse[rows + i];
          x = x == -kInfinity ? kInfinity : x * kLog2e;
          if (to.rows == Rows::Decayed) x -= float(n - 1 - i) * log2f(to.decay);
          lse[slot][r] = x;
        }
      };
      /// What row r of the stage adds to a key, from their dot product.
      auto term = [&](float dot, float by, int slot, int r) {
        float x = dot * scale;
        if (cap > 0) x = cap * tanhf(x / cap);
        x += by;
        return kLogits ? x : mma::power_of_two(x - lse[slot][r]);
      };
      if (start < n) fetch(start, 0);
      for (int i0 = start, slot = 0; i0 < n; i0 += stride, slot ^= 1) {
        if (i0 + stride < n) {
          fetch(i0 + stride, slot ^ 1);
          mma::await_copies<1>();
        } else {
          mma::await_copies<0>();
        }
        __syncthreads();
        const bool all = !last && !largest && cap == 0 && a.mods.window == 0 && i0 + kStage <= n &&
                         first + kBlock <= m && (!a.plan.causal || first + kBlock - 1 <= m - n + i0);
        if (all) {
#pragma unroll 4
          for (int column = 0; column < kStage / 8; ++column) {
            float dots[kTiles][4];
            stages[slot].products(keys, column, dots);
            const int r = 8 * column + 2 * (lane % 4);
            const float low = kLogits ? 0 : lse[slot][r], high = kLogits ? 0 : lse[slot][r + 1];
#pragma unroll
            for (int t = 0; t < kTiles; ++t)
#pragma unroll
              for (int u = 0; u < 2; ++u) {
                const float x = fmaf(dots[t][2 * u], scale, bias[t][u] - low),
                            y = fmaf(dots[t][2 * u + 1], scale, bias[t][u] - high);
                fold[t][u] += kLogits ? x + y : mma::power_of_two(x) + mma::power_of_two(y);
              }
          }
#pragma unroll
          for (int t = 0; t < kTiles; ++t) count[t][0] += kStage / 4, count[t][1] += kStage / 4;
        } else {
#pragma unroll 1
          for (int column = 0; column < kStage / 8; ++column) {
            float dots[kTiles][4];
            stages[slot].products(keys, column, dots);
#pragma unroll
            for (int t = 0; t < kTiles; ++t)
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                const int u = e / 2, r = 8 * column + 2 * (lane % 4) + e % 2;
                const int key = own + 16 * t + lane / 4 + 8 * u, i = i0 + r;
                const bool seen = key < m && i < n && (!last || i == n - 1) && (!a.plan.causal || key - i <= m - n) &&
                                  (a.mods.window == 0 || q_pos[slot][r] - position[t][u] < a.mods.window);
                const float x = term(dots[t][e], bias[t][u], slot, r);
                if (!seen) continue;
                count[t][u] += 1;
                fold[t][u] = largest ? fmaxf(fold[t][u], x) : fold[t][u] + x;
              }
          }
        }
        __syncthreads();
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          float x = fold[t][u], seen = count[t][u];
          for (int step = 1; step < 4; step *= 2) {
            const float other = __shfl_xor_sync(0xffffffffu, x, step);
            x = largest ? fmaxf(x, other) : x + other;
            seen += __shfl_xor_sync(0xffffffffu, seen, step);
          }
          const int key = own + 16 * t + lane / 4 + 8 * u;
          if (lane % 4 != 0 || key >= m) continue;
          const int64_t at = folds.at(blockIdx.z, out_first + key, group, member);
          folds.fold[at] = x;
          if (folds.count) folds.count[at] = seen;
        }
    }
  }
}

/// Grid: keys (strided), segments of k.
__global__ void join_folds_kernel(const __grid_constant__ AttentionView a, const __grid_constant__ ObservedColumns to,
                                  const __grid_constant__ Folds folds) {
  const int segment = blockIdx.y, m = a.ks.length(segment), n = a.qs.length(segment / a.g * a.h), group = a.h / a.g;
  const bool largest = takes_largest(to);
  for (int key = blockIdx.x * blockDim.x + threadIdx.x; key < m; key += gridDim.x * blockDim.x) {
    const int64_t row = to.at.begin(segment) + key;
    float sum = 0, top = -kInfinity;
    for (int member = 0; member < group; ++member) {
      float x = folds.fold[folds.at(0, row, group, member)], seen = 0;
      for (int s = 0; s < folds.shares; ++s) {
        const int64_t at = folds.at(s, row, group, member);
        if (s > 0) x = largest ? fmaxf(x, folds.fold[at]) : x + folds.fold[at];
        if (folds.count) seen += folds.count[at];
      }
      if (to.rows == Rows::Mean && n > 0) x /= float(n);
      if (seen > 0) x /= seen;
      if (to.heads == Observe::Heads::Each) to.values.set(row, member, x);
      sum += x, top = fmaxf(top, x);
    }
    if (to.heads != Observe::Heads::Each)
      to.values.set(row, 0,
                    to.heads == Observe::Heads::GroupMean  ? sum / float(group)
                    : to.heads == Observe::Heads::GroupMax ? top
                                                           : sum);
  }
}

/// Grid: tiles of rows, (sequence, KV head), shares of the keys. A warp holds 16 · kHeld rows, numbered i · group + member.
template <int D>
__global__ void __launch_bounds__(32 * kWarps)
    row_lse_mma_kernel(const __grid_constant__ AttentionView a, Matrix q, int64_t share_keys, int shares, float* lse) {
  extern __shared__ __align__(16) char shared[];
  Stage<D>* stages = reinterpret_cast<Stage<D>*>(shared);
  __shared__ int k_pos[2][kStage];
  __shared__ float k_bias[2][kStage];
  constexpr int kTiles = kHeld<D>, kOwn = 16 * kTiles, kBlock = kWarps * kOwn;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int segment = blockIdx.y, sequence = segment / a.g, group = a.h / a.g, head = segment % a.g * group;
  const int m = a.ks.length(segment), n = a.qs.length(sequence * a.h), first = blockIdx.x * kBlock;
  if (first >= n * group) return;
  const int64_t k_first = a.ks.begin(segment);
  const int own = first + warp * kOwn;
  auto row_of = [&](int r) { return a.qs.begin(sequence * a.h + head + r % group) + r / group; };
  Held<kTiles, D> rows;
  rows.load(a.d, [&](int r) { return own + r < n * group ? q.row<const __nv_bfloat16>(row_of(own + r)) : nullptr; });
  int at[kTiles][2], position[kTiles][2];
  float top[kTiles][2], sum[kTiles][2];
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
    for (int u = 0; u < 2; ++u) {
      const int r = min(own + 16 * t + lane / 4 + 8 * u, n * group - 1);
      at[t][u] = r / group;
      position[t][u] = a.mods.q_pos ? a.mods.q_pos[row_of(r)] : m - n + r / group;
      top[t][u] = -kInfinity, sum[t][u] = 0;
    }
  const int last_row = min(first + kBlock, n * group) - 1;
  int from = 0, limit = a.plan.causal ? min(m, m - n + last_row / group + 1) : m;
  if (shares > 1) {
    from = int(blockIdx.z * share_keys);
    if (int(blockIdx.z) < shares - 1) limit = int(min(int64_t(limit), (blockIdx.z + 1) * share_keys));
  }
  const float scale = kLog2e * a.mods.scale, cap = kLog2e * a.mods.softcap;  // logits in powers of two
  auto fetch = [&](int j0, int slot) {
    stages[slot].load(a.d, a.k.row<const __nv_bfloat16>(k_first),
                      [&](int j) { return j0 + j < m ? a.k.row<const __nv_bfloat16>(k_first + j0 + j) : nullptr; });
    mma::copies_begun();
    for (int j = threadIdx.x; j < kStage; j += blockDim.x) {
      const int key = min(j0 + j, m - 1);
      k_pos[slot][j] = a.mods.k_pos ? a.mods.k_pos[k_first + key] : key;
      k_bias[slot][j] = a.mods.key_bias ? kLog2e * a.mods.key_bias[k_first + key] : 0;
    }
  };
  if (from < limit) fetch(from, 0);
  for (int j0 = from, slot = 0; j0 < limit; j0 += kStage, slot ^= 1) {
    if (j0 + kStage < limit) {
      fetch(j0 + kStage, slot ^ 1);
      mma::await_copies<1>();
    } else {
      mma::await_copies<0>();
    }
    __syncthreads();
    const bool all = a.mods.window == 0 && j0 + kStage <= limit &&
                     (!a.plan.causal || j0 + kStage - 1 <= m - n + first / group);
#pragma unroll 1
    for (int half = 0; half < kStage / 32; ++half) {
      float x[4][kTiles][4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int column = 4 * half + c;
        stages[slot].products(rows, column, x[c]);
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int u = e / 2, j = 8 * column + 2 * (lane % 4) + e % 2;
            float logit = x[c][t][e] * scale;
            if (cap > 0) logit = cap * tanhf(logit / cap);
            logit += k_bias[slot][j];
            const int key = j0 + j;
            if (!all && !(key < limit && (!a.plan.causal || key - at[t][u] <= m - n) &&
                          (a.mods.window == 0 || position[t][u] - k_pos[slot][j] < a.mods.window)))
              logit = -kInfinity;
            x[c][t][e] = logit;
          }
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          float highest = top[t][u];
          for (int c = 0; c < 4; ++c) highest = fmaxf(highest, fmaxf(x[c][t][2 * u], x[c][t][2 * u + 1]));
          if (highest == -kInfinity) continue;
          float more = 0;
          for (int c = 0; c < 4; ++c)
            more += mma::power_of_two(x[c][t][2 * u] - highest) + mma::power_of_two(x[c][t][2 * u + 1] - highest);
          sum[t][u] = sum[t][u] * mma::power_of_two(top[t][u] - highest) + more;
          top[t][u] = highest;
        }
    }
    __syncthreads();
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      float highest = top[t][u], all = sum[t][u];
      for (int step = 1; step < 4; step *= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, highest, step), more = __shfl_xor_sync(0xffffffffu, all, step);
        const float most = fmaxf(highest, other);
        if (most > -kInfinity) all = all * exp2f(highest - most) + more * exp2f(other - most);
        highest = most;
      }
      const int r = own + 16 * t + lane / 4 + 8 * u;
      if (lane % 4 != 0 || r >= n * group) continue;
      float result = all > 0 ? highest / kLog2e + logf(all) : -kInfinity;
      if (a.mods.sink_logits && blockIdx.z == 0) {
        const float sink = a.mods.sink_logits[head + r % group], most = fmaxf(result, sink);
        result = most + logf(expf(result - most) + expf(sink - most));
      }
      lse[blockIdx.z * a.q_rows + row_of(r)] = result;
    }
}

}  // namespace

bool observes_on_tensor_cores(const AttentionView& a) {
  const ModsView& m = a.mods;
  return mma::rows_fit(a.k) && a.d <= 256 && a.q_rows > 0 && a.plan.form == Plan::Form::Dense && a.plan.parts == 1 &&
         !m.until && !m.k_map && !m.temperature && !m.gain && !m.row_factor && !m.sigmoid;
}

void observe_mma(Queue& queue, const AttentionView& a, const ObservedColumns& to) {
  constexpr const char* where = "observe";
  const Scratch scratch(queue.scratch);
  const Matrix q = rounded(queue, a);
  const unsigned segments = unsigned(a.ks.count);
  const int group = a.h / a.g;
  mma::with_width(a.d, [&]<int D>() {
    // Blocks stride over the keys, so a guess of how many a segment has will do. Rows are divided until some four blocks a
    // multiprocessor of a large GPU have work: of causal attention the first keys have all rows, the last ones few.
    const int64_t blocks = ceil_div(ceil_div(a.m_bound, std::max(1u, segments)), kWarps * 16 * kHeld<D>) + 1;
    Folds folds{nullptr, nullptr, to.bound, 1};
    const int64_t most = to.rows == Rows::Last ? 1 : std::min<int64_t>(16, ceil_div(a.n_bound, 4 * kStage));
    while (folds.shares * 2 <= most && folds.shares * blocks * segments < 2048) folds.shares *= 2;
    const int64_t count = std::max<int64_t>(1, folds.shares * folds.rows * group);
    folds.fold = queue.scratch.take(Dtype::F32, {count}).as<float>();
    if (to.rows == Rows::Seen) folds.count = queue.scratch.take(Dtype::F32, {count}).as<float>();
    const dim3 grid(blocks_for(blocks, segments), segments, unsigned(folds.shares));
    const size_t shared = 2 * sizeof(Stage<D>);
    if (to.logits) launch(queue, where, observe_mma_kernel<D, true>, grid, 32 * kWarps, shared, a, q, to, folds);
    else launch(queue, where, observe_mma_kernel<D, false>, grid, 32 * kWarps, shared, a, q, to, folds);
    launch(queue, where, join_folds_kernel, dim3(blocks_for(ceil_div(a.m_bound, 256), segments), segments), 256, 0, a,
           to, folds);
  });
}

void row_lse_mma(Queue& queue, const AttentionView& a, int64_t share_keys, int shares, float* lse) {
  const Scratch scratch(queue.scratch);
  const Matrix q = rounded(queue, a);
  mma::with_width(a.d, [&]<int D>() {
    const dim3 grid(unsigned(ceil_div(a.n_bound * (a.h / a.g), kWarps * 16 * kHeld<D>)), unsigned(a.ks.count),
                    unsigned(shares));
    launch(queue, "observe", row_lse_mma_kernel<D>, grid, 32 * kWarps, 2 * sizeof(Stage<D>), a, q, share_keys, shares, lse);
  });
}

}  // namespace heed::cuda
