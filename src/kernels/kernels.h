// The narrow waist: every hot loop of heed. Each backend fills one table of these functions; all work on the same
// views, so a mechanism written once runs on all.
//
// Shapes. h query heads read g KV heads; group = h / g. Queries are head-major: a Ragged with heads = h whose segment
// (sequence, head) is rows [n, d]; keys and values are Ragged with heads = g and rows [m, d], [m, d_v]. With one
// sequence these are the arrays q [h, n, d], k [g, m, d], v [g, m, d_v]. Queries are the last n positions of the m
// keys (bottom-right causal). One number for each query row ("row" below) is indexed as q.values' rows are; one number
// for each key ("key" below) as k.values' rows are. Rows of q.values outside every segment are neither read nor written.
// Rows of numbers (the last dimension) are contiguous; the rows themselves may be strided (a slice of something wider).
// Tensors of one number a row are contiguous. Offsets and ends of outputs are inputs: the caller has laid them out.
//
// Number types. q, k, v: F32, BF16 or F16 (each its own). Everything else F32 unless said. Sums are in f32.
// Queries of F32 or F16 over keys of BF16 may be rounded to BF16 by attend, its gradient, attend_store, observe and
// proxy, which then changes a logit by up to 2^-7 · scale · |q||k| / √d; over values of BF16 the gradient may round d_out and
// weights too.
// Bound of every kernel: |result − reference| ≤ 2^-7 · scale of the operands for BF16 inputs, 2^-10 for F16 and
// 2^-18 · √(terms) for F32 (tests/kernels states it for each kernel).
//
// Errors. Shapes and types that do not fit throw Error(Invalid). An empty segment, or a row that sees no key, gives
// out = 0 and lse = −∞ (with sink_logits: the sink's). No kernel waits for the host.
#pragma once
#include <span>
#include <string>
#include <vector>

#include "base/queue.h"
#include "base/tensor.h"
#include "kernels/numbers.h"
#include "kernels/pages.h"
#include "kernels/plan.h"

