#include <algorithm>

#include "base/threads.h"
#include "kernels/check.h"
#include "kernels/reference/reference.h"

namespace heed::reference {
namespace {

/// Calls visit(number) for what list `list` names.
template <class Visit>
void each(const KeyLists& lists, int64_t list, Visit visit) {
  if (!lists.index) return;
  for (int64_t i = 0; i < lists.count.at<int32_t>(list); ++i)
    visit(int64_t(lists.index.at<int32_t>(list * lists.capacity + i)));
}

/// The ranges of one tile, row `row` of out: tile `tile` of query segment s, which has n queries and m keys.
void unite_tile(const KeySets& sets, const Plan& out, int64_t s, int64_t n, int64_t m, int64_t tile, int64_t row) {
  const int64_t first = m - n + tile * sets.tile, limit = std::max<int64_t>(0, std::min(first + sets.tile, m));
  std::vector<uint8_t> in(static_cast<size_t>(limit), 0);
  auto set = [&](int64_t from, int64_t to) {
    from = std::max<int64_t>(from, 0), to = std::min(to, limit);
    if (from < to) std::fill(in.begin() + from, in.begin() + to, uint8_t(1));
  };
  if (sets.sinks) set(0, sets.sinks.at<int32_t>(s));
  if (sets.local && sets.local.at<int32_t>(s) > 0) set(first - sets.local.at<int32_t>(s) + 1, limit);
  each(sets.keys, s, [&](int64_t key) { set(key, key + 1); });
  each(sets.distances, s, [&](int64_t distance) { set(first - distance, limit - distance); });
  each(sets.blocks, row, [&](int64_t block) { set(block * sets.block, (block + 1) * sets.block); });
  const int64_t begin = out.rowptr.at<int64_t>(row), room = out.rowptr.at<int64_t>(row + 1) - begin;
  int64_t written = 0;
  for (auto at = in.begin(); written < room && (at = std::find(at, in.end(), 1)) != in.end(); ++written) {
    const auto end = std::find(at, in.end(), 0);
    out.index.at<int32_t>(begin + written, 0) = int32_t(at - in.begin());
    out.index.at<int32_t>(begin + written, 1) = int32_t(end - in.begin());
    at = end;
  }
  out.count.at<int32_t>(row) = int32_t(written);
}

}  // namespace

void unite(Queue&, const Ragged& q, const Ragged& k, const KeySets& sets, const Plan& out) {
  check_union("unite", q, k, sets, out);
  struct Tile {
    int64_t segment, tile;
  };
  std::vector<Tile> tiles;
  for (int64_t s = 0; s < q.segments(); ++s)
    for (int64_t t = 0; t * sets.tile < q.length(s); ++t) tiles.push_back({s, t});
  auto unite_row = [&](int64_t row) {
    const auto [s, tile] = tiles[size_t(row)];
    const int64_t kv = s / q.heads * k.heads + s % q.heads * k.heads / q.heads;
    unite_tile(sets, out, s, q.length(s), k.length(kv), tile, row);
  };
  if (inside_parallel())
    for (int64_t row = 0; row < int64_t(tiles.size()); ++row) unite_row(row);
  else parallel_for(int64_t(tiles.size()), unite_row);
}

}  // namespace heed::reference
