#include <algorithm>

#include "attention/reads.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// OmniKV (Hao et al., 2025): a few filter layers find the prompt tokens that any head looks at; later layers read the last
// filter's choice and all generated tokens. Layers before the first filter, the filters themselves and the `wait` layers
// behind each are dense. A filter with a sliding window cannot choose what it does not see: the next layer without does.
struct OmniKV final : Mechanism {
  Budget budget;
  Range filters;
  int wait;

  static std::vector<ParamInfo> params() {
    using M = OmniKV;
    return {
        budget_param(&M::budget, "0.067", "prompt tokens read by all heads of a layer; a fraction is of the prompt"),
        param(&M::filters, "filters", "range", "[2,8,18]", "0-3, 2-, [0,4-7], last",
              "layers that choose, or the next without a sliding window (2, 8, 18 suit 32 layers); a model without "
              "any of them chooses in every layer"),
        param(&M::wait, "wait", 1, 0, 1 << 20, "dense layers behind a filter"),
    };
  }

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.same_entries = true;
    return n;
  }
  std::unique_ptr<State> open(const ModelInfo&) const override { return std::make_unique<HeldRead>(); }

  /// The last layer at or before this one that chooses, −1 for none.
  int filter_of(const ModelInfo& model, int layer) const {
    int last = -1;
    for (int l = 0; l <= layer; ++l)
      if (const int chooses = seeing_all(model, l); filters.holds(l, model.layers) && chooses <= layer) last = chooses;
    return last;
  }

  Read read(LayerView& at) const override {
    if (at.mods.window > 0) return {};  // a sliding window already bounds what is read
    auto& held = static_cast<HeldRead&>(*at.state_held());
    const int filter = filter_of(at.model, at.layer);
    const bool shallow = filter_of(at.model, at.model.layers - 1) < 0;
    if (filter == at.layer || shallow) held.hold(at.queue, choice(at));
    return shallow || (filter >= 0 && at.layer > filter + wait) ? held.read(at.queue) : Read{};
  }

  /// Top prompt tokens by the largest weight any head pays, and what was generated since.
  Read choice(LayerView& at) const {
    const Ragged all = spread(at.queue, last_weights(at), {.of = Spread::Of::Max, .over = Spread::Over::Heads});
    const Ragged paid = members(at.queue, all, all.heads, 0);
    const Num behind = place() >= length() - decoded_entries(at, segment(), 1);
    compute(at.queue, paid, pick(behind, kInfinity, load(paid.values, index())), paid.values);
    int64_t most = 0;
    std::vector<int64_t> granted;
    for (int64_t length : at.prompt) {
      granted.push_back(budget.entries(length));
      most = std::max(most, granted.back() + std::max<int64_t>(1, at.store->longest() - length));
    }
    return best_blocks(
        at, Plan::Scope::Layer, paid, 1,
        [&](const Num& s) { return of_sequence(at.queue, granted, s, 1) + decoded_entries(at, s, 1); },
        std::clamp<int64_t>(most, 1, std::max<int64_t>(1, at.store->longest())));
  }
};

}  // namespace

Entry omnikv() {
  Entry e = entry<OmniKV>("omnikv", "OmniKV: Dynamic Context Selection for Efficient Long-Context LLMs",
                          "Hao et al., 2025, ICLR", 2025, uint8_t(Role::Read));
  e.equation =
      "filter layers: dense, and I = top-k_j of max over heads of P_j; later layers: attend over I and all "
      "generated tokens";
  e.needs = "all entries in all layers: goes with no policy that drops some";
  e.identity = "omnikv(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
