// Arithmetic on what lies beside entries: small words over whole raggeds, from which scores are written as equations.
// Every result is scratch, laid out as its first argument.
#pragma once
#include "attention/mechanism.h"

namespace heed {

/// All entries of the layer: keys [entries, d] as attention reads them (rotated), values [entries, d_v], and their true
/// positions as numbers. F32.
Ragged stored_keys(const LayerView&);
Ragged stored_values(const LayerView&);
Ragged stored_positions(const LayerView&);
/// The keys before rotary embedding, in the layer's coordinates: as they are kept, or turned back.
Ragged plain_keys(const LayerView&);
/// The keys as the store keeps them, rotated or not.
Ragged kept_keys(const LayerView&);

/// Values of all entries, laid out as stored_values gives them, in the place of theirs.
void set_values(const LayerView&, const Ragged& values);

/// x and y, element by element (kernels.h, Combine); without y, x and 1. y may be a number for each row of a wider x.
Ragged combine(Queue&, const Ragged& x, Combine, float factor = 1);
Ragged combine(Queue&, const Ragged& x, const Ragged& y, Combine, float factor = 1);

/// A statistic of each row's group (kernels.h, Spread).
Ragged spread(Queue&, const Ragged& x, const Spread&);
/// e^x / Σ e^x over each group; NaN for rows of none.
Ragged softmax(Queue&, const Ragged& x, Spread group = {});
/// x / Σ x over each group, 0 where the sum is 0; NaN for rows of none.
Ragged shares(Queue&, const Ragged& x, Spread group = {});

/// (x − mean) / deviation over each group, the deviation 1e-6 at least; NaN for rows of none.
Ragged z_scores(Queue&, const Ragged& x, Spread group = {});

/// All rows of x, [rows, width], as one segment. No copy.
Ragged one_segment(Queue&, const Tensor& x);

/// factor · x_i·y_i for every row i of two raggeds of one layout.
Ragged row_dots(Queue&, const Ragged& x, const Ragged& y, float factor = 1);
/// ‖x_i‖₂ of every row.
Ragged row_norms(Queue&, const Ragged& x);
/// factor · row·k_j for every key of a segment; `rows` has one row for each segment.
Ragged dots(Queue&, const Ragged& rows, const Ragged& keys, float factor = 1);
/// The mean row of every segment (0 of an empty one), as a ragged of one row a segment.
Ragged mean_rows(Queue&, const Ragged& x);
/// Every row divided by its root mean square: √width times the unit vector.
Ragged unit_rows(Queue&, const Ragged& x);

/// `rows` numbers 1, [rows] or [rows, width].
Tensor ones(Queue&, int64_t rows, int64_t width = 0);
/// For each entry of the store, how many of the new queries stand at or behind it.
Ragged queries_behind(const LayerView&);

/// While decoding: the logits of every entry of the store for the rows of q, which is at.q or laid out as it; or with `weights`
/// what they pay to it, P. A run of numbers for each query head.
Ragged last_logits(LayerView&, const Ragged& q, bool weights = false);
inline Ragged last_weights(LayerView& at) { return last_logits(at, at.q, true); }

/// What each of the last `rows` new queries pays to each entry, P_ij: for each (sequence, KV head) a run of numbers as
/// long as its entries for every (query head of its group, row), row by row; 0 for rows that a sequence has not, and for
/// keys that a row does not see. rows · h numbers an entry.
Ragged row_weights(const LayerView&, int64_t rows);
/// The statistic over the runs of each KV head, as numbers beside entries.
Ragged over_runs(const LayerView&, const Ragged& runs, Spread::Of of);

/// The mean over a group's query heads of ‖W_O v_j‖₁, W_O the columns of the output matrix that the head owns
/// (Feng et al., 2025). What a norm behind the output matrix does to it is left out.
Ragged output_norms(const LayerView&);

/// ‖W_O v_j‖₂ for each query head of the entry's group, W_O the head's columns of the output matrix: [entries, group].
Ragged output_lengths(const LayerView&);

/// For every row t of a segment of `like`, the sum of the rows i of that segment of x (end to end from row 0) with
/// to[i] = t; rows whose number is negative or past the end are in no sum. to: I32, as x's rows. F32, laid out as
/// `like`.
Ragged sums_by(Queue&, const Ragged& x, const Tensor& to, const Ragged& like);
/// For every row of a segment of `like` (end to end from row 0), the mean of the rows first … last − 1 of that
/// segment of x, 0 of none; first and last are formulas of a row of `like`. F32, as `like`'s rows and of x's width.
Ragged range_means(Queue&, const Ragged& like, const Ragged& x, const Num& first, const Num& last);

/// x without the first `rows` rows of every segment. No copy.
Ragged without_first(Queue&, const Ragged& x, int64_t rows);
/// The query heads that come `member`-th in their groups, as a ragged of one segment for each KV head. No copy.
Ragged members(Queue&, const Ragged& q, int64_t group, int64_t member);

/// How many entries of each (layer, segment) score `least` or more: I32 [layers, segments].
Tensor passing(const Allocation&, float least);

/// Of a layer with a sliding window: the later the better, −∞ for entries that the window has left.
Ragged newest_seen(const LayerView&);

/// Whose keys stay for their place: the first `sinks` first, then the later the better.
Ragged by_age(const LayerView&, int64_t sinks);

}  // namespace heed
