// How the rows of a call are cut into tiles, and the memory its workers need.
#pragma once
#include <span>
#include <vector>

#include "kernels/cpu/key_view.h"
#include "kernels/cpu/workers.h"

namespace heed::HEED_ISA {

/// Query rows first … first + rows of `heads` heads of one sequence, all reading one KV head and one row of the plan.
struct TileTask {
  int64_t sequence = 0, head = 0, heads = 1;
  int64_t first = 0, rows = 0;
  int64_t k_segment = 0, v_segment = 0;
  int64_t plan_row = 0;
};

/// The tiles of all rows, sequence by sequence and head by head. With `share`, heads of a group whose rows read the same
/// keys lie side by side when they fit, so that keys are read once for all. `most`: rows of a tile, of all its heads.
std::vector<TileTask> tile_tasks(const Plan& plan, const Ragged& q, int64_t kv_heads, int64_t v_heads, const Mods& mods,
                                 bool share, int64_t most = kTile);

/// The longest segment.
int64_t longest(const Ragged&);

/// Whether tiles of a plan of blocks take so few queries that lie side by side (MoBA: each has a choice of its own) that those
/// which read a block are gathered instead.
bool gathers_queries(const Plan& plan, const Ragged& q, int64_t kv_heads, const Mods& mods);

/// The lanes of a task. `keys` is the length of its segment. With `chosen` those of its first head's queries alone that are
/// named there, counted from task.first.
Lanes lanes_of(const TileTask& task, const Ragged& q, int64_t keys, const Mods& mods, bool causal,
               std::span<const int> chosen = {});

/// The keys, low inclusive and high exclusive, that causality and the window leave to some lane.
struct KeyRange {
  int64_t low, high;
};
KeyRange visible(const Lanes& lanes, const KeyView& keys, const Mods& mods, bool causal);

LogitRule logit_rule(const Plan& plan, const Mods& mods, const KeyView& keys, bool causal);

/// Where the keys of a call lie: a panel with its values (which may be absent), or pages.
struct KeySource {
  const Ragged* k = nullptr;
  const Ragged* v = nullptr;
  const Pages* pages = nullptr;
  const Read* read = nullptr;
  Turns turns;

  int64_t heads() const { return pages ? pages->kv_heads : k->heads; }
  int64_t v_heads() const { return pages ? pages->kv_heads : v ? v->heads : k->heads; }
  KeyView view(const TileTask& task, const Mods& mods) const {
    return pages ? KeyView::pages(*pages, read, turns, task.k_segment, task.v_segment)
                 : KeyView::panel(*k, v, task.k_segment, task.v_segment, mods);
  }
  /// Whether queries of this type can be multiplied with the keys and values as pairs of bf16.
  bool dots(Dtype queries, int d) const;
};

/// Calls body(tile, i) for i in [0, count), each worker with a tile of its own in the queue's scratch.
template <class Body>
void parallel_tiles(Queue& queue, const TileShape& shape, int64_t count, Body&& body) {
  parallel_with(queue, Tile::bytes(shape), count, [&](char* memory, int64_t i) {
    Tile tile(shape, memory);
    body(tile, i);
  });
}

}  // namespace heed::HEED_ISA
