#include "attention/reads.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// TokenSelect (Wu et al., 2024): all heads of a layer vote for the tokens between the first and the latest ones, and read
// what wins as one text without gaps, at consecutive positions. Votes compare the query with keys that all stand at one
// distance, the width of the latest ones. As released a vote is a softmax of logits without 1/√d. The selection cache,
// which keeps a choice while queries stay alike, is off there and left out here; prompts are read densely.
struct TokenSelect final : Mechanism {
  Budget budget;
  int sinks, local, first_dense;

  static std::vector<ParamInfo> params() {
    using M = TokenSelect;
    return {
        budget_param(&M::budget, "2048", "tokens chosen by all heads of a layer; first and latest ones come on top"),
        param(&M::sinks, "sinks", 128, 0, 1 << 20, "first tokens that are always read"),
        param(&M::local, "local", 512, 1, 1 << 30, "latest tokens that are always read"),
        dense_layers_param(&M::first_dense, 0),
    };
  }
  std::string check() const override { return whole_groups(heads); }

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.plain_keys = n.same_entries = true;
    return n;
  }

  Read read(LayerView& at) const override {
    if (reads_all(at, first_dense)) return {};
    Queue& queue = at.queue;
    at.read.places = entry_places(at, query_position(at) - local);
    const Ragged logits = last_logits(at, at.q);
    const std::vector<int64_t> latest(at.rows.size(), local);
    const Ragged middle = without_last(queue, without_first(queue, logits, sinks), latest);
    const Ragged votes = softmax(queue, combine(queue, middle, Combine::Multiply, 1 / at.scale()));
    const Ragged sum = spread(queue, votes, {.of = Spread::Of::Sum, .over = Spread::Over::Heads});
    Ragged all = members(queue, logits, logits.heads, 0);
    all.values = sum.values;
    std::vector<int64_t> counts;
    for (int64_t length : at.prompt) counts.push_back(int64_t(sinks) + local + budget.entries(length));
    Read read = best_entries(at, Plan::Scope::Layer, force(queue, all, sinks, local), counts);
    read.places = gathered_places(at, read.plan);
    return read;
  }
};

}  // namespace

Entry token_select() {
  Entry e = entry<TokenSelect>(
      "token-select",
      "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV "
      "Cache Selection",
      "Wu et al., 2024, arXiv 2411.02886", 2024, uint8_t(Role::Read));
  e.equation =
      "read {0 … s − 1} ∪ top K of Σ over heads of softmax_j(R(w) q · k_j) ∪ the last w; the i-th of them is "
      "rotated at i";
  e.needs = "keys kept before rotation; all entries in all layers: goes with no policy that drops some";
  e.identity = "token-select(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
