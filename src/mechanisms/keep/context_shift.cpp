#include <algorithm>

#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Context shift (llama.cpp): StreamingLLM, half a cache at a time. A full cache keeps its first `sinks` entries, drops the
// older half of the others, and goes on at the places that became free; keys are read at their place in the cache. As in
// llama.cpp no query sees more than the budget; the cut is made behind the token that fills the cache, not before the
// next one. A prompt that is longer loses as many halves behind it as it would have lost token by token.
struct ContextShift final : KeepPolicy {
  int sinks;

  static std::vector<ParamInfo> params() {
    using M = ContextShift;
    return {
        budget_param(&M::budget, "1024", "entries of a full cache (n_ctx)"),
        param(&M::sinks, "sinks", 0, 0, 1 << 20, "first entries that always stay (n_keep)"),
    };
  }
  const When& timing() const override {
    static const When each{When::At::Every, 1};
    return each;
  }
  std::string check() const override { return too_small(budget, sinks + 2, "sinks + 2"); }

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.plain_keys = true;
    n.positions = Read::Positions::Cache;
    return n;
  }

  Ragged score(LayerView& at) const override { return by_age(at, sinks); }

  int64_t entries(const Budget& kept, const ModelInfo&, int, int64_t length) const override {
    return kept.entries(length) - 1;
  }

  Tensor allocate(const Allocation& a) const override {
    const int64_t layers = int64_t(a.scores.size()), all = a.scores[0].segments(), g = a.model.g;
    std::vector<int64_t> full;
    for (int64_t length : a.prompt) full.push_back(a.budget.entries(length));
    const Tensor out = a.queue.scratch.take(Dtype::I32, {layers, all});
    for (int64_t l = 0; l < layers; ++l) {
      const Num held = length_of(a.scores[size_t(l)], index()), most = of_sequence(a.queue, full, index(), g),
                half = max(1, floor_div(most - sinks, 2));
      compute(a.queue, pick(held < most, held, max(0, held - half * (floor_div(held - most, half) + 1))), out.select(0, l));
    }
    return out;
  }
};

}  // namespace

Entry context_shift() {
  Entry e = entry<ContextShift>("context-shift", "Context shift", "ggml-org, llama.cpp", 2023, uint8_t(Role::Keep));
  e.equation = "at n = B entries keep {0 … s − 1} and drop the next ⌊(B − s) / 2⌋; key i of the cache is rotated at i";
  e.needs = "keys kept before rotation";
  e.identity = "context-shift(budget=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
