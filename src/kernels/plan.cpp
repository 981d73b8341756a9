#include "kernels/plan.h"

#include "base/error.h"

namespace heed {

PlanRows::PlanRows(const Plan& plan, const Ragged& q, int64_t kv_heads) : heads(scope_heads(plan.scope, q.heads, kv_heads)) {
  const int64_t sequences = q.sequences();
  starts.reserve(size_t(sequences * heads + 1));
  starts.push_back(0);
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t tiles = (q.length(s * q.heads) + plan.q_tile - 1) / plan.q_tile;
    for (int64_t head = 0; head < heads; ++head) starts.push_back(starts.back() + tiles);
  }
}

}  // namespace heed
