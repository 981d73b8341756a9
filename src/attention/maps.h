// Planning from cheap scores: maps between blocks of queries and blocks of keys, what is chosen of them, and stripes
// (columns and diagonals) that a whole head reads.
#pragma once
#include <functional>
#include <span>
#include <vector>

#include "attention/mechanism.h"
#include "attention/select.h"

namespace heed {

/// Throws Error(Unsupported) unless attention is causal.
void causal_only(const LayerView&, const char* mechanism);

/// Blocks of `block` rows of segments of `length` rows each, as F32.
Ragged pooled(Queue&, const Ragged& x, int64_t length, PoolKind, int block);

/// The last `rows` rows of every segment. No copy.
Ragged last_rows(Queue&, const Ragged& x, int64_t rows);
/// Rows first … last − 1 of every segment, which has them. No copy.
Ragged rows_between(Queue&, const Ragged& x, int64_t first, int64_t last);

/// The rows of x whose numbers in its values a formula says, for every row of `like`, which gets their values. F32.
Ragged picked_rows(Queue&, const Ragged& x, const Num& row, Ragged like);

/// A copy in F32.
Ragged in_f32(Queue&, const Ragged& x);
/// Rows less the mean row of their segment, F32: of keys this changes no softmax.
Ragged centred(Queue&, const Ragged& x);
/// Rows as whole numbers from −levels to levels times one scale, max |x| / levels, hold them. F32.
Ragged coded(Queue&, const Ragged& x, int levels);

/// What the last min(rows, n) queries of a slice pay, softmax over all they see: a row of m numbers for each query head.
struct LastRows {
  int64_t rows;
  Grids columns, diagonals;  // mean by key; sum by distance
};
LastRows last_rows_pay(LayerView&, const Slice&, int64_t rows);

/// Means of windows of 2 · stride rows, a window every `stride` rows of segments of `length` rows; F32.
Ragged window_means(Queue&, const Ragged& x, int64_t length, int stride);
/// What each query of a slice pays the `count` rows of `windows`, each of which stands for 2 · stride keys, one every
/// stride: softmax over those that end at or before it, summed over the heads. A row for each query.
Grids window_weights(LayerView&, const Slice&, const Ragged& windows, int64_t count, int stride);

/// Mean queries by mean keys, a grid for each query head of the slice; scale 0 is attention's own. Blocks that begin behind
/// a tile are −∞, or 0 with softmax.
Grids mean_map(LayerView&, const Slice&, int q_block, int k_block, Proxy how);

/// Calls visit(first, last) for queries first … last − 1 of n, a multiple of `block` of them at a time: bounds what
/// scores token by token take. Scratch that a visit takes is given back behind it.
void each_part(Queue&, int64_t n, int block, const std::function<void(int64_t first, int64_t last)>& visit);

/// For each of the last n rows of every segment of numbers x (`length` each), those up to `behind` rows before its own:
/// segments that overlap. No copy.
Ragged up_to_each(Queue&, const Ragged& x, int64_t length, int64_t n, int64_t behind = 0);

/// Whether query head `head` is among `heads`, a parameter of a mechanism: a formula.
Num among(LayerView&, const Range& heads, const Num& head);
/// The plan of a mechanism whose edit() makes the whole output of those heads: they give 0 (Mods::gain).
Plan replaced(LayerView&, const Range& heads, int q_block, int k_block);

/// What is made of a score token by token: formulas of the score, of its query's number in the segment, and of its key's.
using ScoreFormula = std::function<Num(const Num& score, const Num& query, const Num& key)>;
/// Scores token by token (n queries in each segment of q, m keys in each of k), reduced to blocks of q_block × k_block.
/// A part of the queries at a time, so scratch grows with m alone.
Grids block_map(Queue&, const Ragged& q, int64_t n, const Ragged& k, int64_t m, const Proxy& how, ReduceKind,
                int q_block, int k_block, const ScoreFormula& make = {});

/// The sum of the scores of each key over n queries, likewise: out has a row of m numbers for each segment of q. No cell is
/// masked (`how` has softmax).
void sum_columns(Queue&, const Ragged& q, int64_t n, const Ragged& k, int64_t m, const Proxy& how, const Grids& out);

/// For each tile of a slice, how many blocks of keys its last query sees; all without causality.
std::vector<int64_t> visible_blocks(const LayerView&, const Slice&, int q_block, int k_block);

/// Whether queries of row segment() of a slice's map (tiles, head by head) stand in block place(): a formula.
Num own_block(const Slice&, int q_block, int k_block);

/// The sum over the heads of a slice of one-sized grids, as one grid. −∞ stays.
Grids sum_of_heads(Queue&, const Grids&);

/// Scores of the blocks that each tile may read, and which of them it does.
struct BlockChoice {
  Ragged rows;  // a segment for each tile: head by head of the scope, then tile by tile
  Select how;
};
/// What `how` chooses of each row and, besides, what `also` (a formula of segment() and place()) names.
BlockChoice united(Queue&, const Ragged& rows, const Select& how, int64_t capacity, const Num& also);

/// A plan of blocks, chosen slice by slice; for Scope::Layer these are whole sequences, all heads with the keys of the first.
Plan chosen_blocks(LayerView&, Plan::Scope, int q_block, int k_block,
                   const std::function<BlockChoice(const Slice&)>& choose, Slices of = Slices::KvHead);

/// A plan of key ranges: what `sets` names, no more than `runs` ranges in a tile. Lists are those of at's query heads, and
/// those of blocks the plan's rows'.
Plan united_keys(LayerView&, const KeySets& sets, int64_t runs);

}  // namespace heed
