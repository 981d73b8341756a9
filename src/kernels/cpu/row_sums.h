// The first pass of every observation: what each row's weights are divided by.
#pragma once
#include "kernels/cpu/tile_tasks.h"

namespace heed::HEED_ISA {

/// Keys of one piece of work: enough to outweigh packing a tile's queries, few enough that short calls are shared out.
inline constexpr int64_t kObservedRange = 8 * kChunk;

/// Where the keys of an observation lie, the mods that go with them, and the tiles of its rows.
class Observed {
 public:
  Observed(const char* where, Queue& queue, const Ragged& q, const Keys& keys, const Plan* plan, const Mods& mods, bool share);
  Observed(const Observed&) = delete;

  const Ragged& q() const { return q_; }
  const Mods& mods() const { return mods_; }
  const Plan& plan() const { return plan_; }
  const KeySource& source() const { return source_; }
  const TileShape& shape() const { return shape_; }
  const std::vector<TileTask>& tasks() const { return tasks_; }
  Lanes lanes(const TileTask& task, const KeyView& keys) const {
    return lanes_of(task, q_, keys.size(), mods_, plan_.causal);
  }

  /// Fills the sums of all tasks, or takes them from `lse` (row) when that is there. Call once.
  void sum_rows(Tensor lse);
  /// log Σ of every row of the tasks, natural.
  void write_lse(const Tensor& to) const;
  /// log2 of the sum of each lane (sink included); −∞ of nothing. Softmax only.
  void log_sums(int64_t task, const Lanes& lanes, float* to) const;
  /// log Σ of one lane, natural, whatever the weights.
  float lse(int64_t task, const Lanes& lanes, int lane) const;

  /// Calls body(chunk, made) for each chunk of the task's keys with low ≤ key < high: tile.s holds its scores, as
  /// logits() left them. Queries are packed when there is a first chunk.
  template <class Body>
  void each_chunk(Tile& tile, const TileTask& task, const KeyView& keys, const Lanes& lanes, int64_t low, int64_t high,
                  Body&& body) const {
    const LogitRule rule = logit_rule(plan_, mods_, keys, plan_.causal);
    const KeyRange range = visible(lanes, keys, mods_, plan_.causal);
    Walk walk(plan_, task.plan_row, -1, std::max(low, range.low), std::min(high, range.high));
    Chunk chunk;
    bool packed = false;
    while (keys.gather(walk, lanes, mods_, chunk)) {
      if (!packed) pack_queries(tile, lanes, q_.values, mods_.row_factor);
      packed = true;
      keys.open(tile, chunk, false);
      scores(tile, lanes, chunk);
      body(chunk, logits(tile, lanes, chunk, rule));
    }
  }

 private:
  TileState sums(int64_t task, int64_t range, int width) const;

  Queue& queue_;
  const Ragged& q_;
  Mods mods_;
  Plan plan_;
  KeySource source_;
  TileShape shape_;
  std::vector<TileTask> tasks_;
  struct Place {
    int64_t first, ranges;
  };
  std::vector<Place> places_;  // of each task's sums
  float* sums_ = nullptr;
  Tensor lse_;
};

}  // namespace heed::HEED_ISA