namespace heed {

/// Rotary position embedding of the first `dims` channels. Pair i is channels (i, i + dims/2) (neox) or (2i, 2i + 1);
/// it turns by position · inv_freq[i].
struct Rope {
  Tensor inv_freq;  // F32 [dims / 2]
  int dims = 0;
  bool neox = true;
};

/// Sigmoid: P = σ(logit) without a denominator; parts add; lse = log Σ P, −∞ where f32 has no number so small as Σ P.
enum class WeightFunction : uint8_t { Softmax, Sigmoid };

/// What changes a logit or an output: logit = softcap(scale · temperature · q·k) + biases. An empty tensor is absent.
struct Mods {
  float scale = 0;     // 0 means 1/√d
  float softcap = 0;   // c > 0: c · tanh(x / c)
  int64_t window = 0;  // w > 0: a key is seen only while query position − key position < w (sliding-window layers)
  Tensor q_pos;        // row, I32: true positions, needed by window and until; absent: m − n + i (so give it to a store
                       // that has lost entries)
  Tensor k_pos;        // key, I32: ascending in a segment; absent: the key's number
  Tensor key_bias;     // key: added to the logit
  Tensor row_factor;   // [rows, r] and
  Tensor key_factor;   // [keys, r]: adds row_factor · key_factor (ALiBi has r = 2)
  Tensor temperature;  // row: multiplies the logit before the cap
  Tensor gain;         // row: multiplies the output, not lse; 0 skips the row: out = 0, lse = −∞, no gradients
  Tensor sink_logits;  // F32 [h]: one more logit in the denominator and in lse, with no value (score.md S4); it belongs
                       // to part 0; Softmax only
  Tensor until;        // key, I32: the last query position that sees the key
  Tensor k_map, v_map;  // I32 [h]: the KV head that a query head reads; absent: head / group
  WeightFunction weight = WeightFunction::Softmax;
};

/// Where attend_store reads, and at which positions keys are rotated when the store keeps them plain.
struct Read {
  Plan plan;  // q_tile covers a segment's rows; form Dense, Blocks (k_tile divides 64) or Tokens
  enum class Positions : uint8_t { True, Cache } positions = Positions::True;  // Cache: entry i of a segment at i
  /// Needed when pages.plain_keys.
  const Rope* rope = nullptr;
  /// I32, optional: a position for each entry, in segments of at least the pages' lengths. It is where a plain key is rotated,
  /// whatever `positions` says; windows go by true positions all the same.
  Ragged places = {};
  /// Where an entry is rotated that stands at `position`. Host-visible places only.
  int64_t place(int64_t segment, int64_t entry, int64_t position) const {
    if (places.values) return places.values.at<int32_t>(places.begin(segment) + entry);
    return positions == Positions::Cache ? entry : position;
  }
};

/// Keys to observe: a panel or a store's pages.
struct Keys {
  const Ragged* panel = nullptr;
  const Pages* pages = nullptr;
  const Read* read = nullptr;  // with pages: positions and rope of plain keys
};

/// Statistics of the attention that the given query rows pay to each key.
struct Observe {
  enum class Rows : uint8_t {
    Sum,      // Σ_i P_ij
    Mean,     // Σ_i P_ij / rows
    Seen,     // Σ_i P_ij / number of rows that see key j
    Max,      // max_i P_ij
    Last,     // P of the last row
    Decayed,  // Σ_i decay^(n − 1 − i) P_ij
  } rows = Rows::Mean;
  /// Over the query heads that read the KV head (by k_map; Each only without one). LayerMean: key j's mean over all h
  /// heads, the same in every segment of the sequence; a segment that has no key j adds 0.
  enum class Heads : uint8_t { Each, GroupMean, GroupMax, GroupSum, LayerMean } heads = Heads::GroupMean;
  float decay = 1;
  bool logits = false;  // of the logits (cap and biases included) instead of probabilities; rows that do not see a key add
                        // nothing to sums, and keys that no row (Last: the last row) sees get −∞ from Max and Last
  Tensor lse;           // row, optional: P = e^(logit − lse); attend's over the same keys, with no gain, saves a pass
};

/// Statistics of each query row; tensors left empty are not computed.
struct RowStats {
  Tensor entropy;   // row: −Σ P log P over the keys it sees, nats
  Tensor distance;  // row: Σ P_ij (position i − position j), positions as q_pos and k_pos
  Tensor argmax;    // row, I32: the key with the largest P, the lower one of ties; −1 when none is seen
  Tensor peak;      // row: its P; 0 when none is seen
  Tensor lse;       // row
  Tensor span;      // [rows, spans]: Σ of P over keys spans[s][0] ≤ j < spans[s][1]
  Tensor spans;     // I32 [spans, 2], in: shared by all segments
};

enum class PoolKind : uint8_t {
  Mean,
  Min,
  Max,
  Sum,
  First,
  Last,
  Concat,          // rows of a block side by side: [blocks, block · width], a short block padded with zeros
  ConcatReversed,  // the same padded block, last row first: zeros lead (XAttention's antidiagonal)
};

/// Matrices of cheap scores, one for each segment: rows × cols numbers, row-major, in cells (a Ragged of single
/// numbers with q's heads).
struct Grids {
  Ragged cells;
  Tensor rows, cols;  // I64 [segments]
};

struct Proxy {
  float scale = 0;  // 0 means 1/√(width)
  float softcap = 0;
  bool softmax = false;
  bool causal = true;  // row i sees column j when some query of its tile sees some key of the block
  int q_tile = 1, k_tile = 1;
  int64_t offset = 0;  // how many keys lie before the first query (m − n), in tokens
  bool int8 = false;   // both sides as round(x / s) with s = max|row| / 127, halves to even
};

/// Cells of −∞ (masked) do not count; an entry without any other cell is −∞.
enum class ReduceKind : uint8_t { Sum, Mean, Max };

struct Reduce {
  enum class To : uint8_t {
    Blocks,     // [⌈rows / row_block⌉, ⌈cols / col_block⌉]
    Columns,    // [1, cols]
    Diagonals,  // [1, cols]: entry o is the cells with j = cols − rows + i − o, o ≥ 0
    Rows,       // [rows, 1]
  } to = To::Blocks;
  ReduceKind kind = ReduceKind::Sum;
  int row_block = 1, col_block = 1;
};

struct Select {
  enum class By : uint8_t {
    TopK,       // the k largest; k from `count`, or the same for all
    TopP,       // the largest, in order, until their share of the segment's total reaches p (scores ≥ 0)
    Threshold,  // all with score ≥ p
  } by = By::TopK;
  int64_t k = 0;
  Tensor count = {};  // I32 [segments]: k for each segment
  float p = 0;
  bool crossing = true;  // TopP: an element is in while the sum before it < p · total; false: while the sum with it ≤ p · total
  Tensor held = {};  // TopP, optional F32 [segments]: weight that entries outside the scores (forced ones) hold already: it
                     // is part of the total and lies before the first element
  int64_t at_least = 0;  // TopP, Threshold: the largest so many are in anyway
};
// Rules of select: −∞ and NaN are never chosen, +∞ always first (forced entries, no part of TopP's total, but of TopK's
// k); of ties the lower index; no more than `capacity` are chosen, the largest; what is chosen is written in ascending
// order, and index beyond count is left as it was.

/// Which blocks of a store's segment a new query reads: its best ones by what columns hold of them.
struct PageChoice {
  int low = -1, high = -1;  // columns and scores as page_score has them
  /// A list for each query head, or one for each KV head by this statistic of its query heads' scores.
  enum class Of : uint8_t { Each, Mean, Max, Sum } of = Of::Each;
  int split = 1;  // a block is so many of the columns' blocks, in one page, and scores what the best of them does
  int64_t sinks = 0, recent = 0;  // blocks that hold one of so many first or latest entries come first
  /// ⌈granted entries / block's entries⌉ blocks, at least `least` and what comes first; of `held` entries a share grants
  /// max(1, ⌊share · held⌋) and else a number itself, at most all of them.
  double share = 0;
  int64_t number = 0, least = 0;
};

/// Lists of ascending numbers as select writes them: list l is count[l] numbers from l · capacity on.
struct KeyLists {
  Tensor index, count;  // I32 [lists · capacity], [lists]; empty: nothing is named
  int64_t capacity = 0;
};

/// Keys that a tile of queries reads: those that any of its queries does. Key numbers count from the first key of a segment.
struct KeySets {
  int tile = 64;       // queries of a tile
  Tensor sinks;        // I32 [segments of q], may be empty: so many first keys
  Tensor local;        // likewise: so many keys before a query, its own among them
  KeyLists keys;       // of each segment of q
  KeyLists distances;  // likewise: a query reads the key so far before it
  KeyLists blocks;     // of each tile: keys block · number … + block − 1
  int block = 1;
};

/// The recurrence of catalogue/linear.md (R): S_t = Diag(e^g) S_{t−1} + correction + k v^T, o = scale · S_t^T q.
/// Head-major rows as in attend; heads of q, k and v agree. State is F32 [segments, d, d_v].
struct Recur {
  enum class Decay : uint8_t { None, Scalar, Vector } decay = Decay::None;
  enum class Correction : uint8_t {
    None,
    Delta,    // decay first, then S += β k (v − S^T k)^T
    LowRank,  // S += b (a^T S_{t−1})^T before k v^T
  } correction = Correction::None;
  bool normalise = false;  // divides o by (z_t · q), z_t = e^g z_{t−1} + k; o = 0 where that is 0
  float scale = 0;         // 0 means 1/√d
};

struct RecurInputs {
  Ragged q, k, v;
  Tensor g;      // log decay ≤ 0: row [rows] (Scalar) or [rows, d] (Vector)
  Tensor beta;   // row: Delta
  Tensor a, b;   // [rows, d]: LowRank
  Tensor state;  // [segments, d, d_v], optional: the state before the first row
  Tensor z;      // [segments, d], optional with normalise
};

struct RecurGrads {  // each the shape of what it is the gradient of; empty: not wanted
  Tensor q, k, v, g, beta, a, b, state;
};

enum class ScanKind : uint8_t { Linear, Lse, Min, Max, Mean };

/// What combine makes of two numbers x and y; an absent y is 1.
enum class Combine : uint8_t {
  Add,       // x + factor · y
  Multiply,  // factor · x · y
  Divide,    // factor · x / y; 0 where y is 0
  Max,       // max(x, factor · y)
  Exp,       // e^(factor · x) · y
  Log,       // factor · log(x) · y
  Power,     // x^factor · y, x ≥ 0
  AtLeast,   // 1 where x ≥ factor · y, else 0
  Finite,    // x where it is finite, else factor · y
  Forced,    // x where it is +∞, else factor · y
};

/// A statistic of a group of rows, for every row of the group and each channel on its own.
struct Spread {
  enum class Of : uint8_t {
    Sum,
    Mean,
    Min,
    Max,
    Deviation,  // √(Σ (x − mean)² / (rows − 1)); 0 for a single row
    Rank,  // how many rows of the group select would take after this one; Block only, at the price of a group's square
  } of = Of::Mean;
  enum class Over : uint8_t {
    Block,  // `block` rows of a segment, counted from row `first` on; 0: all of them. The last one may be short
    Heads,  // row i of every head of a sequence that has one
    Layer,  // all rows of all heads of a sequence
  } over = Over::Block;
  int64_t block = 0, first = 0;
  int64_t ahead = 0;  // Block: the statistic is that of the block so many further on, which must be whole
};
// A row that belongs to no group, or whose group ahead is not there, gets NaN.

enum class Activation : uint8_t { Silu, GeluTanh };

/// One of several matrices that multiply the same rows.
struct Linear {
  Tensor w, bias, y;  // as matmul has them; bias may be empty
  bool add = false;   // to what y holds
};

/// An RMS norm of rows before they are multiplied, as rms_norm has it.
struct Norm {
  Tensor weight;
  float eps = 0;
};

/// Rows of heads on their way from token-major to head-major.
struct Heads {
  Tensor x;     // F32 [T, heads, d]
  Tensor norm;  // F32 [d]: RMS norm over d; empty: none
  const Rope* rope = nullptr;
  Tensor positions;  // of a rotation: I32 [T], or [T, heads]
  Ragged out;        // any plain type
};

/// The table. Implementations: reference/ (plain loops, the oracle), cpu/ (one instance for each instruction set).
struct Kernels {
  std::string name;           // "reference", "avx2", "avx2-int16", "avx512", "avx512-bf16", "amx", "neon", "cuda"
  bool v_transposed = false;  // the page layout this backend wants for V
  const Memory* memory = &cpu_memory();  // where every tensor that a kernel sees must lie
  bool rounds = false;                   // whether prompts' products round what they multiply to less than f32
  int64_t tile_rows = 512;               // tokens of a prompt whose products are best done at once
  Dtype prompt_rows = Dtype::F32;  // F32 or BF16: what matmul_glu and merge_heads had best write of a prompt's tokens
  int plan_rows = 64;              // queries of a tile, 64 or 128, for which a plan of blocks is fastest
  bool plan_sequences = false;     // whether planners had best look at all heads of a sequence at once

