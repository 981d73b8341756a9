#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/page.cuh"

namespace heed::cuda {
namespace {

struct Counted {
  PlanView plan;
  Segments qs, ks;  // ks.offsets is null: keys lie in pages
  int h, g, sequences;
  const int32_t *q_pos, *k_pos, *until;
  int64_t window;
};

__device__ int key_count(const Counted& a, const PagesView& pages, int segment) {
  return a.ks.offsets ? a.ks.length(segment) : pages.length[segment];
}

__device__ int64_t position_of(const Counted& a, const PagesView& pages, int segment, int key) {
  if (!a.ks.offsets)
    return position_at(pages.layout_of(segment, key / kPage), pages.page(segment, key / kPage), key % kPage);
  return a.k_pos ? a.k_pos[a.ks.begin(segment) + key] : key;
}

/// One warp a query row; sums of whole numbers, the same in any order. Grid: rows (strided), segments of q.
__global__ void count_pairs_kernel(const __grid_constant__ Counted a, const __grid_constant__ PagesView pages, double* pairs) {
  await();
  const int sequence = blockIdx.y / a.h, head = blockIdx.y % a.h, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int n = a.qs.length(blockIdx.y), segment = sequence * a.g + head * a.g / a.h, m = key_count(a, pages, segment);
  int64_t plan_first = 0;
  if (a.plan.form != Plan::Form::Dense) {
    auto tiles = [&](int s) { return (a.qs.length(s * a.h) + a.plan.q_tile - 1) / a.plan.q_tile; };
    for (int s = 0; s < sequence; ++s) plan_first += int64_t(a.plan.scope_heads) * tiles(s);
    plan_first += int64_t(head * a.plan.scope_heads / a.h) * tiles(sequence);
  }
  double total = 0;
  for (int i = blockIdx.x * warps + threadIdx.x / 32; i < n; i += gridDim.x * warps) {
    const int64_t q_pos = a.q_pos ? a.q_pos[a.qs.begin(blockIdx.y) + i] : m - n + i;
    const int high = a.plan.causal ? min(m, m - n + i + 1) : m;
    int low = 0;
    if (a.window > 0)  // positions ascend
      for (int end = m; low < end;) {
        const int middle = (low + end) / 2;
        if (position_of(a, pages, segment, middle) <= q_pos - a.window) low = middle + 1;
        else end = middle;
      }
    auto seen = [&](int64_t begin, int64_t end) {  // by one lane
      begin = max(begin, int64_t(low));
      end = min(end, int64_t(high));
      if (begin >= end) return int64_t(0);
      if (!a.until) return end - begin;
      int64_t count = 0;
      for (int64_t j = begin; j < end; ++j) count += a.until[a.ks.begin(segment) + j] >= q_pos;
      return count;
    };
    if (a.plan.form == Plan::Form::Dense) {
      const int64_t share = (int64_t(m) + 31) / 32;
      total += double(seen(lane * share, (lane + 1) * share));
      continue;
    }
    const int64_t row = plan_first + i / a.plan.q_tile;
    for (int64_t e = a.plan.begin(row) + lane; e < a.plan.end(row); e += 32) {
      if (a.plan.form == Plan::Form::Interval) {
        total += double(seen(a.plan.index[2 * e], a.plan.index[2 * e + 1]));
        continue;
      }
      const int64_t wide = a.plan.form == Plan::Form::Tokens ? 1 : a.plan.k_tile, begin = int64_t(a.plan.index[e]) * wide;
      if (!a.plan.mask || a.plan.mask[e] < 0) {
        total += double(seen(begin, begin + wide));
        continue;
      }
      const uint64_t* bits = a.plan.bits + (int64_t(a.plan.mask[e]) * a.plan.q_tile + i % a.plan.q_tile) * a.plan.words;
      for (int64_t w = 0; w < a.plan.words; ++w) {
        const int64_t first = begin + 64 * w, from = max(int64_t(low) - first, int64_t(0)),
                      to = min(min(int64_t(high) - first, wide - 64 * w), int64_t(64));
        if (from >= to) continue;
        uint64_t shown = bits[w] & ~uint64_t(0) << from & ~uint64_t(0) >> (64 - to);
        if (!a.until) total += double(__popcll(shown));
        else
          for (; shown; shown &= shown - 1) total += double(seen(first + __ffsll(shown) - 1, first + __ffsll(shown)));
      }
    }
  }
  total = warp_sum(total);
  if (lane == 0 && total > 0) atomicAdd(&pairs[head], total);
}

}  // namespace

void count_pairs(Queue& queue, const Plan& plan, const Ragged& q, const Keys& keys, const Mods& mods, Tensor pairs) {
  constexpr const char* where = "count_pairs";
  check_tensor(where, "pairs", pairs, {q.heads}, false, Dtype::F64);
  require(!keys.panel != !keys.pages, where, "keys come from a panel or from pages");
  const int64_t g = keys.panel ? keys.panel->heads : keys.pages->kv_heads;
  Counted a{};
  a.plan = plan_view(plan, int(scope_heads(plan.scope, q.heads, g)));
  a.qs = segments(q);
  if (keys.panel) a.ks = segments(*keys.panel);
  a.h = int(q.heads);
  a.g = int(g);
  a.sequences = int(q.sequences());
  a.q_pos = mods.q_pos.as<int32_t>();
  a.k_pos = mods.k_pos.as<int32_t>();
  a.until = keys.panel ? mods.until.as<int32_t>() : nullptr;
  a.window = mods.window;
  const PagesView pages = keys.pages ? pages_view(where, *keys.pages) : PagesView{};
  const unsigned count = unsigned(q.segments());
  launch_early(
      queue, where, count_pairs_kernel,
      dim3(blocks_for(ceil_div(std::max<int64_t>(q.bound, q.values ? q.values.size[0] : 0), 4 * q.heads), count), count),
      128, 0, a, pages, pairs.as<double>());
}

}  // namespace heed::cuda
