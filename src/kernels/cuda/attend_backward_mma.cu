// Gradients of attention on the tensor cores: bf16 keys and values, head dims up to 128. As attend_backward.cu, without
// atomics: seven products a pair of tiles where sums shared by blocks would take five, and every sum has one order.
#include "kernels/cuda/attend_backward.cuh"
#include "kernels/cuda/mma.cuh"

namespace heed::cuda {
namespace {

using mma::Held;
using mma::KeyRing;
using mma::kLog2e;
using mma::kWarps;
using mma::Stage;

constexpr int kOwn = mma::kBlockRows;

/// Of the pair of row and key: the probability (0 when not seen), and what d_logit is multiplied by for the dot product.
struct Pair {
  float p, slope;
};
__device__ inline Pair pair_of(const AttentionView& a, const QueryRow& at, int key, float dot, float lse, bool bare) {
  float slope = at.factor;
  const float logit = bare ? slope * dot : logit_of(a, at, key, dot, &slope);
  return {mma::power_of_two(kLog2e * (logit - lse)), slope};
}

__device__ inline bool bare_logits(const AttentionView& a) {
  return a.mods.softcap == 0 && !a.mods.key_bias && !a.mods.row_factor;
}

/// Grid as attend_mma's. A warp holds 16 rows of q and d_out; keys and values pass.
template <int D>
__global__ void __launch_bounds__(32 * kWarps)
    d_q_mma_kernel(const __grid_constant__ AttentionView a, const __grid_constant__ RowTiles tiles,
                   const __grid_constant__ Gradients g) {
  constexpr int kStage = 32;
  extern __shared__ __align__(16) char shared[];
  auto* k_stages = reinterpret_cast<Stage<D, kStage>*>(shared);
  __shared__ int keys[2][kStage];
  __shared__ int64_t entries[2][kStage];
  __shared__ int low, high;
  const KeyRing<D, D, kStage> ring{k_stages, k_stages + 2, keys, entries};
  const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16;
  const QueryRow leader = tile_row(a, tiles, kOwn, 0);
  if (leader.i >= leader.n) return;
  const QueryRow rows[2] = {tile_row(a, tiles, kOwn, own + lane / 4), tile_row(a, tiles, kOwn, own + lane / 4 + 8)};
  const int m = leader.m, n = leader.n;
  mma::seen_range(a, rows, m, n, low, high);
  const bool bare = bare_logits(a);
  KeyStages<kStage> stages(a.plan, block_plan_row(a, tiles), min(low, high), high, -1);
  Held<1, D> q, d_out;
  q.load(a.d, mma::lane_rows(g.q, rows));
  d_out.load(a.d_v, mma::lane_rows(g.d_out, rows));
  float gain[2], lse[2], dot[2];
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    gain[u] = rows[u].live && a.mods.gain ? a.mods.gain[rows[u].row] : 1;
    lse[u] = rows[u].live ? g.lse[rows[u].row] : 0, dot[u] = rows[u].live ? g.out_dot[rows[u].row] : 0;
  }
  float sums[D / 8][4] = {};
  ring.each(a, leader, stages, [&](int slot) {
    float x[kStage / 8][4];
#pragma unroll
    for (int column = 0; column < kStage / 8; ++column) {
      float dots[1][4], d_p[1][4];
      ring.k[slot].products(q, column, dots);
      ring.v[slot].products(d_out, column, d_p);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int u = e / 2, j = 8 * column + 2 * (lane % 4) + e % 2, key = keys[slot][j];
        const QueryRow& at = rows[u];
        x[column][e] = 0;
        if (!ring.shows(a, at, slot, j)) continue;
        const Pair pair = pair_of(a, at, key, dots[0][e], lse[u], bare);
        x[column][e] = pair.p * (gain[u] * d_p[0][e] - dot[u]) * pair.slope;
      }
    }
#pragma unroll
    for (int step = 0; step < kStage / 16; ++step) {
      uint32_t weights[4];
      mma::weights_of(x[2 * step], x[2 * step + 1], weights);
      ring.k[slot].add_rows(weights, step, sums);
    }
  });
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    if (rows[u].i >= rows[u].n) continue;
#pragma unroll
    for (int c = 0; c < D / 8; ++c)
      for (int e = 0; e < 2; ++e) {
        const int channel = 8 * c + 2 * (lane % 4) + e;
        if (channel < a.d) g.d_q.row<float>(rows[u].row)[channel] = rows[u].live ? sums[c][2 * u + e] : 0;
      }
  }
}

