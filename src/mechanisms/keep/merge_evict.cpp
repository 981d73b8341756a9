#include "attention/maps.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Merging on eviction, as in kvpress (after ToMe and D2O): the value of an entry that goes is blended into that of
// the entry which stays and whose key is most alike; keys stay as they are. A further cut starts from the blended
// values. No logit bias says that an entry stands for more than itself.
struct MergeEvict final : KeepWrapper {
  double least, share;

  static std::vector<ParamInfo> params() {
    using M = MergeEvict;
    return {
        param(&M::least, "least", 0, -1, 1, "the least cosine of keys at which values are blended"),
        param(&M::share, "share", 1, 0, 1, "share of the entries that go, the most alike, whose values are blended"),
    };
  }

  void fold(LayerView& at, const Lists& kept) const override {
    inner->fold(at, kept);
    Queue& queue = at.queue;
    const int64_t d = at.store->shape().d, d_v = at.store->shape().d_v;
    const auto alone = [](Ragged x) {  // KV heads may hold unequal numbers of entries
      x.heads = 1;
      return x;
    };
    const Ragged goes = alone(at.per_entry()), keys = alone(unit_rows(queue, stored_keys(at)));
    Ragged values = alone(stored_values(at));
    compute(queue, goes, 1 - kept.has(segment(), place()), goes.values);
    const Lists gone = chosen(queue, goes, flagged(), kept.capacity);
    const Ragged rows = numbers(queue, goes.segments(), load(gone.count, index()), 1, goes.bound);
    const Num own = begin_of(goes, segment()) + load(gone.index, segment() * gone.capacity + place());
    const Ragged k = picked_rows(queue, keys, own, rows);

    Plan all;
    all.causal = false;
    Mods cosine;
    cosine.scale = 1 / float(d);
    cosine.key_bias = compute(queue, Dtype::F32, {goes.bound}, load(goes.values, index()) * -1e30);
    RowStats stats;
    const Tensor nearest = stats.argmax = queue.scratch.take(Dtype::I32, {rows.bound});
    queue.run->observe_rows(queue, k, {.panel = &keys, .pages = nullptr, .read = nullptr}, &all, cosine, stats);
    const Num other = begin_of(goes, segment()) + load(nearest, index());
    const Ragged alike = row_dots(queue, k, picked_rows(queue, keys, other, rows), 1 / float(d)),
                 norms = row_norms(queue, values);

    // Those alike enough and at or above the (1 − share) quantile, interpolated linearly, of all that go; all that are alike
    // where they are fewer (kvpress then blends none: its quantile is no number).
    Select enough;
    enough.by = Select::By::Threshold, enough.p = float(least);
    const Lists near = chosen(queue, alike, enough, gone.capacity);
    const Num count = load(gone.count, index());
    Select best;
    best.count = compute(queue, Dtype::I32, {goes.segments()},
                         min(load(near.count, index()), count + floor((share - 1) * max(0, count - 1))));
    choose(queue, alike, best, near);
    // What is blended in, and how much of it there is, side by side.
    const Num size = load(norms.values, own);
    compute(queue, rows,
            pick(near.has(segment(), place()),
                 max(0, load(alike.values, index())) * size / (size + load(norms.values, other) + 1e-6), 0),
            rows.values);
    const int64_t wide = d_v + 1;
    Ragged more = rows;
    more.values = queue.scratch.take(Dtype::F32, {rows.bound, wide});
    const Num weight = load(rows.values, floor_div(index(), wide));
    compute(queue, more, pick(channel() < d_v, weight * load(values.values, own * d_v + min(channel(), d_v - 1)), weight),
            more.values);
    const Ragged sums = sums_by(queue, more, nearest, goes);
    const Num to = floor_div(index(), d_v) * wide;
    compute(queue, values,
            (load(values.values, index()) + load(sums.values, to + channel())) / (1 + load(sums.values, to + d_v)),
            values.values);
    values.heads = at.store->shape().kv_heads;
    set_values(at, values);
  }
};

}  // namespace

Entry merge_evict() {
  Entry e = entry<MergeEvict>("merge-evict", "Merging on eviction, as in kvpress",
                              "kvpress 0.5, after Bolya et al., 2022", 2022, uint8_t(Role::Keep));
  e.equation =
      "v_t ← (v_t + Σ u_i v_i) / (1 + Σ u_i) over entries i that go and are most like t; u_i = cos⁺ ‖v_i‖ / (‖v_i‖ "
      "+ ‖v_t‖)";
  e.needs = "a keep policy inside";
  e.identity = "merge-evict(snapkv(budget=1.0))";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
