// page_score and page_choose. Σ max(q lo, q hi) is q⁺·hi + q⁻·lo, q⁺ and q⁻ being q's positive and negative numbers: two products
// that all query heads of a group make of the same bounds, which are read once.
#include "kernels/cuda/half_warp.cuh"
#include "kernels/cuda/page.cuh"
#include "kernels/cuda/select.cuh"

namespace heed::cuda {
namespace {

using Of = PageChoice::Of;

/// Where scores go: numbers of a ragged, or `stride` a list.
struct ScoresTo {
  Matrix values;
  Segments at;
  int64_t stride;
  __device__ void set(int list, int block, float x) const {
    values.set((at.offsets ? at.begin(list) : list * stride) + block, 0, x);
  }
};

/// A KV head's queries and blocks.
struct PageScores {
  Matrix q;
  Segments qs;
  int low, high;  // columns
  Of of;
  ScoresTo to;
};

__device__ float joined(Of of, float a, float b) { return of == Of::Max ? fmaxf(a, b) : a + b; }

constexpr int kScoreWarps = 8, kUnroll = 4, kRun = 2 * kUnroll;  // blocks of entries that a warp works on at once

/// Half a warp a block of entries, H heads at a time. Numbers of columns are T, their rows 16-byte aligned. Shared memory: q⁺ and
/// then q⁻ of the group's heads. Grid: runs of kRun blocks (strided), KV heads.
template <class T, int H>
__global__ void __launch_bounds__(32 * kScoreWarps, 2)
    score_kernel(const __grid_constant__ PagesView pages, const __grid_constant__ PageScores a, int row) {
  await();
  extern __shared__ float4 shared[];
  const SharedQueries queries{shared, row};
  const int g = pages.kv_heads, h = a.qs.heads, group = h / g, kv = blockIdx.y, head = kv / g * h + kv % g * group;
  const int lane = threadIdx.x % 32, half = lane / 16, own = lane % 16, d = pages.d, heads = (group + H - 1) / H * H;
  const int block = pages.column[a.low].block, blocks = (pages.length[kv] + block - 1) / block;
  const T *lows[kUnroll], *highs[kUnroll];
  Eight<T> low[kUnroll], high[kUnroll];  // of the lane's first channels
  const auto ask = [&](int run) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int b = max(min(run * kRun + 2 * u + half, blocks - 1), 0), e = b * block;
      if (run * kRun >= blocks || 8 * own >= d) continue;
      const LayoutView& l = pages.layout_of(kv, e / kPage);
      const char* page = pages.page(kv, e / kPage);
      const int64_t in_page = int64_t(e % kPage / block) * d;
      lows[u] = reinterpret_cast<const T*>(page + l.column_at[a.low]) + in_page;
      highs[u] = reinterpret_cast<const T*>(page + l.column_at[a.high]) + in_page;
      low[u].load(lows[u] + 8 * own), high[u].load(highs[u] + 8 * own);
    }
  };
  int run = blockIdx.x * kScoreWarps + threadIdx.x / 32;
  ask(run);  // and queries meanwhile
  bool asks = false;
  for (int member = 0; member < group; ++member) asks |= a.qs.length(head + member) > 0;
  if (!asks) return;
  for (int i = threadIdx.x; i < heads * row; i += blockDim.x) {
    const int member = i / row, c = i % row;
    float x = 0;
    if (c < d && member < group && a.qs.length(head + member) > 0) x = a.q.get(a.qs.begin(head + member), c);
    queries.put(member, c, fmaxf(x, 0.0f)), queries.put(heads + member, c, fminf(x, 0.0f));
  }
  __syncthreads();
  for (; run * kRun < blocks; run += gridDim.x * kScoreWarps, ask(run)) {
    constexpr int kEach = 16 / (H * kUnroll);  // lanes that are left with one number
    const int mine = own / kEach, u = mine / H, b = run * kRun + 2 * u + half;
    float all = a.of == Of::Max ? -kInfinity : 0;
    for (int first = 0; first < group; first += H) {
      float sums[H * kUnroll] = {};
      for (int c = 8 * own; c < d; c += 128) {
        if (c >= 128 || (first > 0 && d > 128)) {
#pragma unroll
          for (int i = 0; i < kUnroll; ++i) low[i].load(lows[i] + c), high[i].load(highs[i] + c);
        }
        // Two blocks at a time, so that all of them need not lie unpacked.
#pragma unroll
        for (int two = 0; two < kUnroll; two += 2) {
          float lo[2][8], hi[2][8];
          low[two].get(lo[0]), high[two].get(hi[0]), low[two + 1].get(lo[1]), high[two + 1].get(hi[1]);
#pragma unroll
          for (int member = 0; member < H; ++member) {
            float ups[8], downs[8];
            queries.get(first + member, c, ups), queries.get(heads + first + member, c, downs);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              float& sum = sums[(two + i) * H + member];
#pragma unroll
              for (int j = 0; j < 8; ++j) sum = fmaf(ups[j], hi[i][j], fmaf(downs[j], lo[i][j], sum));
            }
          }
        }
      }
      float x = spread_sums<H * kUnroll>(sums, own);
      const int member = first + mine % H;
      const bool there = member < group && a.qs.length(head + min(member, group - 1)) > 0;
      if (a.of == Of::Each) {
        if (there && own % kEach == 0 && b < blocks) a.to.set(head + member, b, x);
        continue;
      }
      if (!there) x = a.of == Of::Max ? -kInfinity : 0;
#pragma unroll
      for (int far = 1; far < H; far *= 2) x = joined(a.of, x, __shfl_xor_sync(~0u, x, far * kEach));
      all = joined(a.of, all, x);
    }
    if (a.of != Of::Each && own % (kEach * H) == 0 && b < blocks)
      a.to.set(kv, b, a.of == Of::Mean ? all / float(group) : all);
  }
}