/// Grid: blocks of keys (strided), segments of k. A warp holds 16 keys and values; rows of q and d_out of every query head
/// that reads them pass in order.
template <int D>
__global__ void __launch_bounds__(32 * kWarps)
    d_kv_mma_kernel(const __grid_constant__ AttentionView a, const __grid_constant__ Gradients g) {
  constexpr int kStage = 32;
  extern __shared__ __align__(16) char shared[];
  auto* q_stages = reinterpret_cast<Stage<D, kStage>*>(shared);
  auto* o_stages = q_stages + 2;
  struct Row {
    float factor, gain, lse, dot;
    int64_t q_pos;
    bool live;
  };
  __shared__ Row rows[2][kStage];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, segment = blockIdx.y, sequence = segment / a.g,
            own_head = segment % a.g, group = a.h / a.g;
  const int m = a.ks.length(segment), n = a.qs.length(sequence * a.h);
  const int64_t k_first = a.ks.begin(segment), v_first = a.vs.begin(segment);
  const bool planned = a.plan.form != Plan::Form::Dense, bare = bare_logits(a),
             asks = a.mods.until || a.mods.window > 0 || a.mods.gain;
  for (int first = blockIdx.x * kOwn; first < m; first += gridDim.x * kOwn) {
    const int own = first + 16 * warp;
    Held<1, D> keys, values;
    keys.load(a.d, [&](int r) { return own + r < m ? a.k.row<const __nv_bfloat16>(k_first + own + r) : nullptr; });
    values.load(a.d_v, [&](int r) { return own + r < m ? a.v.row<const __nv_bfloat16>(v_first + own + r) : nullptr; });
    float d_k[D / 8][4] = {}, d_v[D / 8][4] = {}, bias[2] = {};
    const int start = a.plan.causal ? max(0, first - (m - n)) / kStage * kStage : 0;
    for (int member = 0; member < group; ++member) {
      const int head = own_head * group + member;
      // Stages of rows whose plan names this block of keys: a stage lies in one plan row, the block in one entry.
      auto named = [&](int i0) {
        return !planned || named_in(a.plan, plan_row(a, sequence, head, i0), i0 % a.plan.q_tile, first) >= 0;
      };
      auto next_of = [&](int i0) {
        while (i0 < n && !named(i0)) i0 += kStage;
        return i0;
      };
      auto fetch = [&](int i0, int slot) {
        const int64_t from = a.qs.begin(sequence * a.h + head) + i0;
        auto row = [&](const Matrix& x) {
          return [&, from](int r) { return i0 + r < n ? x.row<const __nv_bfloat16>(from + r) : nullptr; };
        };
        q_stages[slot].load(a.d, g.q.row<const __nv_bfloat16>(0), row(g.q));
        o_stages[slot].load(a.d_v, g.d_out.row<const __nv_bfloat16>(0), row(g.d_out));
        mma::copies_begun();
        if (threadIdx.x < kStage) {
          const QueryRow at = query_row(a, sequence, head, i0 + int(threadIdx.x));
          rows[slot][threadIdx.x] = {at.factor,
                                     at.live && a.mods.gain ? a.mods.gain[at.row] : 1,
                                     at.live ? g.lse[at.row] : 0,
                                     at.live ? g.out_dot[at.row] : 0,
                                     at.q_pos,
                                     at.live};
        }
      };
      int i0 = next_of(start);
      if (i0 < n) fetch(i0, 0);
      for (int slot = 0; i0 < n; slot ^= 1) {
        const int next = next_of(i0 + kStage);
        if (next < n) {
          fetch(next, slot ^ 1);
          mma::await_copies<1>();
        } else {
          mma::await_copies<0>();
        }
        __syncthreads();
        const bool all = bare && !asks && i0 + kStage <= n && first + kOwn <= m &&
                         (!a.plan.causal || first + kOwn - 1 - i0 <= m - n);
        float p[kStage / 8][4], d[kStage / 8][4];
#pragma unroll
        for (int column = 0; column < kStage / 8; ++column) {
          float dots[1][4], d_p[1][4];
          q_stages[slot].products(keys, column, dots);
          o_stages[slot].products(values, column, d_p);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int u = e / 2, r = 8 * column + 2 * (lane % 4) + e % 2, key = own + lane / 4 + 8 * u;
            const Row& row = rows[slot][r];
            if (all) {
              const float x = mma::power_of_two(kLog2e * fmaf(row.factor, dots[0][e], -row.lse));
              const float d_logit = x * (d_p[0][e] - row.dot);
              p[column][e] = x, d[column][e] = d_logit * row.factor;
              bias[u] += d_logit;
              continue;
            }
            QueryRow at;
            at.i = i0 + r, at.n = n, at.m = m, at.q_pos = row.q_pos, at.k_first = k_first, at.live = row.live;
            at.factor = row.factor, at.row = a.qs.begin(sequence * a.h + head) + at.i;
            p[column][e] = d[column][e] = 0;
            if (!sees(a, at, key)) continue;
            const Pair pair = pair_of(a, at, key, dots[0][e], row.lse, bare);
            const float d_logit = pair.p * (row.gain * d_p[0][e] - row.dot);
            p[column][e] = row.gain * pair.p, d[column][e] = d_logit * pair.slope;
            bias[u] += d_logit;
          }
        }
#pragma unroll
        for (int step = 0; step < kStage / 16; ++step) {
          uint32_t weights[4];
          mma::weights_of(p[2 * step], p[2 * step + 1], weights);
          o_stages[slot].add_rows(weights, step, d_v);
          mma::weights_of(d[2 * step], d[2 * step + 1], weights);
          q_stages[slot].add_rows(weights, step, d_k);
        }
        __syncthreads();
        i0 = next;
      }
    }
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      bias[u] += __shfl_xor_sync(0xffffffffu, bias[u], 1);
      bias[u] += __shfl_xor_sync(0xffffffffu, bias[u], 2);
      const int key = own + lane / 4 + 8 * u;
      if (key >= m) continue;
#pragma unroll
      for (int c = 0; c < D / 8; ++c)
        for (int e = 0; e < 2; ++e) {
          const int channel = 8 * c + 2 * (lane % 4) + e;
          if (channel < a.d) g.d_k.row<float>(k_first + key)[channel] = d_k[c][2 * u + e];
          if (channel < a.d_v) g.d_v.row<float>(v_first + key)[channel] = d_v[c][2 * u + e];
        }
      if (g.d_key_bias && lane % 4 == 0) g.d_key_bias[k_first + key] = bias[u];
    }
  }
}

}  // namespace

