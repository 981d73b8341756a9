// From scores of entries to what a decoded token reads.
#pragma once
#include "attention/mechanism.h"

namespace heed {

/// [entries, group] of each KV head (Observe::Heads::Each) → one run of entries for each query head.
Ragged by_query_head(Queue&, const Ragged& columns, int64_t group);

/// Reads the best entries of every segment with a new query, counts[sequence] of them: scores has a segment for each query
/// head, KV head or sequence, as the scope says.
Read best_entries(LayerView&, Plan::Scope, const Ragged& scores, std::span<const int64_t> counts);

/// A read that later layers or steps take over.
struct HeldRead : State {
  void hold(const Read&);
  Read read(Queue&) const;
  std::unique_ptr<State> clone() const override;

 private:
  Buffer index_, count_;
  Plan::Scope scope_ = Plan::Scope::QueryHead;
};

}  // namespace heed
