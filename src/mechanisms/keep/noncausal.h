#pragma once
#include "attention/mechanism.h"

namespace heed::mechanisms {

// Non-causal attention (Chari et al., 2025, a part of Compactor): inside tiles of a prompt every query looks at every key,
// without 1/√d as in kvpress (scaled: the paper's). Its layer-wide z-score changes no ranking inside a layer and is left
// out; padded rows of a short last tile, which count there, are not made. Entries decoded later have no score and stay.
struct NonCausal : KeepPolicy {
  int tile, kernel;
  bool scaled;

  static std::vector<ParamInfo> params();
  std::string check() const override;
  Needs needs(const ModelInfo&) const override;
  void observe(LayerView& at) const override;
  Ragged score(LayerView& at) const override;

 protected:
  /// Tokens at both ends of a prompt that have no part in its tiles (one fed by chunks has none).
  virtual std::pair<int64_t, int64_t> outside() const { return {0, 0}; }
  /// What tiles have paid to each entry, smoothed over the keys of `mass`, which are slices of its column.
  Ragged smoothed(LayerView& at, const Ragged& mass) const;
};

}  // namespace heed::mechanisms
