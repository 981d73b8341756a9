#pragma once
#include "attention/mechanism.h"

namespace heed::mechanisms {

// SnapKV (Li et al., 2024): keep, for each KV head, the keys that the last `window` queries look at. One set a KV head, as
// ports do (the authors repeat keys and keep one a query head); the sum over the window's rows ranks as their mean does.
struct SnapKV : KeepPolicy {
  int window, kernel;
  Choice pool, group;
  Observe::Rows rows = Observe::Rows::Mean;  // over the queries that vote
  int look = 0;                              // last tokens that vote and never stay

  static std::vector<ParamInfo> params();
  std::string check() const override;
  Ragged score(LayerView& at) const override;
};

}  // namespace heed::mechanisms
