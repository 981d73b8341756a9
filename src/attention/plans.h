// Ways of building plans, and what a plan costs before it runs.
#pragma once
#include <functional>
#include <vector>

#include "attention/mechanism.h"

namespace heed {

/// What running a plan takes: query–key pairs, FLOPs (4 · pairs · d for d = d_v) and bytes of K and V read once a tile.
struct Cost {
  double pairs = 0, flops = 0, bytes = 0;
};
/// Host-visible plans. k gives key counts, width and type; d_v the width of values.
Cost cost(const Plan&, const Ragged& q, const Ragged& k, const Mods&, int64_t d_v);

/// Share of the causal query–key pairs (of the layer's window) that a plan computes, for each query head, over all
/// sequences. Waits for the device.
std::vector<double> density(Queue&, const Plan&, const Ragged& q, const Keys&, const Mods&);
/// The numbers behind it, F64 [2, h]: pairs computed, and pairs that a dense plan would compute.
void count_density(Queue&, const Plan&, const Ragged& q, const Keys&, const Mods&, const Tensor& pairs);

/// A Blocks plan whose row r holds what select wrote at r · capacity, count[r] of them. q_tile rows × k_tile keys.
Plan blocks_plan(Queue&, Plan::Scope, int q_tile, int k_tile, Tensor index, Tensor count, int64_t capacity);
/// A Tokens plan, likewise.
Plan tokens_plan(Queue&, Plan::Scope, int q_tile, Tensor index, Tensor count, int64_t capacity);

/// Keys begin … end − 1 of a plan's row: formulas of index(), the row. Empty where they do not ascend.
struct KeyRange {
  Num begin, end;
};
/// An Interval plan of up to two ranges in each of its `rows` rows; empty ones are left out, and the second of two
/// begins no earlier than the first one ends.
Plan ranges_plan(Queue&, Plan::Scope, int q_tile, int64_t rows, const KeyRange& first, const KeyRange& second = {0, 0});

/// A mask of training that a cache follows: keys of these KV heads are seen by queries up to position `last`, a formula over the
/// rows of at.k, those of others by all that follow. Sets at.mods.until.
inline constexpr double kAlways = 2147483647;  // as last
void see_until(LayerView&, const Range& heads, const Num& last);

/// Calls visit(query row of the segment, first key, past-the-last key) for everything that query head `head` of sequence
/// `s` reads under plan, causality, window and until: the plan as a set, for pictures and exports.
void each_interval(const Plan&, const Ragged& q, const Ragged& k, const Mods&, int64_t s, int64_t head,
                   const std::function<void(int64_t row, int64_t begin, int64_t end)>& visit);

/// The plan with query heads outside `heads` made dense; the plan itself when none is. `keys`: offsets of at's keys are
/// enough; key_bound: no segment has more.
Plan limit_heads(LayerView& at, const Plan&, const Ragged& keys, int64_t key_bound, const Range& heads);

}  // namespace heed