bool attend_backward_mma(Queue& queue, const AttentionView& a, Gradients g) {
  constexpr const char* where = "attend_backward";
  const bool whole = a.plan.form == Plan::Form::Dense || (a.plan.form == Plan::Form::Blocks && a.plan.q_tile % 32 == 0 &&
                                                          a.plan.k_tile % kOwn == 0 && !a.plan.mask);
  if (!mma::rows_fit(a.k) || !mma::rows_fit(a.v) || a.d > 128 || a.d_v > 128 || a.q_rows == 0 || a.mods.sigmoid ||
      a.mods.k_map || a.mods.v_map || a.g_v != a.g || !whole)
    return false;
  const Scratch scratch(queue.scratch);
  auto narrow = [&](const Matrix& x) {
    const Tensor to = queue.scratch.take(Dtype::BF16, {a.q_rows, int64_t(x.width)});
    round_rows(queue, where, x, a.q_rows, matrix(to));
    return matrix(to);
  };
  g.q = narrow(a.q), g.d_out = narrow(g.d_out);
  const RowTiles tiles = row_tiles(a, kOwn);
  const unsigned segments = unsigned(a.ks.count);
  const int64_t blocks = ceil_div(ceil_div(a.m_bound, std::max(1u, segments)), kOwn) + 1;
  mma::with_width(std::max(a.d, a.d_v), [&]<int D>() {
    if constexpr (D <= 128) {
      constexpr size_t shared = 4 * sizeof(Stage<D, 32>);
      launch(queue, where, d_q_mma_kernel<D>, tiles.grid, 32 * kWarps, shared, a, tiles, g);
      launch(queue, where, d_kv_mma_kernel<D>, dim3(blocks_for(blocks, segments), segments), 32 * kWarps, shared, a, g);
    }
  });
  return true;
}

}  // namespace heed::cuda