  /// out [rows, d_v], lse [rows]; with plan.parts > 1: out [parts, rows, d_v], lse [parts, rows]. lse may be empty.
  /// Milakov & Gimelshein 2018 (online softmax); Dao 2023 (tiling).
  void (*attend)(Queue&, const Ragged& q, const Ragged& k, const Ragged& v, const Plan&, const Mods&, Tensor out, Tensor lse);

  /// Gradients of Σ out · d_out. d_q, d_k, d_v (F32) are overwritten; d_key_bias and d_gain may be empty. out and lse
  /// are attend's own; with parts they are the merged ones (pattern.md, split-KV). Probabilities are e^(logit − lse), so an
  /// lse over more keys than the plan's (a ring of devices) gives this share of the gradients. A GPU may add the terms of d_q in
  /// any order: its last bits then differ from call to call.
  void (*attend_backward)(Queue&, const Ragged& q, const Ragged& k, const Ragged& v, const Plan&, const Mods&, Tensor out,
                          Tensor lse, Tensor d_out, Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_key_bias, Tensor d_gain);

  /// attend over pages, for a few rows a sequence. Mods' key tensors are not used: bias and positions lie in the pages.
  void (*attend_store)(Queue&, const Ragged& q, const Pages&, const Read&, const Mods&, Tensor out, Tensor lse);

