// A plan: which keys each query reads, as data that kernels execute.
#pragma once
#include <vector>

#include "base/tensor.h"

namespace heed {

/// Rows of a plan are query tiles: tile t of a head holds query rows t·q_tile … of that sequence's queries. They are
/// numbered sequence by sequence, then head by head (of the scope), then tile by tile. Key numbers count from the
/// first key of the segment. `causal` hides keys behind the bottom-right diagonal: query row i of n sees key j of m
/// when j − i ≤ m − n. It applies on top of every form. Keys at or past a segment's end are skipped (so heads of unequal
/// lengths may share a row); no key appears twice in a row. Dense has no rows and one part.
struct Plan {
  enum class Form : uint8_t {
    Dense,     // every key
    Interval,  // index I32 [nnz, 2]: half-open key ranges, ascending and disjoint in a row
    Blocks,    // index I32 [nnz]: blocks of k_tile keys, ascending
    Tokens,    // index I32 [nnz]: keys, ascending
  };
  enum class Scope : uint8_t { QueryHead, KvHead, Layer };  // who shares a row: nobody, a group, all heads

  Form form = Form::Dense;
  Scope scope = Scope::QueryHead;
  int q_tile = 1;
  int k_tile = 1;
  bool causal = true;
  Tensor rowptr;  // I64 [rows + 1]: row r is entries rowptr[r] … rowptr[r + 1] of index
  Tensor count;   // optional I32 [rows]: only the first count[r] entries of row r are used (counts made on the device)
  Tensor index;
  Tensor mask;  // optional I32 [nnz], Blocks: −1 for a whole block, else which tile of `bits`
  Tensor bits;  // U64 [masks, q_tile, ⌈k_tile / 64⌉]: bit j of row i set when query i of the tile sees key j of the block
  Tensor part;    // optional I32 [nnz]: the part, 0 … parts − 1, that an entry belongs to
  int parts = 1;  // more than one: one output and one lse for each part
  int64_t nnz_bound = 0;

  int64_t rows() const { return rowptr ? rowptr.size[0] - 1 : 0; }
  // Host-visible plans only.
  int64_t begin(int64_t row) const { return rowptr.at<int64_t>(row); }
  int64_t end(int64_t row) const { return count ? begin(row) + count.at<int32_t>(row) : rowptr.at<int64_t>(row + 1); }
};

/// Throws Error(Invalid) unless the plan's tensors are there, of the right types, and fit one another. Contents are not read.
void check_plan(const Plan& plan, const char* where);

/// The heads of a plan's scope for h query heads over g KV heads.
inline int64_t scope_heads(Plan::Scope scope, int64_t h, int64_t g) {
  return scope == Plan::Scope::QueryHead ? h : scope == Plan::Scope::KvHead ? g : 1;
}

/// First plan row of each (sequence, scope head) pair, given the query lengths; host side.
/// Row of query i of `head` in sequence s: starts[s · heads + head] + i / q_tile.
struct PlanRows {
  std::vector<int64_t> starts;  // [sequences · heads + 1]
  int64_t heads = 1;
  PlanRows(const Plan& plan, const Ragged& q, int64_t kv_heads);
  /// Throws Error(Invalid) where the plan, which is not Dense, has fewer rows.
  void check(const Plan& plan, const char* where) const;
  /// `query_head` of h; the scope is applied here.
  int64_t row(int64_t sequence, int64_t query_head, int64_t h, int64_t i, int q_tile) const {
    return starts[size_t(sequence * heads + query_head * heads / h)] + i / q_tile;
  }
};

}  // namespace heed
