// Spans of text whose tokens look at one another: triangles on the diagonal of an attention map.
#pragma once
#include "attention/select.h"

namespace heed {

/// What the new queries of a slice pay each other, in stretches of `stretch` tokens (the last one may be short): the mean
/// over its query heads of P_ij, for attention that has just been (its lse). F32 [stretches · stretch, stretch], row i of
/// stretch t at t · stretch + i; 0 behind the diagonal and past the end.
Tensor paid_inside(LayerView&, const Slice&, int stretch);

/// Triangles of maps that lie as paid_inside gives them: for the span of `length` ≤ `longest` tokens from token x of
/// stretch t on, Σ_{i in it} Σ_{x ≤ j ≤ i} (A_ij − baseline), at (t · stretch + x) · longest + length − 1. A segment for
/// each stretch; −∞ past its end. From two-dimensional prefix sums, in f32.
Ragged triangles(Queue&, const Tensor& maps, int64_t tokens, int stretch, int longest, double baseline);

/// Greedy non-maximum suppression in one dimension: of each stretch's spans, scored as triangles() lays them out, the best
/// is taken and what overlaps it is not, as long as a score is positive (of ties: the earlier, then the shorter one). What
/// is left between two is a span too. F32 [stretches · stretch]: 1 where a token begins a span, else 0. Changes scores.
Tensor span_begins(Queue&, const Ragged& scores, int stretch, int longest);

/// For every row of x the mean of the rows of its span: begins (laid out as x) is 1 where a row begins one, else 0. Running
/// sums that start anew with every span: no rounding of one enters another.
Ragged span_means(Queue&, const Ragged& begins, const Ragged& x);

}  // namespace heed