  /// outs [parts, rows, d_v], weights [parts, rows] (lse, or any log weights) → out [rows, d_v], lse [rows] (may be empty).
  void (*merge)(Queue&, Tensor outs, Tensor weights, Tensor out, Tensor lse);

  /// columns: [keys] or, with Heads::Each, [keys, group]; keys numbered as the panel's rows or, for pages, as the
  /// Ragged that page_read fills. `plan` (may be null) limits which keys count; softmax is over those.
  void (*observe)(Queue&, const Ragged& q, const Keys&, const Plan* plan, const Mods&, const Observe&, Ragged columns);
  /// What observe makes of Rows::Last and Heads::Each over all keys of pages, in runs: a segment of `runs` for each query head, with a
  /// number for each key (offsets are an input). False, having done nothing, where that is no faster; null: never.
  bool (*observe_runs)(Queue&, const Ragged& q, const Keys&, const Mods&, bool logits, Ragged runs) = nullptr;
  void (*observe_rows)(Queue&, const Ragged& q, const Keys&, const Plan* plan, const Mods&, const RowStats&);

  /// Blocks of `block` rows of every segment of x (F32, BF16 or F16) → out (F32; with Concat and ConcatReversed also BF16):
  /// segment s has ⌈length / block⌉ rows. A short last block counts its true rows.
  void (*pool)(Queue&, const Ragged& x, PoolKind, int block, Ragged out);
  /// Smooths each segment of x ([rows] F32) along its rows: a window of `width` (odd) centred on the row, Mean (the sum over
  /// rows of the segment, divided by width) or Max. out is indexed as x.values.
  void (*smooth)(Queue&, const Ragged& x, PoolKind, int width, Tensor out);
  /// q, k: F32, BF16 or F16; h / g query heads share a key head. out.cells [Σ rows·cols]; masked cells are −∞ (0 after
  /// softmax; a row that sees nothing is all 0). out.rows, out.cols and the offsets of its cells are inputs.
  void (*proxy)(Queue&, const Ragged& q, const Ragged& k, const Proxy&, Grids out);
  void (*reduce)(Queue&, const Grids& in, const Reduce&, Grids out);
  /// What reduce makes of what proxy gives, without the scores being written. False, having done nothing, where that is no
  /// faster; null: never.
  bool (*proxy_reduce)(Queue&, const Ragged& q, const Ragged& k, const Proxy&, const Reduce&, Grids out) = nullptr;
  /// scores [rows] → index I32 [segments · capacity], count I32 [segments]: segment s at s · capacity.
  void (*select)(Queue&, const Ragged& scores, const Select&, int64_t capacity, Tensor index, Tensor count);

