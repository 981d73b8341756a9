#include "kernels/plan.h"

#include "base/error.h"

namespace heed {

void check_plan(const Plan& plan, const char* where) {
  require(plan.q_tile >= 1 && plan.k_tile >= 1, where, "a plan's tiles have at least one row and one key");
  require(plan.parts >= 1, where, "a plan has at least one part");
  if (plan.form == Plan::Form::Dense) {
    require(plan.parts == 1, where, "a dense plan has one part", "name the keys of each part as intervals");
    return;
  }
  const bool interval = plan.form == Plan::Form::Interval, blocks = plan.form == Plan::Form::Blocks;
  require(plan.rowptr && plan.rowptr.type == Dtype::I64 && plan.rowptr.rank == 1 && plan.rowptr.size[0] >= 1, where,
          [&] { return "a plan needs rowptr, I64 [rows + 1]"; });
  require(plan.index.type == Dtype::I32 && plan.index.rank == (interval ? 2 : 1) && (!interval || plan.index.size[1] == 2),
          where, interval ? "index of intervals is I32 [nnz, 2]" : "index of blocks and tokens is I32 [nnz]");
  const int64_t nnz = plan.index.size[0];
  if (plan.count)
    require(plan.count.type == Dtype::I32 && plan.count.rank == 1 && plan.count.size[0] == plan.rows(), where,
            "a plan's count is I32 [rows]");
  if (plan.part || plan.parts > 1)
    require(plan.part && plan.part.type == Dtype::I32 && plan.part.rank == 1 && plan.part.size[0] >= nnz, where,
            "a plan of several parts needs part, I32 [nnz]");
  if (plan.mask) {
    require(blocks, where, "only a plan of blocks has masks");
    require(plan.mask.type == Dtype::I32 && plan.mask.rank == 1 && plan.mask.size[0] >= nnz, where,
            "a plan's mask is I32 [nnz]");
    require(plan.bits.type == Dtype::U64 && plan.bits.rank == 3 && plan.bits.size[1] == plan.q_tile &&
                plan.bits.size[2] == (plan.k_tile + 63) / 64,
            where, "a plan's bits are U64 [masks, q_tile, ⌈k_tile / 64⌉]");
  }
}

PlanRows::PlanRows(const Plan& plan, const Ragged& q, int64_t kv_heads)
    : heads(scope_heads(plan.scope, q.heads, kv_heads)) {
  const int64_t sequences = q.sequences();
  starts.reserve(size_t(sequences * heads + 1));
  starts.push_back(0);
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t tiles = (q.length(s * q.heads) + plan.q_tile - 1) / plan.q_tile;
    for (int64_t head = 0; head < heads; ++head) starts.push_back(starts.back() + tiles);
  }
}

void PlanRows::check(const Plan& plan, const char* where) const {
  require(plan.rows() >= starts.back(), where,
          "the plan has " + std::to_string(plan.rows()) + " rows, the queries have " + std::to_string(starts.back()) +
              " tiles");
}

}  // namespace heed
