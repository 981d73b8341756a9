#include "attention/patterns.h"

#include <algorithm>
#include <map>

namespace heed {
namespace {

constexpr int64_t kBlock = 64, kMostRows = 128;
using Mask = std::array<uint64_t, kMostRows>;  // bit j of word i: row i of the tile sees key j of the block

/// Bits low … high − 1.
uint64_t bits(int64_t low, int64_t high) {
  const uint64_t below = high >= 64 ? ~uint64_t(0) : (uint64_t(1) << high) - 1;
  return low >= 64 ? 0 : below & ~((uint64_t(1) << low) - 1);
}

/// The rows of a plan as they are found.
struct Rows {
  std::vector<int64_t> rowptr{0};
  std::vector<int32_t> index, mask;
  std::vector<Mask> masks;
  std::map<Mask, int32_t> known;

  void add(int64_t block) { index.push_back(int32_t(block)), mask.push_back(-1); }
  void add(int64_t block, const Mask& seen) {
    if (std::all_of(seen.begin(), seen.end(), [](uint64_t row) { return row == ~uint64_t(0); })) return add(block);
    index.push_back(int32_t(block));
    const auto [place, fresh] = known.try_emplace(seen, int32_t(masks.size()));
    if (fresh) masks.push_back(seen);
    mask.push_back(place->second);
  }
};

/// Masks of the blocks that a tile reads in part; of blocks that rows read whole only their number at first, since nearly all of
/// a long pattern's blocks are those.
class TileBlocks {
 public:
  explicit TileBlocks(int64_t blocks) : whole_(size_t(blocks) + 1), slot_(size_t(blocks)) {}

  void clear() {
    std::fill(whole_.begin(), whole_.end(), 0);
    std::fill(slot_.begin(), slot_.end(), -1);
    masks_.clear(), runs_.clear();
  }
  /// Row r reads keys a … b − 1, none of which it has read before.
  void add(int64_t r, int64_t a, int64_t b) {
    const int64_t first = a / kBlock, last = (b - 1) / kBlock;
    if (first == last) return add_bits(first, r, bits(a % kBlock, (b - 1) % kBlock + 1));
    const int64_t from = a % kBlock ? first + 1 : first, to = b % kBlock ? last : last + 1;
    if (from > first) add_bits(first, r, bits(a % kBlock, kBlock));
    if (to == last) add_bits(last, r, bits(0, b % kBlock));
    if (from == to) return;
    ++whole_[size_t(from)], --whole_[size_t(to)];
    runs_.push_back({r, from, to});
  }
  /// The blocks that `count` rows read, with their masks; null: all of it.
  template <class Visit>
  void each(int64_t count, Visit&& visit) {
    std::vector<std::pair<int64_t, int64_t>> some;  // runs of blocks that some rows read whole
    int64_t rows = 0;
    for (size_t b = 0; b < slot_.size(); ++b) {
      rows += whole_[b];
      if (rows == 0 || rows == count) continue;
      if (some.empty() || some.back().second < int64_t(b)) some.push_back({int64_t(b), int64_t(b)});
      some.back().second = int64_t(b) + 1;
    }
    for (const auto& [r, from, to] : runs_)
      for (const auto& [begin, end] : some)
        for (int64_t b = std::max(from, begin); b < std::min(to, end); ++b) add_bits(b, r, ~uint64_t(0));
    rows = 0;
    for (size_t b = 0; b < slot_.size(); ++b) {
      rows += whole_[b];
      if (rows == count) visit(int64_t(b), static_cast<Mask*>(nullptr));
      else if (slot_[b] >= 0) visit(int64_t(b), &masks_[size_t(slot_[b])]);
    }
  }

 private:
  struct Run {
    int64_t row, from, to;
  };
  void add_bits(int64_t block, int64_t r, uint64_t keys) {
    int32_t& slot = slot_[size_t(block)];
    if (slot < 0) slot = int32_t(masks_.size()), masks_.push_back(Mask{});
    masks_[size_t(slot)][size_t(r)] |= keys;
  }

