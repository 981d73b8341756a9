#include <algorithm>
#include <bit>

#include "base/threads.h"
#include "kernels/check.h"
#include "kernels/plan_spans.h"
#include "kernels/reference/page.h"

namespace heed::reference {
namespace {

/// The panel's segments, or what would be a panel of the pages' entries, with their positions where a window asks for them.
struct SeenKeys {
  std::vector<int64_t> offsets{0};
  std::vector<int32_t> positions;
  Ragged keys;
  Mods mods;
  SeenKeys(const Keys& from, const Mods& given) : mods(given) {
    if (from.panel) {
      keys = *from.panel;
      return;
    }
    const Pages& pages = *from.pages;
    for (int64_t s = 0; s < pages.segments(); ++s) {
      const int64_t length = pages.length.at<int32_t>(s);
      offsets.push_back(offsets.back() + length);
      for (int64_t e = 0; mods.window > 0 && e < length; ++e)
        positions.push_back(Page(pages, s, e / kPage).position(int(e % kPage)));
    }
    keys.offsets = Tensor(offsets.data(), Dtype::I64, {int64_t(offsets.size())});
    keys.heads = pages.kv_heads, keys.bound = offsets.back();
    mods.k_pos = mods.window > 0 ? Tensor(positions.data(), Dtype::I32, {keys.bound}) : Tensor();
  }
};

double overlap(std::pair<int64_t, int64_t> a, int64_t begin, int64_t end) {
  return double(std::max<int64_t>(0, std::min(end, a.second) - std::max(begin, a.first)));
}

double pairs_of(const Plan& plan, const PlanRows& rows, const Ragged& q, const Ragged& k, const Mods& mods, int64_t s,
                int64_t number) {
  const PlanHead head(plan, rows, q, k, s, number);
  const bool dense = plan.form == Plan::Form::Dense;
  const int64_t tile = dense ? std::max<int64_t>(1, head.n) : plan.q_tile, words = (plan.k_tile + 63) / 64;
  auto key_seen = [&](int64_t j, int64_t i) {
    const int64_t position = mods.q_pos ? mods.q_pos.at<int32_t>(head.q_row + i) : head.m - head.n + i;
    return !mods.until || mods.until.at<int32_t>(head.k_row + j) >= position;
  };
  double total = 0;
  for (int64_t first = 0; first < head.n; first += tile) {
    const int64_t last = std::min(first + tile, head.n), row = head.plan_row + (dense ? 0 : first / tile);
    int64_t low = 0, high = head.m;  // what every row of the tile sees
    Spans seen;
    for (int64_t i = first; i < last; ++i) {
      seen.push_back(visible_keys(head, plan, mods, i));
      low = std::max(low, seen.back().first), high = std::min(high, seen.back().second);
    }
    auto row_pairs = [&](int64_t i, int64_t begin, int64_t end) {
      if (!mods.until) return overlap(seen[size_t(i - first)], begin, end);
      double sum = 0;
      const auto [from, to] = seen[size_t(i - first)];
      for (int64_t j = std::max(begin, from); j < std::min(end, to); ++j) sum += key_seen(j, i);
      return sum;
    };
    auto add = [&](int64_t begin, int64_t end) {
      if (begin >= low && end <= high && !mods.until) {
        total += double(end - begin) * double(last - first);
        return;
      }
      for (int64_t i = first; i < last; ++i) total += row_pairs(i, begin, end);
    };
    if (!masked(plan)) {
      for (const auto& [begin, end] : named_keys(plan, row, head.m)) add(begin, end);
      continue;
    }
    for (int64_t e = plan.begin(row); e < plan.end(row); ++e) {
      const int64_t at = int64_t(plan.index.at<int32_t>(e)) * plan.k_tile, end = std::min(at + plan.k_tile, head.m);
      const int32_t mask = plan.mask.at<int32_t>(e);
      if (mask < 0) {
        if (at < end) add(at, end);
        continue;
      }
      for (int64_t i = first; i < last; ++i) {
        const uint64_t* bits = plan.bits.as<uint64_t>() + (int64_t(mask) * plan.q_tile + (i - first)) * words;
        for (int64_t j = at; j < end;) {
          if (!(bits[(j - at) / 64] >> ((j - at) % 64) & 1)) {
            ++j;
            continue;
          }
          int64_t run = j + 1;
          while (run < end && (bits[(run - at) / 64] >> ((run - at) % 64) & 1)) ++run;
          total += row_pairs(i, j, run);
          j = run;
        }
      }
    }
  }
  return total;
}

}  // namespace

void count_pairs(Queue&, const Plan& plan, const Ragged& q, const Keys& keys, const Mods& mods, Tensor pairs) {
  check_tensor("count_pairs", "pairs", pairs, {q.heads}, false, Dtype::F64);
  const SeenKeys seen(keys, mods);
  const PlanRows rows(plan, q, seen.keys.heads);
  auto head = [&](int64_t h) {
    for (int64_t s = 0; s < q.sequences(); ++s)
      pairs.at<double>(h) += pairs_of(plan, rows, q, seen.keys, seen.mods, s, h);
  };
  if (keys.pages || inside_parallel())
    for (int64_t h = 0; h < q.heads; ++h) head(h);  // a few rows: not worth waking threads
  else parallel_for(q.heads, head);
}

void tile_blocks(Queue&, Tensor index, Tensor count, int64_t capacity, Tensor first, int split, Plan out) {
  constexpr const char* where = "tile_blocks";
  const int64_t tiles = first.size[0] - 1;
  require(split >= 1 && out.q_tile >= 1 && out.q_tile <= 128 && out.k_tile <= 64, where,
          "tiles of 1…128 queries and 1…64 keys");
  require(index.type == Dtype::I32 && index.numel() >= count.numel() * capacity, where,
          "index is I32 [rows · capacity]");
  require(out.rows() == tiles && out.count && out.mask && out.bits, where,
          "the plan has a row, a count, masks and bits for each tile");
  auto tile = [&](int64_t t) {
    const int64_t begin = first.at<int64_t>(t), rows = first.at<int64_t>(t + 1) - begin;
    std::vector<int32_t> next(static_cast<size_t>(rows), 0);
    const int64_t start = out.rowptr.at<int64_t>(t), room = out.rowptr.at<int64_t>(t + 1) - start;
    int64_t written = 0;
    auto front = [&](int64_t r) { return index.as<int32_t>() + (begin + r) * capacity + next[size_t(r)]; };
    auto left = [&](int64_t r) { return next[size_t(r)] < count.at<int32_t>(begin + r); };
    while (true) {
      int64_t block = -1;
      for (int64_t r = 0; r < rows; ++r)
        if (left(r) && (block < 0 || *front(r) < block)) block = *front(r);
      if (block < 0) break;
      require(written + split <= room, where, "a tile's list is longer than its room");
      const int64_t mask = (start + written) / split;
      int64_t listed = 0;
      for (int64_t r = 0; r < out.q_tile; ++r) {
        const bool has = r < rows && left(r) && *front(r) == block;
        out.bits.at<uint64_t>(mask, r, 0) = has ? ~uint64_t(0) : 0;
        if (has) ++next[size_t(r)], ++listed;
      }
      for (int i = 0; i < split; ++i, ++written) {
        out.index.at<int32_t>(start + written) = int32_t(block * split + i);
        out.mask.at<int32_t>(start + written) = listed == rows ? -1 : int32_t(mask);
      }
    }
    out.count.at<int32_t>(t) = int32_t(written);
  };
  if (inside_parallel())
    for (int64_t t = 0; t < tiles; ++t) tile(t);
  else parallel_for(tiles, tile);
}

}  // namespace heed::reference
