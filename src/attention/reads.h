// From scores of entries to what a decoded token reads.
#pragma once
#include "attention/mechanism.h"

namespace heed {

/// Reads the best entries of every segment with a new query, counts[sequence] of them: scores has a segment for each query
/// head, KV head or sequence, as the scope says.
Read best_entries(LayerView&, Plan::Scope, const Ragged& scores, std::span<const int64_t> counts);

/// A read that later layers or steps take over.
struct HeldRead : State {
  void hold(Queue&, const Read&);
  Read read(Queue&) const;
  std::unique_ptr<State> clone() const override;

 private:
  std::shared_ptr<const Buffer> index_, count_;  // forks share them
  Plan::Scope scope_ = Plan::Scope::QueryHead;
};

}  // namespace heed
