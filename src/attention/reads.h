// From scores of entries to what a decoded token reads.
#pragma once
#include <functional>

#include "attention/mechanism.h"
#include "attention/params.h"

namespace heed {

/// Reads the best entries of every segment with a new query, counts[sequence] of them: scores has a segment for each query
/// head, KV head or sequence, as the scope says.
Read best_entries(LayerView&, Plan::Scope, const Ragged& scores, std::span<const int64_t> counts);

/// The parameter `dense` of a reader: how many of the first layers it leaves alone (reads_all).
template <class M>
ParamInfo dense_layers_param(int M::* field, int fallback) {
  return param(field, "dense", fallback, 0, 1 << 20, "first layers that read everything (in a model that has more)");
}

/// Whether a reader leaves this layer alone: one of the first `dense` layers of a model that has more, or one whose sliding
/// window already bounds what is read.
bool reads_all(const LayerView&, int dense);

/// The first layer from this one on that has no sliding window, for readers whose layers choose for others: what a window
/// hides cannot be chosen. The number of layers if there is none.
int seeing_all(const ModelInfo&, int layer);

/// For each query head, its row of q times what a block column holds of every block of `block` entries (low == high) or the
/// most that q · k can be in it (KeyMin and KeyMax): ⌈length / block⌉ numbers, not scaled.
Ragged block_scores(LayerView&, const Ragged& q, const std::string& low, const std::string& high, int block);

/// One number for each KV head from those of its query heads.
Ragged over_group(LayerView&, const Ragged& scores, Spread::Of of);

/// Reads the blocks of `block` entries (a divisor of 64) that `how` chooses in every segment with a new query; its counts,
/// if it has some, are those of rows. No more than `capacity`.
Read chosen_blocks(LayerView&, Plan::Scope, const Ragged& scores, const Select& how, int block, int64_t capacity);

/// Reads the best blocks of `block` entries (a divisor of 64) of every segment with a new query: as many as `count` says, a
/// formula of the segment's number; no more than `capacity`.
Read best_blocks(LayerView&, Plan::Scope, const Ragged& scores, int block,
                 const std::function<Num(const Num& segment)>& count, int64_t capacity);

/// Reads the best blocks by the store's columns `low` and `high` (Kernels::page_choose): `how` says how they are scored and what
/// comes first, the budget what is granted of the entries held.
Read best_pages(LayerView&, const std::string& low, const std::string& high, const Budget&, PageChoice how);

/// Reads the entries that `named`, a formula of segment() and place() of `entries` (a segment for each query head, KV head
/// or sequence, as the scope says), is not 0 for.
Read named_entries(LayerView&, Plan::Scope, const Ragged& entries, const Num& named);

/// Entries that a segment of `heads` to a sequence holds: a formula.
Num held_entries(LayerView&, const Num& segment, int64_t heads);
/// How many of them were decoded, where nothing is dropped (Needs::same_entries); the new one at least.
Num decoded_entries(LayerView&, const Num& segment, int64_t heads);

/// The output of a reader whose logits get a bias that depends on the query, which pages do not know: what the new
/// tokens' query heads among `heads` make of all entries, bias F32 [entries, group] beside them (−∞: not read), over
/// keys as stored_keys() gives them. Other heads keep at.out; at.lse follows. For edit(), behind a read() that has
/// given those heads a gain of 0 (left_to_edit).
Tensor biased_output(LayerView&, const Range& heads, const Ragged& keys, const Tensor& bias);
/// In read(): heads among `heads` attend to nothing, since edit() makes their output.
void left_to_edit(LayerView&, const Range& heads);

// Where plain keys are read (Needs::plain_keys), whatever their true positions are.

/// A message when a mechanism that moves what all heads of a group read is given some heads only.
std::string whole_groups(const Range& heads);

/// The position of the new token of the sequence that segment() of a ragged of entries belongs to: a formula.
Num query_position(LayerView&);
/// A place for each entry of the store: a formula of segment() and place().
Ragged entry_places(LayerView&, const Num& place);
/// Places for what a read names, the new token last: they follow one another without gaps and end at the token's own
/// position. The heads of a group read the same.
Ragged gathered_places(LayerView&, const Plan& read);

/// A read of entries that later layers of a step take over. It stays in its place, so that steps can be recorded.
struct HeldRead : State {
  void hold(Queue&, const Read&);
  Read read(Queue&) const;
  std::unique_ptr<State> clone() const override { return std::make_unique<HeldRead>(); }  // every step holds one anew

 private:
  std::vector<Buffer> lists_;  // the last one; those before it may be what a recording knows
  int64_t rows_ = 0, capacity_ = 0;
  Plan::Scope scope_ = Plan::Scope::QueryHead;
};

}  // namespace heed