  /// Each number of out ([rows] or [rows, width], any strides; F32, BF16, F16, F64, I32, I64, U8) is the program's result for its
  /// row and channel, converted as a C cast does. With `over` (its values are not looked at), rows are those of its
  /// segments and the others stay as they were. out may be what the program loads, at its own index.
  void (*compute)(Queue&, const Numbers&, const Ragged* over, Tensor out);
  /// out[0] = 0, out[i + 1] = out[i] + lengths[i]: lengths I32 or I64 [n], out I64 [n + 1].
  void (*offsets)(Queue&, Tensor lengths, Tensor out);
  /// Block lists of single queries → one list a tile. index I32 [rows · capacity], count I32 [rows]: row r lists
  /// count[r] blocks, ascending, at r · capacity. Tile t takes rows first[t] … first[t + 1] − 1 (I64 [tiles + 1]; at most
  /// 128 each), and its list becomes row t of `out`: out.index and out.mask have room for out.rowptr[t + 1] − out.rowptr[t]
  /// entries at out.rowptr[t] (an input, multiples of `split`), out.count[t] of which are written. A block becomes `split`
  /// consecutive numbers block · split + i, all with mask −1 when every row lists it, else with the mask
  /// rowptr[t] / split + place of the block in the list, whose bits [rows of the tile, 1] say which rows do.
  void (*tile_blocks)(Queue&, Tensor index, Tensor count, int64_t capacity, Tensor first, int split, Plan out);
  /// The union of what `sets` names for each tile of q's segments, keys behind its last query left out, as the rows of an
  /// Interval plan of query heads: out.index and out.count are written, out.rowptr (an input) has room for every row's
  /// ranges, which are as few as can be. Of q and k only offsets and ends are looked at; queries are the last of their keys.
  void (*unite)(Queue&, const Ragged& q, const Ragged& k, const KeySets& sets, const Plan& out);
  /// pairs F64 [h] += the query–key pairs that each query head computes, over all sequences, under plan, causality, window
  /// and until. Of q and a panel only offsets and ends are looked at; of pages lengths and, for a window, positions.
  void (*count_pairs)(Queue&, const Plan&, const Ragged& q, const Keys&, const Mods&, Tensor pairs);