/// The same for columns of any type and rows of any width, a warp a block of entries.
__global__ void plain_score_kernel(const __grid_constant__ PagesView pages, const __grid_constant__ PageScores a) {
  await();
  const int g = pages.kv_heads, h = a.qs.heads, group = h / g, kv = blockIdx.y, head = kv / g * h + kv % g * group;
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32, block = pages.column[a.low].block, length = pages.length[kv];
  for (int b = blockIdx.x * warps + threadIdx.x / 32; b * block < length; b += gridDim.x * warps) {
    const int e = b * block;
    const LayoutView& l = pages.layout_of(kv, e / kPage);
    char* page = pages.page(kv, e / kPage);
    const Matrix lo = pages.block_at(l, page, a.low, e % kPage / block),
                 hi = pages.block_at(l, page, a.high, e % kPage / block);
    float all = a.of == Of::Max ? -kInfinity : 0;
    bool asks = false;
    for (int member = 0; member < group; ++member) {
      if (a.qs.length(head + member) <= 0) continue;
      asks = true;
      float sum = 0;
      for (int c = lane; c < pages.d; c += 32) {
        const float x = a.q.get(a.qs.begin(head + member), c);
        sum += fmaxf(x * lo.get(0, c), x * hi.get(0, c));
      }
      sum = warp_sum(sum);
      if (a.of == Of::Each && lane == 0) a.to.set(head + member, b, sum);
      all = joined(a.of, all, sum);
    }
    if (a.of != Of::Each && asks && lane == 0) a.to.set(kv, b, a.of == Of::Mean ? all / float(group) : all);
  }
}

template <class T, int H>
void score_aligned(Queue& queue, const char* where, const PagesView& view, const PageScores& a, unsigned runs) {
  const int group = a.qs.heads / view.kv_heads, row = (view.d + 127) / 128 * 128;
  launch_early(queue, where, score_kernel<T, H>, dim3(runs, unsigned(view.segments)), 32 * kScoreWarps,
               size_t(2) * size_t(ceil_div(group, H) * H * row) * sizeof(float), view, a, row);
}

void score(Queue& queue, const char* where, const Pages& pages, const PageScores& a) {
  const PagesView view = pages_view(where, pages);
  const int group = a.qs.heads / view.kv_heads, block = view.column[a.low].block;
  if (view.segments == 0 || pages.length_bound == 0) return;
  const int64_t blocks = ceil_div(pages.length_bound, block);
  const Dtype type = view.layouts[0].column_type[a.low];
  bool aligned = view.d % 8 == 0 && 2 * ceil_div(group, 4) * 4 * ceil_div(view.d, 128) * 128 * 4 <= 48 * 1024;
  for (size_t l = 0; l < pages.layouts.size(); ++l)
    aligned &= view.layouts[l].column_type[a.low] == type && view.layouts[l].column_type[a.high] == type;
  if (!aligned)
    return launch_early(queue, where, plain_score_kernel,
                        dim3(blocks_for(ceil_div(blocks, 8), view.segments), unsigned(view.segments)), 256, 0, view, a);
  // Two blocks a multiprocessor, each of which goes on with other runs.
  const auto runs = unsigned(std::clamp<int64_t>(ceil_div(blocks, kRun * kScoreWarps), 1,
                                                 std::max<int64_t>(1, ceil_div(2 * multiprocessors(), view.segments))));
  const auto by_group = [&](auto number) {
    using T = decltype(number);
    if (group == 1) score_aligned<T, 1>(queue, where, view, a, runs);
    else if (group == 2) score_aligned<T, 2>(queue, where, view, a, runs);
    else score_aligned<T, 4>(queue, where, view, a, runs);
  };
  if (type == Dtype::BF16) by_group(__nv_bfloat16());
  else if (type == Dtype::F16) by_group(__half());
  else by_group(float());
}

