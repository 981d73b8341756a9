#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// ThinK (Xu et al., 2024): channels of a KV head's keys that add least to the logits of the last queries are 0 from then on,
// in all keys but the latest, which stay whole as in the paper (kvpress prunes them too). Pages keep their width, so this
// shows what pruning does to a model and saves nothing. Keys are pruned once, when a prompt's part leaves them behind the
// window; what is generated stays whole.
struct Think final : KeepPolicy {
  double share;
  int window;

  static std::vector<ParamInfo> params() {
    using M = Think;
    return {
        param(&M::share, "share", 0.5, 0, 1, "share of the key channels that go"),
        param(&M::window, "window", 32, 1, 4096, "last queries, which vote and whose keys stay whole"),
    };
  }

  bool settle(LayerView& at) const override {
    const int64_t d = at.store->shape().d, gone = int64_t(share * double(d)), all = at.store->segments();
    if (at.decoding() || gone == 0) return true;
    Queue& queue = at.queue;
    Ragged q = at.last_queries(window);
    if (at.store->pages().plain_keys) q.values = at.plain_q.values;
    Ragged asked = mean_rows(queue, combine(queue, q, q, Combine::Multiply));
    asked.heads = at.model.group();
    asked = spread(queue, asked, {.of = Spread::Of::Mean, .over = Spread::Over::Heads});
    const Ragged keys = kept_keys(at), held = mean_rows(queue, combine(queue, keys, keys, Combine::Multiply));
    const Ragged energy = numbers(queue, all, d, keys.heads, all * d);
    compute(queue, energy,
            load(asked.values, segment() * asked.heads * d + place()) * load(held.values, segment() * d + place()),
            energy.values);
    Select best;
    best.k = d - gone;
    const Lists stay = chosen(queue, energy, best, d);
    compute(queue, keys, pick(stay.has(segment(), channel()), load(keys.values, index()), 0), keys.values);

    std::vector<int64_t> fresh;  // what this part has pushed out of the window
    for (int64_t s = 0; s < all; ++s)
      fresh.push_back(heads.holds(int(s % keys.heads), int(keys.heads)) ? at.rows[size_t(s / keys.heads)] : 0);
    const Tensor rows = queue.upload(fresh), first = queue.scratch.take(Dtype::I32, {all});
    const Num s = index(), m = length_of(keys, s), end = max(0, m - window),
              begin = min(end, max(0, m - window - load(rows, s)));
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

}  // namespace

Entry think() {
  Entry e = entry<Think>("think", "ThinK: Thinner Key Cache by Query-Driven Pruning",
                         "Xu et al., 2024, arXiv 2407.21018", 2024, uint8_t(Role::Keep));
  e.equation =
      "s_c = mean over the last queries and the group of q_c² · mean_j k_jc²; the lowest r d channels of old keys "
      "are 0";
  e.needs = "nothing";
  e.identity = "think(share=0)";
  e.verified = {"identity", "formula", "model"};
  return e;
}

}  // namespace heed::mechanisms