  /// out F32 [rows, d_v]; state (optional out) [segments, d, d_v], z (optional out) [segments, d].
  void (*recur)(Queue&, const RecurInputs&, const Recur&, Tensor out, Tensor state, Tensor z);
  /// d_out [rows, d_v], d_state [segments, d, d_v] (gradient of the final state; may be empty). Not with normalise.
  void (*recur_backward)(Queue&, const RecurInputs&, const Recur&, Tensor d_out, Tensor d_state, const RecurGrads&);
  /// x, a, out [rows, width]; along each segment: Linear out_t = a_t out_{t−1} + x_t; the others are running folds of x.
  void (*scan)(Queue&, const Ragged& x, Tensor a, ScanKind, Tensor out);
  /// out = x combined with y, element by element: x, out F32 [rows] or [rows, width]; y (may be empty) the same, or one
  /// number for each row. Whole tensors, segments or not; out may be x or y.
  void (*combine)(Queue&, Tensor x, Tensor y, Combine, float factor, Tensor out);
  /// x F32 [rows] or [rows, width] → out, of its shape and indexed as it; not x itself.
  void (*spread)(Queue&, const Ragged& x, const Spread&, Tensor out);

  /// Entries first[s] (I32 [segments]) … first[s] + rows of every segment take k, v (any plain type; rows [m, d], [m, d_v])
  /// and their positions (I32, indexed as k's rows); their bias is 0, their User columns are filled; block columns they
  /// touch are made anew from the keys as kept, of entries before max(length, first + rows). Pages must be there; length
  /// is not changed. Channel-axis layouts: whole groups only, except at the end of a segment.
  void (*page_write)(Queue&, const Pages&, const Ragged& k, const Ragged& v, Tensor positions, Tensor first);
  /// All entries of every segment → k, v (F32, BF16 or F16; segments have pages.length rows), positions I32 (laid out
  /// as k, which may have offsets and no values; each may be empty). `read` rotates plain keys; null leaves them plain.
  void (*page_read)(Queue&, const Pages&, const Read* read, const Ragged& k, const Ragged& v, Tensor positions);
  /// Entry index[s · capacity + i] of segment s moves to place i of `to`, for i < count[s], User columns and bias with
  /// it; block columns are made anew (of count[s] entries). index I32 [segments · capacity], count I32 [segments]; index
  /// ascends. `to` may be `from`: moves go downward. Equal types of a side move raw (Token axis); others go through f32.
  /// Lengths are not changed.
  void (*page_move)(Queue&, const Pages& from, const Pages& to, Tensor index, Tensor count, int64_t capacity);
  /// User column `column` (or kBiasColumn) of all entries ↔ values [keys(, width)], laid out as page_read's rows.
  void (*column_read)(Queue&, const Pages&, int column, Ragged values);
  void (*column_write)(Queue&, const Pages&, int column, const Ragged& values);
  // Page lists. These change table, layout, length and supply of the pages given, where they lie.
  /// The pages of `block` (U8 [n · (kPageHeader + page_bytes)]) join the supply, held by nobody.
  void (*page_supply)(Queue&, const PageSupply&, Tensor block);
  /// Every segment grows by as many entries as `rows` has rows in it (its values are not looked at): first[s] (I32
  /// [segments], out) is the length before, new pages have layout 0. A part-filled last page that others hold too is
  /// exchanged for a copy. A segment without new rows stays as it is.
  void (*page_grow)(Queue&, const Pages&, const Ragged& rows, Tensor first);
  /// Pages that hold entries before until[s] (I32 [segments]) and that others hold too are exchanged for copies.
  void (*page_own)(Queue&, const Pages&, Tensor until);
  /// Lengths become min(length, to[s]) (I32 [segments]); pages past them are let go, and those that nobody holds join the
  /// supply again.
  void (*page_shrink)(Queue&, const Pages&, Tensor to);
  /// Every page in the lists is held once more.
  void (*page_hold)(Queue&, const Pages&);
  /// Pages first[s] … last[s] − 1 (I32 [segments]; no further than entries reach) are moved to new pages of `layout`, block
  /// columns made anew; those that have it already stay unless `again`.
  void (*page_convert)(Queue&, const Pages&, Tensor first, Tensor last, int layout, bool again);
  /// Full pages first[s] … last[s] − 1 (I32 [segments]) of two layers with the same segments and positions, of layout 0 in
  /// both, become pages that both lists hold, of layouts `layout` and `layout` + 1 (PageType::pair, 1 and 2). A row is the
  /// direction between the two (spherical: `t` of the way from the first to the second; linear where the sine of their angle is
  /// less than 1e-7), its norms are theirs. Entries whose number in k_apart or v_apart (F32, laid out as page_read's rows) is
  /// not 0 stay as they are on that side; pages with more of those than kSpare on either side stay too.
  void (*page_pair)(Queue&, const Pages& one, const Pages& two, Tensor first, Tensor last, int layout,
                    const Ragged& k_apart, const Ragged& v_apart, float t);
  /// Upper bound of q·k over each block from KeyMin and KeyMax columns (Quest: Σ_c max(q_c lo_c, q_c hi_c)), or q·mean
  /// when low == high (a KeyMean column). Not scaled. q has one row a segment, or none (whose
  /// scores stay as they were); scores: Ragged, heads = h,
  /// ⌈length / block⌉ numbers.
  void (*page_score)(Queue&, const Ragged& q, const Pages&, int low, int high, Ragged scores);
  /// The rows of a plan of blocks (Plan, q_tile 1; a sequence without a new row has none): row r lists count[r] blocks,
  /// ascending, at rowptr[r] = r · capacity, chosen by the rules of select. index I32 [rows · capacity], count I32 [rows],
  /// rowptr I64 [rows + 1], each an output. q has one row a segment, or none.
  void (*page_choose)(Queue&, const Ragged& q, const Pages&, const PageChoice&, int64_t capacity, Tensor index,
                      Tensor count, Tensor rowptr);

