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
    if (low == 0 && !a.until && !a.plan.mask && a.plan.form != Plan::Form::Interval) {
      // Lists ascend: where the last one begins among the keys seen, those before it lie there whole.
      const int64_t wide = a.plan.form == Plan::Form::Tokens ? 1 : a.plan.k_tile, first = a.plan.begin(row),
                    last = a.plan.end(row) - 1;
      if (last < first) continue;
      if (const int64_t begin = int64_t(a.plan.index[last]) * wide; begin < high) {
        if (lane == 0) total += double((last - first) * wide + min(wide, high - begin));
        continue;
      }
    }
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

constexpr int kTileRows = 128;  // most rows of a plan that a warp counts together

/// One warp a tile of up to kTileRows query rows that share entries, without `until`. What all rows see whole is counted at
/// once, for the rest lanes are rows. Grid: tiles (strided), segments of q.
__global__ void count_tiles_kernel(const __grid_constant__ Counted a, const __grid_constant__ PagesView pages, double* pairs) {
  await();
  constexpr int kOwn = kTileRows / 32;
  const bool dense = a.plan.form == Plan::Form::Dense;
  const int sequence = blockIdx.y / a.h, head = blockIdx.y % a.h, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int n = a.qs.length(blockIdx.y), segment = sequence * a.g + head * a.g / a.h, m = key_count(a, pages, segment);
  const int q_tile = dense ? kTileRows : a.plan.q_tile, parts = (q_tile + kTileRows - 1) / kTileRows;  // of a plan's tile
  int64_t plan_first = 0;
  if (!dense) {
    auto tiles = [&](int s) { return (a.qs.length(s * a.h) + q_tile - 1) / q_tile; };
    for (int s = 0; s < sequence; ++s) plan_first += int64_t(a.plan.scope_heads) * tiles(s);
    plan_first += int64_t(head * a.plan.scope_heads / a.h) * tiles(sequence);
  }
  double total = 0;
  for (int t = blockIdx.x * warps + threadIdx.x / 32;; t += gridDim.x * warps) {
    const int first = t / parts * q_tile + t % parts * kTileRows,
              last = min(min(first + kTileRows, (t / parts + 1) * q_tile), n);
    if (t / parts * q_tile >= n) break;
    if (first >= last) continue;
    int low[kOwn], high[kOwn], all_low = 0, all_high = m;
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      const int i = first + lane + 32 * r;
      low[r] = high[r] = 0;
      if (i >= last) continue;
      high[r] = a.plan.causal ? min(m, m - n + i + 1) : m;
      if (a.window > 0) {  // positions ascend
        const int64_t q_pos = a.q_pos ? a.q_pos[a.qs.begin(blockIdx.y) + i] : m - n + i;
        for (int end = m; low[r] < end;) {
          const int middle = (low[r] + end) / 2;
          if (position_of(a, pages, segment, middle) <= q_pos - a.window) low[r] = middle + 1;
          else end = middle;
        }
      }
      all_low = max(all_low, low[r]), all_high = min(all_high, high[r]);
    }
    all_low = __reduce_max_sync(~0u, all_low), all_high = __reduce_min_sync(~0u, all_high);
    auto seen_of = [&](int64_t begin, int64_t end) {  // by this lane's rows
      int64_t count = 0;
#pragma unroll
      for (int r = 0; r < kOwn; ++r) count += max(int64_t(0), min(end, int64_t(high[r])) - max(begin, int64_t(low[r])));
      return count;
    };
    if (dense) {
      total += double(seen_of(0, m));
      continue;
    }
    const int64_t row = plan_first + t / parts, from = a.plan.begin(row), to = a.plan.end(row);
    const int64_t wide = a.plan.form == Plan::Form::Tokens ? 1 : a.plan.k_tile;
    for (int64_t e0 = from; e0 < to; e0 += 32) {
      const int64_t e = e0 + lane;
      int64_t begin = 0, end = 0;
      int mask = -1;
      if (e < to) {
        const bool interval = a.plan.form == Plan::Form::Interval;
        begin = interval ? a.plan.index[2 * e] : int64_t(a.plan.index[e]) * wide;
        end = min(interval ? int64_t(a.plan.index[2 * e + 1]) : begin + wide, int64_t(m));
        if (a.plan.mask) mask = a.plan.mask[e];
      }
      const bool there = begin < end, whole = there && mask < 0 && begin >= all_low && end <= all_high;
      if (whole) total += double((end - begin) * (last - first));
      for (unsigned left = __ballot_sync(~0u, there && !whole); left; left &= left - 1) {
        const int from_lane = __ffs(int(left)) - 1;
        const int64_t begin_of = __shfl_sync(~0u, begin, from_lane), end_of = __shfl_sync(~0u, end, from_lane);
        const int mask_of = __shfl_sync(~0u, mask, from_lane);
        if (mask_of < 0) {
          total += double(seen_of(begin_of, end_of));
          continue;
        }
        for (int w = 0; w < a.plan.words; ++w) {
          const int64_t word = begin_of + 64 * w;
          if (word >= end_of) break;
#pragma unroll
          for (int r = 0; r < kOwn; ++r) {
            const int i = first + lane + 32 * r;
            const int64_t sees = max(low[r] - word, int64_t(0)),
                          stops = min(min(high[r] - word, end_of - word), int64_t(64));
            if (i >= last || sees >= stops) continue;
            const uint64_t bits = a.plan.bits[(int64_t(mask_of) * q_tile + (i - t / parts * q_tile)) * a.plan.words + w];
            total += double(__popcll(bits & ~uint64_t(0) << sees & ~uint64_t(0) >> (64 - stops)));
          }
        }
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
  const int64_t rows = ceil_div(std::max<int64_t>(q.bound, q.values ? q.values.size[0] : 0), q.heads);
  if (!a.until && rows >= 32 && (plan.form == Plan::Form::Dense || plan.q_tile >= 32)) {
    launch_early(queue, where, count_tiles_kernel,
                 dim3(blocks_for(ceil_div(rows, 4 * std::min(plan.q_tile, kTileRows)) + 1, count), count), 128, 0, a,
                 pages, pairs.as<double>());
    return;
  }
  launch_early(
      queue, where, count_pairs_kernel,
      dim3(blocks_for(ceil_div(std::max<int64_t>(q.bound, q.values ? q.values.size[0] : 0), 4 * q.heads), count), count),
      128, 0, a, pages, pairs.as<double>());
}

}  // namespace heed::cuda