  std::vector<int32_t> whole_, slot_;  // whole_: changes of the number of rows
  std::vector<Mask> masks_;
  std::vector<Run> runs_;
};

/// One query tile: rows first … last − 1 of n queries over m keys. Words of rows that there are not are all ones.
void add_tile(Rows& rows, TileBlocks& tile, const Pattern& pattern, int64_t first, int64_t last, int64_t n, int64_t m,
              bool causal) {
  tile.clear();
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (int64_t r = first; r < last; ++r) {
    const int64_t i = m - n + r, end = causal ? i + 1 : m;
    ranges.clear();
    pattern(i, m, [&](int64_t a, int64_t b) {
      a = std::max<int64_t>(a, 0), b = std::min(b, end);
      if (a < b) ranges.push_back({a, b});
    });
    std::sort(ranges.begin(), ranges.end());
    int64_t done = 0;
    for (const auto& [a, b] : ranges) {
      if (b > done) tile.add(r - first, std::max(a, done), b);
      done = std::max(done, b);
    }
  }
  tile.each(last - first, [&](int64_t block, Mask* seen) {
    if (!seen) return rows.add(block);
    // What causality or the ends hide anyway is no reason for a mask.
    for (int64_t r = 0; r < kMostRows; ++r) {
      const int64_t end = first + r >= last ? 0 : causal ? m - n + first + r + 1 : m;
      (*seen)[size_t(r)] |= bits(std::clamp<int64_t>(end - block * kBlock, 0, kBlock), kBlock);
    }
    rows.add(block, *seen);
  });
  rows.rowptr.push_back(int64_t(rows.index.size()));
}

/// Rows for the heads of a scope, each of which has a pattern and the keys of a KV head.
Plan planned(LayerView& at, Plan::Scope scope, const std::function<const Pattern&(int64_t head)>& of_head) {
  const int64_t g = at.k.heads, heads = scope_heads(scope, at.q.heads, g), tile = at.queue.run->plan_rows;
  Rows rows;
  for (int64_t s = 0; s < at.sequences(); ++s)
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t n = at.rows[size_t(s)], m = at.key_rows[size_t(s * g + head * g / heads)];
      TileBlocks blocks((m + kBlock - 1) / kBlock);
      for (int64_t first = 0; first < n; first += tile)
        add_tile(rows, blocks, of_head(head), first, std::min(n, first + tile), n, m, at.plan.causal);
    }
  Plan plan;
  plan.form = Plan::Form::Blocks, plan.scope = scope;
  plan.q_tile = int(tile), plan.k_tile = kBlock, plan.causal = at.plan.causal;
  const int64_t count = int64_t(rows.index.size());
  plan.nnz_bound = count;
  plan.rowptr = at.queue.upload(rows.rowptr);
  plan.index = at.queue.upload(rows.index);
  if (rows.masks.empty()) return plan;
  plan.mask = at.queue.upload(rows.mask);
  std::vector<uint64_t> words;
  for (const Mask& m : rows.masks) words.insert(words.end(), m.begin(), m.begin() + tile);
  plan.bits = at.queue.upload(words).reshape({int64_t(rows.masks.size()), tile, 1});
  return plan;
}

}  // namespace

Plan pattern_plan(LayerView& at, const Pattern& pattern) {
  const int64_t g = at.k.heads;
  bool alike = true;
  for (size_t s = 0; s < at.key_rows.size(); ++s) alike &= at.key_rows[s] == at.key_rows[s / size_t(g) * size_t(g)];
  return planned(at, alike ? Plan::Scope::Layer : Plan::Scope::KvHead, [&](int64_t) -> const Pattern& { return pattern; });
}

Plan pattern_plan(LayerView& at, const std::function<const Pattern&(int64_t head)>& of_head) {
  return planned(at, Plan::Scope::QueryHead, of_head);
}

void TokenMap::add(const AddKeys& keys, int64_t y, int64_t x0, int64_t x1) const {
  x0 = std::max<int64_t>(x0, 0), x1 = std::min(x1, width);
  if (y >= 0 && x0 < x1) keys(text + y * width + x0, text + y * width + x1);
}

Plan own_tiles(LayerView& at, int tile, int64_t first_row, int64_t last_rows) {
  const int64_t g = at.k.heads;
  std::vector<int64_t> rowptr{0};
  std::vector<int32_t> ranges;
  for (int64_t s = 0; s < at.k.segments(); ++s) {
    const int64_t n = at.rows[size_t(s / g)], m = at.key_rows[size_t(s)];
    for (int64_t first = first_row; first < n - last_rows; first += tile) {
      ranges.push_back(int32_t(m - n + first));
      ranges.push_back(int32_t(m - n + std::min<int64_t>(n - last_rows, first + tile)));
      rowptr.push_back(int64_t(ranges.size()) / 2);
    }
  }
  Plan plan;
  plan.form = Plan::Form::Interval, plan.scope = Plan::Scope::KvHead, plan.q_tile = tile, plan.causal = false;
  plan.nnz_bound = rowptr.back();
  plan.rowptr = at.queue.upload(rowptr);
  plan.index = at.queue.upload(ranges).reshape({plan.nnz_bound, 2});
  return plan;
}

}  // namespace heed
