#include "kernels/cpu/walk.h"

#include <algorithm>

namespace heed::HEED_ISA {

Walk::Walk(const Plan& plan, int64_t row, int part, int64_t low, int64_t high)
    : plan_(plan), part_(part), low_(std::max<int64_t>(low, 0)), high_(high) {
  if (plan.form == Plan::Form::Dense) {
    at_ = low_;
    stop_ = std::max(low_, high_);
    return;
  }
  begin_ = e_ = plan.begin(row);
  end_ = plan.end(row);
  // A row of one part ascends, so what lies before `low` is passed over at once.
  if (low_ > 0 && plan.parts == 1 && e_ < end_) {
    auto ends_before = [&](int64_t e) {
      switch (plan.form) {
        case Plan::Form::Interval: return plan.index.at<int32_t>(e, 1) <= low_;
        case Plan::Form::Blocks: return (int64_t(plan.index.at<int32_t>(e)) + 1) * plan.k_tile <= low_;
        default: return plan.index.at<int32_t>(e) < low_;
      }
    };
    int64_t span = end_ - e_;
    while (span > 0) {
      const int64_t half = span / 2;
      if (ends_before(e_ + half)) {
        e_ += half + 1;
        span -= half + 1;
      } else {
        span = half;
      }
    }
  }
  --e_;
}

void Walk::entries(int64_t first, int64_t last) {
  e_ = std::max(e_, begin_ + first - 1);
  end_ = std::min(end_, begin_ + last);
}

void Walk::open() {
  bits_ = nullptr;
  switch (plan_.form) {
    case Plan::Form::Dense: return;
    case Plan::Form::Interval:
      base_ = plan_.index.at<int32_t>(e_, 0);
      stop_ = plan_.index.at<int32_t>(e_, 1);
      break;
    case Plan::Form::Blocks: {
      base_ = int64_t(plan_.index.at<int32_t>(e_)) * plan_.k_tile;
      stop_ = base_ + plan_.k_tile;
      const int32_t mask = plan_.mask ? plan_.mask.at<int32_t>(e_) : -1;
      if (mask >= 0) bits_ = plan_.bits.as<uint64_t>() + mask * plan_.bits.stride[0];
      break;
    }
    case Plan::Form::Tokens:
      base_ = plan_.index.at<int32_t>(e_);
      stop_ = base_ + 1;
      break;
  }
  at_ = std::max(base_, low_);
  stop_ = std::min(stop_, high_);
}

bool Walk::next(int64_t most, Run& run) {
  while (at_ >= stop_) {
    if (plan_.form == Plan::Form::Dense || ++e_ >= end_) return false;
    if (part_ >= 0 && plan_.part && plan_.part.at<int32_t>(e_) != part_) continue;
    open();
  }
  run.first = at_;
  run.count = std::min(most, stop_ - at_);
  run.bits = bits_;
  run.bit = at_ - base_;
  at_ += run.count;
  return true;
}

int64_t planned_keys(const Plan& plan, int64_t row, int64_t keys) {
  if (plan.form == Plan::Form::Dense) return keys;
  const int64_t begin = plan.begin(row), end = plan.end(row);
  if (plan.form == Plan::Form::Tokens) return end - begin;
  if (plan.form == Plan::Form::Blocks) return (end - begin) * plan.k_tile;
  int64_t total = 0;
  for (int64_t e = begin; e < end; ++e)
    total += std::max<int64_t>(
        0, std::min<int64_t>(plan.index.at<int32_t>(e, 1), keys) - std::max(plan.index.at<int32_t>(e, 0), 0));
  return total;
}

}  // namespace heed::HEED_ISA
