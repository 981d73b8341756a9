#pragma once
#include "attention/mechanism.h"

namespace heed::mechanisms {

// The family of H2O: what every query so far has paid to a key, summed while the text flows. A sum belongs to a KV head:
// the mean over its query heads (the papers have one head each).
struct Accumulated : KeepPolicy {
  Needs needs(const ModelInfo&) const override;
  /// Weights are those of the step itself: over the keys that were there and that its plan read, so after a cut they are
  /// renormalised.
  void observe(LayerView&) const override;

 protected:
  /// What is left of a payment when one query more has come.
  virtual double decay() const { return 1; }
  /// Whether the queries that could see a key are counted.
  virtual bool counts() const { return false; }
  /// How many those are, with counts(): no more than a sliding window holds.
  static Ragged seen(const LayerView& at);
};

}  // namespace heed::mechanisms
