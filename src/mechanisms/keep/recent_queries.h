#pragma once
#include "attention/mechanism.h"

namespace heed::mechanisms {

/// The last queries of every head, as a session goes on: what a policy that cuts while decoding looks at.
struct RecentQueries final : State {
  RecentQueries(int layers, int rows) : rows_(rows), layers_(size_t(layers)) {}
  /// The layer's new queries; called in every step.
  void take(const LayerView&);
  /// They themselves, up to `rows` for each query head.
  Ragged rows(const LayerView&) const;
  /// Their logits with each entry: for each (sequence, KV head) a run as long as its entries for every (row, query head of
  /// its group), query head by query head; −∞ throughout where a sequence has had fewer queries.
  Ragged logits(const LayerView&) const;
  std::unique_ptr<State> clone() const override { return std::make_unique<RecentQueries>(*this); }

 private:
  struct Layer {                                       // written anew in each step, never changed: forks share it
    std::shared_ptr<const Buffer> q, position, count;  // F32 [heads · rows, d], I32 [heads · rows], I32 [heads]
  };
  int64_t rows_;
  std::vector<Layer> layers_;
};

}  // namespace heed::mechanisms
