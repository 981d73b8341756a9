#include <algorithm>

#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// RazorAttention (Tang et al., 2024): heads that do not retrieve hold the first entries, the latest ones, and in place of
// all others one entry: their mean key and value, with the logarithm of how many they were as its logit bias. Which heads
// those are is given: heads= names KV heads (the paper cuts all but those that `heed heads` ranks first; a group is whole
// when one of its heads retrieves). The entry takes the place of the last one that goes. A further cut adds to it: an entry
// that stands for N counts N times.
struct RazorAttention final : KeepPolicy {
  int sinks;
  int64_t recent;
  double share;
  bool compensation;

  static std::vector<ParamInfo> params() {
    using M = RazorAttention;
    return {
        param(&M::when, "when", "when", "prompt", "prompt, chunk, every(n)", "when the policy cuts"),
        param(&M::sinks, "sinks", 4, 0, 1 << 20, "first entries that stay"),
        param(&M::recent, "recent", 4000, 1, 1000000000, "latest entries that stay, at least"),
        param(&M::share, "share", 0.2, 0, 1, "share of the prompt that stays as latest entries, at least"),
        param(&M::compensation, "compensation", true, "one entry for all that went"),
    };
  }

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.bias = compensation;
    return n;
  }

  Ragged score(LayerView& at) const override { return by_age(at, sinks); }

  // What a sliding window hides is no part of what went.
  int64_t entries(const Budget&, const ModelInfo& m, int layer, int64_t length) const override {
    if (m.window(layer) > 0) return 1 << 30;
    return sinks + compensation + std::max(recent, int64_t(share * double(length)));
  }

  void fold(LayerView& at, const Lists& kept) const override {
    if (!compensation) return;
    Queue& queue = at.queue;
    const int64_t all = at.store->segments();
    auto carrier = [&](const Num& s) { return load(kept.index, s * kept.capacity + sinks); };
    auto cut = [&](const Num& s) {
      return load(kept.count, s) < load(at.store->pages().length, s) && load(kept.count, s) > sinks;
    };
    const Num gone = cut(segment()) && place() >= sinks && place() <= carrier(segment());
    const Ragged bias = at.bias(), counts = at.per_entry();
    compute(queue, counts, pick(gone, exp(load(bias.values, index())), 0), counts.values);
    const Ragged total = spread(queue, counts, {.of = Spread::Of::Sum});
    auto of_segment = [&](const Num& s) { return load(total.values, begin_of(total, s)); };
    auto mean = [&](const Ragged& rows) {
      Ragged out = mean_rows(queue, combine(queue, rows, counts, Combine::Multiply));
      const Tensor factor = compute(queue, Dtype::F32, {all}, length_of(counts, index()) / of_segment(index()));
      queue.run->combine(queue, out.values, factor, Combine::Multiply, 1, out.values);
      out.ends = compute(queue, Dtype::I64, {all}, begin_of(out, index()) + cut(index()));
      return out;
    };
    const Ragged k = mean(kept_keys(at)), v = mean(stored_values(at)), positions = stored_positions(at);
    const Tensor first = compute(queue, Dtype::I32, {all}, pick(cut(index()), carrier(index()), 0));
    at.store->rewrite(
        queue, first, k, v,
        compute(queue, Dtype::I32, {all}, load(positions.values, begin_of(positions, index()) + load(first, index()))));
    const Num own = cut(segment()) && place() == carrier(segment());
    compute(queue, bias, pick(own, log(of_segment(segment())), load(bias.values, index())), bias.values);
    at.set_bias(bias);
  }
};

}  // namespace

Entry razor_attention() {
  Entry e = entry<RazorAttention>("razor-attention",
                                  "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
                                  "Tang et al., 2024, arXiv 2407.15891", 2024, uint8_t(Role::Keep));
  e.equation =
      "heads that do not retrieve keep {0 … s − 1}, the last r entries, and one entry for the N others: mean key, "
      "mean value, logit bias log N";
  e.needs = "a logit bias beside each entry; which heads retrieve (heads=, a profile): `heed heads` finds them";
  e.identity = "razor-attention(recent=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
