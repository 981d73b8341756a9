#pragma once
#include "attention/mechanism.h"

namespace heed::mechanisms {

/// A policy that drops nothing: entries older than the newest `residual` lie in the second layout (Needs::quantised).
/// Whole pages of 64 entries are turned, keys and values together, so between residual and residual + 63 stay exact, and so
/// do the pages that hold the first `first`.
struct QuantisedPast : KeepPolicy {
  int bits, residual, first = 0;

  static ParamInfo residual_param(int fallback);
  static ParamInfo first_param(int fallback);
  static PageType::Kind kind(int bits);
  /// A message when bits is none of those.
  std::string only(std::initializer_list<int> allowed) const;
  const When& timing() const override;
  bool settle(LayerView& at) const override;
};

}  // namespace heed::mechanisms
