#include "attention/reads.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// TidalDecode (Yang et al., 2024): one early layer finds each head's best keys, one later layer finds them anew, and all
// other layers read what the last of these found. The newest token is always read and counts in the budget, as in the
// authors' kernels (their evaluation code lets it compete). A fraction is of the entries held. A layer with a sliding window
// cannot choose what it does not see: the next one without does.
struct TidalDecode final : Mechanism {
  Budget budget;
  int selection, correction;

  static std::vector<ParamInfo> params() {
    using M = TidalDecode;
    return {
        budget_param(&M::budget, "1024", "entries read by each query head"),
        param(&M::selection, "selection", 2, 0, 1 << 20,
              "layer that selects, or the next without a sliding window; those before it are dense"),
        param(&M::correction, "correction", 13, 0, 1 << 20,
              "later layer that selects anew (13 suits 32 layers); none if the model has no such layer"),
    };
  }

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.same_entries = true;
    return n;
  }
  std::unique_ptr<State> open(const ModelInfo&) const override { return std::make_unique<HeldRead>(); }

  Read read(LayerView& at) const override {
    auto& held = static_cast<HeldRead&>(*at.state_held());
    const int first = seeing_all(at.model, selection);
    // A model too shallow to hand selections on selects in every layer and reads what it selected.
    const bool shallow = at.model.layers <= first + 1;
    if (!shallow && at.layer < first) return {};
    const bool selects = shallow || at.layer == first || at.layer == seeing_all(at.model, correction);
    if (selects) held.hold(at.queue, choice(at));
    return (selects && !shallow) || at.mods.window > 0 ? Read{} : held.read(at.queue);
  }

  Read choice(LayerView& at) const {
    const int64_t longest = at.store->longest();
    const Ragged logits = force(at.queue, last_logits(at, at.q), 0, 1);
    return best_blocks(
        at, Plan::Scope::QueryHead, logits, 1,
        [&](const Num& s) { return granted(budget, held_entries(at, s, at.q.heads)); },
        std::max<int64_t>(1, std::min(budget.entries(longest), longest)));
  }
};

}  // namespace

Entry tidal_decode() {
  Entry e = entry<TidalDecode>("tidal-decode",
                               "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
                               "Yang et al., 2024, arXiv 2410.05076", 2024, uint8_t(Role::Read));
  e.equation = "layer 2 and a correction layer: dense, and I_h = top-B_j of q·k_j; other layers: attend over I_h";
  e.needs = "all entries in all layers: goes with no policy that drops some";
  e.identity = "tidal-decode(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
