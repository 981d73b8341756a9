// What rows of a plan that the host can see read: for counting, drawing and exporting plans.
#pragma once
#include <utility>
#include <vector>

#include "kernels/kernels.h"

namespace heed {

using Spans = std::vector<std::pair<int64_t, int64_t>>;  // half-open, ascending, disjoint

/// The query and key counts, positions and first plan row of one (sequence, query head).
struct PlanHead {
  int64_t n, m, q_row, k_row, plan_row;
  PlanHead(const Plan& plan, const PlanRows& rows, const Ragged& q, const Ragged& k, int64_t s, int64_t head);
};

/// Keys that a plan row names among m; bit-masked blocks are left whole.
Spans named_keys(const Plan& plan, int64_t row, int64_t m);

/// What causality and the window leave to query row i: [low, high).
std::pair<int64_t, int64_t> visible_keys(const PlanHead& head, const Plan& plan, const Mods& mods, int64_t i);

inline bool masked(const Plan& plan) { return plan.form == Plan::Form::Blocks && bool(plan.mask); }

}  // namespace heed
