#include <memory>

#include "attention/inputs.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

/// Zeroes channels of a KV head's keys in all entries but the first `sinks` and the latest `window`. Pages keep their
/// width, so this shows what pruning does to a model and saves nothing. Keys are pruned once, when a prompt's part
/// leaves them behind the window; what is generated stays whole.
struct PrunedChannels : KeepPolicy {
  int sinks = 0, window;

  /// Whether channel channel() of segment segment() stays: a formula. Null when all do.
  virtual std::unique_ptr<Num> stays(LayerView&, const Ragged& keys) const = 0;

  bool settle(LayerView& at) const override {
    if (at.decoding()) return true;
    Queue& queue = at.queue;
    const int64_t all = at.store->segments();
    const Ragged keys = kept_keys(at);
    const auto stay = stays(at, keys);
    if (!stay) return true;
    compute(queue, keys, pick(*stay, load(keys.values, index()), 0), keys.values);

    std::vector<int64_t> fresh;  // what this part has pushed out of the window
    for (int64_t s = 0; s < all; ++s)
      fresh.push_back(heads.holds(int(s % keys.heads), int(keys.heads)) ? at.rows[size_t(s / keys.heads)] : 0);
    const Tensor rows = queue.upload(fresh), first = queue.scratch.take(Dtype::I32, {all});
    const Num s = index(), m = length_of(keys, s), end = max(0, m - window),
              begin = min(end, max(sinks, m - window - load(rows, s)));
    compute(queue, begin, first);
    Ragged pruned = keys, values = stored_values(at);
    pruned.offsets = compute(queue, Dtype::I64, {all + 1},
                             pick(s < all, begin_of(keys, s) + begin, load(keys.offsets, all)));
    pruned.ends = compute(queue, Dtype::I64, {all}, begin_of(keys, s) + pick(load(rows, s) > 0, end, begin));
    values.offsets = pruned.offsets, values.ends = pruned.ends;
    const Ragged positions = stored_positions(at);
    at.store->rewrite(queue, first, pruned, values,
                      compute(queue, Dtype::I32, {positions.bound}, load(positions.values, index())));
    return true;
  }
};

// ThinK (Xu et al., 2024): channels that add least to the logits of the last queries go, in all keys but the latest,
// which stay whole as in the paper (kvpress prunes them too).
struct Think final : PrunedChannels {
  double share;

  static std::vector<ParamInfo> params() {
    using M = Think;
    return {
        param(&M::share, "share", 0.5, 0, 1, "share of the key channels that go"),
        param<M, int>(&M::window, "window", 32, 1, 4096, "last queries, which vote and whose keys stay whole"),
    };
  }

  std::unique_ptr<Num> stays(LayerView& at, const Ragged& keys) const override {
    const int64_t d = at.store->shape().d, gone = int64_t(share * double(d)), all = at.store->segments();
    if (gone == 0) return nullptr;
    Queue& queue = at.queue;
    Ragged q = at.last_queries(window);
    if (at.store->pages().plain_keys) q.values = at.plain_q.values;
    Ragged asked = mean_rows(queue, combine(queue, q, q, Combine::Multiply));
    asked.heads = at.model.group();
    asked = spread(queue, asked, {.of = Spread::Of::Mean, .over = Spread::Over::Heads});
    const Ragged held = mean_rows(queue, combine(queue, keys, keys, Combine::Multiply));
    const Ragged energy = numbers(queue, all, d, keys.heads, all * d);
    compute(queue, energy,
            load(asked.values, segment() * asked.heads * d + place()) * load(held.values, segment() * d + place()),
            energy.values);
    Select best;
    best.k = d - gone;
    return std::make_unique<Num>(chosen(queue, energy, best, d).has(segment(), channel()));
  }
};

// LeanK (MInference's repository): which channels of a KV head's keys stay was trained; the first keys and the latest
// are whole.
struct LeanK final : PrunedChannels {
  static std::vector<ParamInfo> params() {
    using M = LeanK;
    return {
        param<M, int>(&M::sinks, "sinks", 128, 0, 1 << 20, "first keys, which stay whole"),
        param<M, int>(&M::window, "recent", 768, 0, 1 << 20, "latest keys, which stay whole"),
    };
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.inputs = {"channels [g, d]: 1 for a channel that stays, 0 for one that goes"};
    return n;
  }

  std::unique_ptr<Num> stays(LayerView& at, const Ragged& keys) const override {
    const int64_t g = keys.heads, d = at.store->shape().d;
    const Tensor mask = given(at, "channels", "[g, d]", {g * d});
    return std::make_unique<Num>(load(mask, mod(segment(), g) * d + channel()));
  }
};

}  // namespace

Entry think() {
  Entry e = entry<Think>("think", "ThinK: Thinner Key Cache by Query-Driven Pruning",
                         "Xu et al., 2024, arXiv 2407.21018", 2024, uint8_t(Role::Keep));
  e.equation =
      "s_c = mean over the last queries and the group of q_c² · mean_j k_jc²; the lowest r d channels of old keys "
      "are 0";
  e.needs = "nothing";
  e.identity = "think(share=0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

Entry leank() {
  Entry e = entry<LeanK>("leank", "LeanK: Learnable K Cache Channel Pruning for Efficient Decoding",
                         "Zhang et al., 2025, arXiv 2508.02215", 2025, uint8_t(Role::Keep));
  e.equation = "channels outside the mask are 0 in all keys but the first s and the last r";
  e.needs = "a trained mask: --input channels=…";
  e.no_identity = "the mask is an input; with recent of all keys it is dense";
  e.verified = {"formula", "bench"};
  return e;
}

}  // namespace heed::mechanisms
