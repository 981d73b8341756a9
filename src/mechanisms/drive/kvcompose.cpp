#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// KVCompose (2025): behind the prompt the model reads it once more, and an entry is worth the most that any token of
// the second reading pays it, in the mean over the group, together with its mean over the layer's heads. All heads of
// a layer hold equally many entries, each its own: their sorted scores, averaged rank by rank, are one list for the
// layer, and layers share one pool of these. The first layer's list is the largest of all, rank by rank. Layers with
// a sliding window see nothing of the prompt then: they stay out of the pool and keep the newest.
struct KvCompose final : KeepPolicy {
  bool norm, structured;

  static std::vector<ParamInfo> params() {
    using M = KvCompose;
    return keep_params<M>("0.3", "prompt",
                          {
                              param(&M::norm, "norm", false, "what is paid times ‖v‖"),
                              param(&M::structured, "structured", true,
                                    "heads of a layer hold equally many; false: one pool of all heads"),
                          });
  }

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.all_layers = true;
    n.columns = {{"kvcompose.paid"}};
    return n;
  }

  void drive(Run& run) const override {
    for (int s = 0; s < run.sequences(); ++s) {
      const std::vector<int32_t> text(run.tokens(s).begin(), run.tokens(s).end());
      run.replay(s, text);
    }
    run.evict();
  }

  // A sequence without tokens in this reading adds 0.
  void observe(LayerView& at) const override {
    if (at.phase != Phase::Replay || at.model.window(at.layer) > 0) return;
    Observe how;
    how.rows = Observe::Rows::Max, how.heads = Observe::Heads::GroupMean;
    at.set_column("kvcompose.paid", combine(at.queue, at.column("kvcompose.paid"), at.observe(at.q, how), Combine::Add));
  }

  Ragged score(LayerView& at) const override {
    if (at.model.window(at.layer) > 0) return newest_seen(at);
    Ragged paid = at.column("kvcompose.paid");
    if (norm) paid = combine(at.queue, paid, row_norms(at.queue, stored_values(at)), Combine::Multiply);
    const Ragged mean = spread(at.queue, paid, {.of = Spread::Of::Mean, .over = Spread::Over::Heads});
    return combine(at.queue, paid, mean, Combine::Add);
  }

  Tensor allocate(const Allocation& a) const override {
    return without_windows(a, KeepPolicy::allocate(a), [&](std::span<const Ragged> scores, const Tensor& granted) {
      return structured ? composed(a, scores, granted) : divide(a, scores, granted, Pool::All);
    });
  }

  Tensor composed(const Allocation& a, std::span<const Ragged> scores, const Tensor& granted) const {
    Queue& queue = a.queue;
    const int64_t layers = int64_t(scores.size()), all = scores[0].segments(), g = scores[0].heads;
    std::vector<Ragged> lists;
    for (const Ragged& own : scores) {
      const Ragged after = spread(queue, own, {.of = Spread::Of::Rank});
      const Tensor rank = queue.scratch.take(Dtype::I32, {own.values.size[0]});
      compute(queue, own, length() - 1 - load(after.values, index()), rank);
      const Ragged sorted = sums_by(queue, own, rank, own);
      lists.push_back(members(queue, spread(queue, sorted, {.of = Spread::Of::Mean, .over = Spread::Over::Heads}), g, 0));
    }
    const Ragged& first = lists[0];
    for (const Ragged& other : lists) {
      const Num same = load(other.values, begin_of(other, segment()) + place());
      const Num there = place() < length_of(other, segment());
      compute(queue, first, pick(there, max(load(first.values, index()), same), load(first.values, index())), first.values);
    }
    const Tensor one = queue.scratch.take(Dtype::I32, {layers, all / g}),
                 out = queue.scratch.take(Dtype::I32, {layers, all});
    for (int64_t l = 0; l < layers; ++l) compute(queue, load(granted.select(0, l), index() * g), one.select(0, l));
    const Tensor won = divide(a, lists, one, Pool::All);
    for (int64_t l = 0; l < layers; ++l)
      compute(queue, max(1, load(won.select(0, l), floor_div(index(), g))), out.select(0, l));
    return out;
  }
};

}  // namespace

Entry kvcompose() {
  Entry e = entry<KvCompose>("kvcompose", "KVCompose: Efficient Structured KV Cache Compression with Composite Tokens",
                             "2025, arXiv 2509.05165", 2025, Role::Keep | Role::Drive);
  e.equation =
      "a_j = mean over the group of max over rows of the prompt read again of P_j; s = a + mean over heads of a; "
      "layers share one pool of c_r = mean over heads of the r-th largest s";
  e.needs = "the prompt read a second time";
  e.identity = "kvcompose(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