  /// y [T, out] (+)= x [T, in] · w[out, in]^T + bias[out]. w: any Dtype, rows contiguous; x F32 or BF16; y F32; bias may be
  /// empty.
  void (*matmul)(Queue&, Tensor w, Tensor x, Tensor bias, bool accumulate, Tensor y);
  /// y (+)= x · w^T + bias of each (q, k and v), x (then F32) normed before where `norm` is not null: what is done to x is done
  /// once, and a decode step begins one parallel region instead of three. Matrices are weights: nothing that is under way on the
  /// queue writes them.
  void (*matmul_each)(Queue&, std::span<const Linear> each, Tensor x, const Norm* norm);
  /// y [T, out] = act(x · gate^T) · (x · up^T), elementwise; gate and up [out, in], weights; x as in matmul_each; y F32 or BF16,
  /// not x.
  void (*matmul_glu)(Queue&, Tensor gate, Tensor up, Tensor x, const Norm* norm, Activation, Tensor y);
  /// Rows ids (I32 [T]) of w [vocabulary, width] → y F32 [T, width], times scale.
  void (*embed)(Queue&, Tensor w, Tensor ids, float scale, Tensor y);
  /// y = x / √(mean x² + eps) · weight over the last dimension; x, y [T, width] (y may be x); an empty weight is 1.
  void (*rms_norm)(Queue&, Tensor x, Tensor weight, float eps, Tensor y);
  /// Each x to head-major, sequence s being rows first[s] … first[s + 1] (I64): its norm, then its rotation. Queries, keys
  /// and values of a layer are one call.
  void (*split_heads)(Queue&, Tensor first, float eps, std::span<const Heads> each);
  /// The way back: in head-major (F32) → y F32 or BF16 [T, heads · d_v].
  void (*merge_heads)(Queue&, const Ragged& in, Tensor first, Tensor y);
  /// What split_heads, page_grow and page_write make of one token of every sequence: q goes to head-major rows; k and v (their
  /// `out` is not looked at) become the last entries of their segments, at positions (I32 [segments]). Not for pages that
  /// are shared. Null: these three one after another.
  void (*append_heads)(Queue&, float eps, const Heads& q, const Heads& k, const Heads& v, const Pages&,
                       Tensor positions) = nullptr;
  /// y = act(gate) · up, elementwise; y may be gate.
  void (*glu)(Queue&, Tensor gate, Tensor up, Activation, Tensor y);
  /// y += x.
  void (*add)(Queue&, Tensor x, Tensor y);
  /// rows of w (any Dtype) → F32 of the same shape.
  void (*dequantise)(Queue&, Tensor w, Tensor y);
  /// w [rows, width] of a block type, as files hold it → to, of the same sizes and bytes, in the order in which matmul reads it
  /// fastest (to.interleaved). Null: this table reads matrices as files hold them, and takes no others.
  void (*interleave)(Queue&, Tensor w, Tensor to) = nullptr;
};

/// A queue of its own for this table: its memory, a new stream.
inline Queue queue_on(const Kernels& run) { return Queue(&run, *run.memory); }

/// Plain loops in f32 with f64 sums: slow, obvious, the oracle of every test.
const Kernels& reference_kernels();

/// The CPU tables that this build holds and this machine can run, best first; never empty on a supported machine.
std::vector<const Kernels*> cpu_kernels();
/// Whether two of them differ by the products of prompts alone, as avx2-int16 and avx2 do.
inline bool same_but_products(const Kernels& a, const Kernels& b) { return a.attend == b.attend; }

/// The table of the NVIDIA GPU that this process uses, or null: cuda_state() says why, or which GPU it is, in one sentence.
const Kernels* cuda_kernels();
std::string cuda_state();

/// The table of that name ("reference", "cuda" and those of add_kernels included), or an Error(NotFound) that lists what
/// there is.
const Kernels& kernels_named(const std::string& name);

/// Makes a table known to kernels_named for the rest of the process; it must stay. Not while others look names up.
void add_kernels(const Kernels& table);

}  // namespace heed
