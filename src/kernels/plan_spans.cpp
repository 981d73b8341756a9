#include "kernels/plan_spans.h"

#include <algorithm>

namespace heed {

PlanHead::PlanHead(const Plan& plan, const PlanRows& rows, const Ragged& q, const Ragged& k, int64_t s, int64_t head)
    : n(q.length(s * q.heads + head)), m(k.length(s * k.heads + head * k.heads / q.heads)),
      q_row(q.begin(s * q.heads + head)), k_row(k.begin(s * k.heads + head * k.heads / q.heads)),
      plan_row(plan.form == Plan::Form::Dense ? 0 : rows.row(s, head, q.heads, 0, plan.q_tile)) {}

Spans named_keys(const Plan& plan, int64_t row, int64_t m) {
  Spans out;
  if (plan.form == Plan::Form::Dense) return {{0, m}};
  auto add = [&](int64_t begin, int64_t end) {
    end = std::min(end, m);
    if (begin >= end) return;
    if (!out.empty() && out.back().second == begin) out.back().second = end;
    else out.emplace_back(begin, end);
  };
  for (int64_t e = plan.begin(row); e < plan.end(row); ++e) switch (plan.form) {
      case Plan::Form::Interval: add(plan.index.at<int32_t>(e, 0), plan.index.at<int32_t>(e, 1)); break;
      case Plan::Form::Blocks: {
        const int64_t block = plan.index.at<int32_t>(e);
        add(block * plan.k_tile, (block + 1) * plan.k_tile);
        break;
      }
      default: add(plan.index.at<int32_t>(e), plan.index.at<int32_t>(e) + 1);
    }
  return out;
}

std::pair<int64_t, int64_t> visible_keys(const PlanHead& head, const Plan& plan, const Mods& mods, int64_t i) {
  int64_t high = plan.causal ? std::min(head.m, head.m - head.n + i + 1) : head.m, low = 0;
  if (mods.window > 0) {
    const int64_t position = mods.q_pos ? mods.q_pos.at<int32_t>(head.q_row + i) : head.m - head.n + i;
    if (mods.k_pos) {
      const int32_t* keys = mods.k_pos.as<int32_t>() + head.k_row;
      low = std::upper_bound(keys, keys + head.m, position - mods.window) - keys;
    } else {
      low = std::max<int64_t>(0, position - mods.window + 1);
    }
  }
  return {low, std::max(low, high)};
}

}  // namespace heed
