// Which keys a tile of query rows meets, in ascending runs, read from a plan.
#pragma once
#include "kernels/kernels.h"

namespace heed::HEED_ISA {

/// Consecutive keys, and where the plan's mask for them is.
struct Run {
  int64_t first = 0, count = 0;
  const uint64_t* bits = nullptr;  // the first word of query 0 of the mask; null: all queries see all keys
  int64_t bit = 0;                 // of `first` in it
};

class Walk {
 public:
  /// Keys low ≤ j < high of one row of a plan (not read when Dense); `part` −1 means all parts.
  Walk(const Plan& plan, int64_t row, int part, int64_t low, int64_t high);
  /// Only entries first ≤ e < last of the row, counted from its begin (not for Dense).
  void entries(int64_t first, int64_t last);
  /// The next run of at most `most` keys; false at the end.
  bool next(int64_t most, Run& run);

 private:
  /// Sets [at_, stop_) to the keys of entry e_, clipped.
  void open();

  const Plan& plan_;
  int part_;
  int64_t low_, high_;
  int64_t begin_ = 0, e_ = 0, end_ = 0;
  int64_t at_ = 0, stop_ = 0, base_ = 0;
  const uint64_t* bits_ = nullptr;
};

/// How many keys a row of a plan names within `keys` keys, at most (masks and causality not applied).
int64_t planned_keys(const Plan& plan, int64_t row, int64_t keys);

}  // namespace heed::HEED_ISA
