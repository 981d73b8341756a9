// Small words between scores and plans: parts of raggeds, counts for allocators, rows of block scores.
#pragma once
#include <functional>
#include <span>

#include "attention/mechanism.h"
#include "attention/plans.h"

namespace heed {

/// Segments first … last − 1 of x, as sequences of `heads` heads. No copy.
Ragged segments(const Ragged& x, int64_t first, int64_t last, int64_t heads);

/// x without the last counts[sequence] rows of every segment (no segment becomes longer than it is). No copy.
Ragged without_last(Queue&, const Ragged& x, std::span<const int64_t> counts);

/// The last counts[sequence] rows of every segment of scores become +∞. Returns scores.
Ragged force_last(Queue&, Ragged scores, std::span<const int64_t> counts);

/// A ragged of numbers (or of rows of `width`) whose segment s has lengths[s] rows: scratch, not initialised.
Ragged numbers(Queue&, std::span<const int64_t> lengths, int64_t heads, int64_t width = 1);

/// Likewise with lengths that a formula of index() says; `bound`: the most rows of all segments together.
Ragged numbers(Queue&, int64_t segments, const Num& lengths, int64_t heads, int64_t bound);

/// Numbers beside the entries of KV heads, [entries, group] (Observe::Heads::Each), as one run for each query head.
Ragged by_query_head(Queue&, const Ragged& columns, int64_t group);

/// The first number of every `block` of them in each segment: ⌈length / block⌉, of blocks that share theirs.
Ragged of_blocks(Queue&, const Ragged& x, int64_t block);

/// A number for each sequence, seen by the segment s of which sequence s / heads is one: a formula.
Num of_sequence(Queue&, std::span<const int64_t> numbers, const Num& s, int64_t heads);

/// Matrices of rows × cols for each of `heads` segments: scratch.
Grids grids(Queue&, int64_t heads, int64_t rows, int64_t cols);

/// The rows of one-sized matrices as segments: row r (counted through all matrices) is its first visible[r mod rows] cells.
Ragged rows_of(Queue&, const Grids&, std::span<const int64_t> visible);

/// What is chosen of each segment of some scores: the places of its numbers, ascending.
struct Lists : KeyLists {
  /// Whether `number` is among those of segment `s`: a formula.
  Num has(const Num& s, const Num& number) const;
  /// Segments first … last − 1. No copy.
  Lists part(int64_t first, int64_t last) const;
};
/// Room for them: scratch.
Lists lists(Queue&, int64_t segments, int64_t capacity);
/// The kernel `select` into lists that are there, or that are made: scratch.
void choose(Queue&, const Ragged& scores, const Select&, const Lists& into);
Lists chosen(Queue&, const Ragged& scores, const Select&, int64_t capacity);

/// Chooses what a formula flagged: 1, not 0.
inline Select flagged() {
  Select out;
  out.by = Select::By::Threshold, out.p = 0.5f;
  return out;
}

/// Whether head `head` of `count` is among `heads`: a formula.
Num among(Queue&, const Range& heads, int64_t count, const Num& head);

/// The segments of scores (a number of heads for each sequence) whose sequence has a query, in order: the rows of a plan that
/// read() makes, where a sequence without a new token has none.
Ragged with_queries(LayerView&, const Ragged& scores);

/// The segment, of `heads` to a sequence, that row `row` of such a plan belongs to.
Num query_segment(LayerView&, const Num& row, int64_t heads);
inline Num query_segment(LayerView& at, const Num& row) { return query_segment(at, row, at.q.heads); }

/// What a budget grants of `length` entries: all when there are fewer, a fraction of them rounded down but at least one.
Num granted(const Budget&, const Num& length);

/// For each sequence, min(most, what the budget allows it): a window that a fraction of a short prompt can pay for.
std::vector<int64_t> affordable(const LayerView&, const Budget&, int64_t most);

/// A message when a budget of entries is smaller than what is always kept; `names` says which parameters that is.
std::string too_small(const Budget&, int64_t forced, const std::string& names);

/// A message when blocks of `size` entries do not divide a page of the store; `name` is the parameter.
std::string uneven(int size, const char* name);

/// Which (layer, segment) share one pool of a division.
enum class Pool : uint8_t {
  Layer,  // the KV heads of a layer (AdaKV)
  All,    // all layers and KV heads (KVzip)
};

/// Divides between the members of a pool what `counts` (I32 [layers, segments]) grants them together: the best scores of
/// the pool win, +∞ first. The sum over a pool is kept, up to its number of entries. Returns I32 [layers, segments].
Tensor divide(const Allocation&, std::span<const Ragged> scores, Tensor counts, Pool pool);

/// `even` (I32 [layers, segments]) with other counts for the layers that have no sliding window: what `share` makes
/// of their scores and their rows of `even`.
Tensor without_windows(const Allocation& a, const Tensor& even,
                       const std::function<Tensor(std::span<const Ragged> scores, const Tensor& granted)>& share);

/// One KV head of one sequence with the query heads that read it, or all of a sequence, whose KV heads then hold equally many
/// keys. Planners score slice by slice, which bounds scratch.
struct Slice {
  Ragged q;  // heads = group, or h
  Ragged k;  // heads = 1, or g
  int64_t n, m;
  int64_t sequence, kv_head;  // all: the first
  int64_t row, tiles;         // the plan's rows row … row + q.heads · tiles
};
/// What a planner looks at. Either: whole sequences where the table wants it (Kernels::plan_sequences) and their heads agree.
enum class Slices : uint8_t { KvHead, Either, Sequence };
/// Calls visit for every slice with queries; scratch that a visit takes is given back behind it.
void each_slice(LayerView& at, int q_tile, const std::function<void(const Slice&)>& visit, Slices of = Slices::KvHead);

/// Rows of a plan of q_tile rows for at's queries, one scope head for each query head.
int64_t plan_rows(const LayerView& at, int q_tile);

/// The most keys that a sequence's queries see.
int64_t longest_keys(const LayerView& at);

/// The most queries that a sequence has, at least 1.
int64_t longest_queries(const LayerView& at);

/// A plan from rows of ascending block numbers, rows as Plan counts them.
Plan listed_blocks(Queue&, int q_tile, int k_tile, std::span<const std::vector<int32_t>> rows);

/// A plan from block lists of single queries (one scope head for each query head, count[r] blocks at r · capacity, `blocks`
/// in all at most): tiles of 64 queries share a list, and bits say which of them read a block.
Plan tiled_blocks(LayerView&, int block, Tensor index, Tensor count, int64_t capacity, int64_t blocks);

/// A dense plan that names its tiles, for a planner that sees nothing to leave out.
Plan dense_plan(int q_tile, int k_tile);

}  // namespace heed
