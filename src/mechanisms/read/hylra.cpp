#include "attention/reads.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// HyLRA (Ai et al., 2026): full layers are dense and name their top entries, and the layers up to the next full one read
// these. Which layers are full comes from a profile of the model (how much a layer suffers from sparsity, how much top
// sets of layers overlap); it is given here. Entries are ranked by what the group pays them on average, and the newest is
// always among them. A layer with a sliding window cannot name what it does not see, and has no part in this: the first
// without one stands for layer 0, and others have no substitute, since where most layers have a window a list made for
// layers without would make all that is left full.
struct HyLra final : Mechanism {
  Budget budget;
  Range full;

  static std::vector<ParamInfo> params() {
    using M = HyLra;
    return {
        budget_param(&M::budget, "2048",
                     "entries that the other layers read, for each KV head; a fraction is of the prompt"),
        param(&M::full, "full", "range", "[0,4,8,12,16,20,24,28]", "0-3, 2-, [0,4-7], last",
              "layers that are full, among those without a sliding window; the first of these always is"),
    };
  }

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.same_entries = true;
    return n;
  }
  std::unique_ptr<State> open(const ModelInfo&) const override { return std::make_unique<HeldRead>(); }

  Read read(LayerView& at) const override {
    if (at.mods.window > 0) return {};  // a sliding window already bounds what is read
    auto& held = static_cast<HeldRead&>(*at.state_held());
    const int first = seeing_all(at.model, 0);
    // One layer that sees all has none to hand its choice on to, and reads it itself.
    const bool alone = seeing_all(at.model, first + 1) == at.model.layers,
               names = at.layer == first || full.holds(at.layer, at.model.layers);
    if (names) held.hold(at.queue, choice(at));
    return names && !alone ? Read{} : held.read(at.queue);
  }

  Read choice(LayerView& at) const {
    const Ragged paid = force(at.queue, over_group(at, last_weights(at), Spread::Of::Mean), 0, 1);
    std::vector<int64_t> counts;
    for (int64_t length : at.prompt) counts.push_back(budget.entries(length));
    return best_entries(at, Plan::Scope::KvHead, paid, counts);
  }
};

}  // namespace

Entry hylra() {
  Entry e = entry<HyLra>("hylra", "HyLRA: Hybrid Layer Reuse Attention for Efficient Long-Context Inference",
                         "Ai et al., 2026, arXiv 2602.00777", 2026, uint8_t(Role::Read));
  e.equation =
      "full layers: dense, S = top-k_j of mean over the group of P_j; layers up to the next full one: attend over S";
  e.needs = "all entries in all layers: goes with no policy that drops some";
  e.identity = "hylra(budget=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