struct Choosing {
  Selection to;  // its lists are rows of the plan
  const float* scores;
  int64_t stride;
  Segments qs;
  const int32_t* length;
  int heads, kv_heads;  // lists, and page lists, of a sequence
  int part, split;      // entries of a score's block, and scores of a block
  int64_t sinks, recent, number, least;
  double share;
  int64_t* rowptr;
};

/// Grid: a cluster a list, those of sequences without a row included.
__global__ void __launch_bounds__(kTeamThreads, 1) choose_kernel(const __grid_constant__ Choosing a) {
  await();
  __shared__ TeamMemory memory;
  Team team(memory, nullptr);
  const int list = blockIdx.x / team.blocks, sequence = list / a.heads, lane = threadIdx.x % 32;
  const auto asks = [&](int s) { return a.qs.length(s * a.qs.heads) > 0; };
  if (!asks(sequence)) return;
  int before = 0;
  for (int s = lane; s < sequence; s += 32) before += asks(s);
  const int row = __reduce_add_sync(~0u, before) * a.heads + list % a.heads;
  const int block = a.part * a.split, held = a.length[sequence * a.kv_heads + list % a.heads * a.kv_heads / a.heads];
  const int parts = (held + a.part - 1) / a.part, blocks = (held + block - 1) / block;
  const int64_t granted = min(int64_t(held), max(a.number, int64_t(floor(a.share * double(held) + 1e-9))));
  const int64_t recent = a.recent > 0 ? max(int64_t(0), held - a.recent) / block : blocks,
                stays = (a.sinks + block - 1) / block + blocks - recent;
  const int64_t count = min(int64_t(blocks), max(max(a.least, stays), (granted + block - 1) / block));
  if (team.block == 0 && threadIdx.x == 0) {
    a.rowptr[row] = row * a.to.capacity;
    a.rowptr[row + 1] = (row + 1) * a.to.capacity;
  }
  const float* scores = a.scores + list * a.stride;
  select_by_team<false>(a.to, row, blocks, count, team, [&](int b) {
    if (int64_t(b) * block < a.sinks || b >= recent) return kForced;
    if (a.split == 1) return ordered(scores[b]);
    float best = -kInfinity;
    for (int p = b * a.split; p < min((b + 1) * a.split, parts); ++p) best = fmaxf(best, scores[p]);
    return ordered(best);
  });
}

}  // namespace

void page_score(Queue& queue, const Ragged& q, const Pages& pages, int low, int high, Ragged scores) {
  constexpr const char* where = "page_score";
  check_blocks(where, q, pages, low, high);
  require(scores.segments() == q.segments(), where, "scores have a segment for each sequence and query head");
  score(queue, where, pages,
        {matrix(q.values), segments(q), low, high, Of::Each, {matrix(scores.values), segments(scores), 0}});
}

void page_choose(Queue& queue, const Ragged& q, const Pages& pages, const PageChoice& how, int64_t capacity,
                 Tensor index, Tensor count, Tensor rowptr) {
  constexpr const char* where = "page_choose";
  const int block = check_choice(where, q, pages, how, capacity, index, count, rowptr), part = block / how.split;
  const Scratch scratch(queue.scratch);
  const int64_t heads = how.of == Of::Each ? q.heads : pages.kv_heads, lists = q.sequences() * heads,
                stride = std::max<int64_t>(1, ceil_div(pages.length_bound, part));
  if (count.size[0] == 0) return queue.fill(rowptr, 0);
  const Tensor scores = queue.scratch.take(Dtype::F32, {lists * stride});
  score(queue, where, pages, {matrix(q.values), segments(q), how.low, how.high, how.of, {matrix(scores), {}, stride}});
  const Choosing a{{Select::By::TopK, 0, 0, capacity, nullptr, nullptr, 0, true, index.as<int32_t>(), count.as<int32_t>()},
                   scores.as<float>(),
                   stride,
                   segments(q),
                   pages.length.as<int32_t>(),
                   int(heads),
                   int(pages.kv_heads),
                   part,
                   how.split,
                   how.sinks,
                   how.recent,
                   how.number,
                   how.least,
                   how.share,
                   rowptr.as<int64_t>()};
  launch_clusters(queue, where, choose_kernel, lists, team_blocks(ceil_div(stride, how.split), lists), a);
}

}  // namespace heed::cuda
