#include <limits>

#include "attention/patterns.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Non-causal attention (Chari et al., 2025, a part of Compactor): inside tiles of a prompt every query looks at every key,
// without 1/√d as in kvpress (scaled: the paper's). Its layer-wide z-score changes no ranking inside a layer and is left
// out; padded rows of a short last tile, which count there, are not made. Entries decoded later have no score and stay.
struct NonCausal final : KeepPolicy {
  int tile, kernel;
  bool scaled;

  static std::vector<ParamInfo> params() {
    using M = NonCausal;
    return keep_params<M>("1024", "prompt",
                          {
                              param(&M::tile, "tile", 256, 1, 1 << 16, "queries and keys of a tile"),
                              param(&M::kernel, "kernel", 3, 1, 63, "width of the smoothing over keys, odd"),
                              param(&M::scaled, "scaled", false, "logits times 1/√d"),
                          });
  }
  std::string check() const override {
    return kernel % 2 ? "" : "kernel=" + std::to_string(kernel) + " is even: a smoothing width has a middle";
  }

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.columns = {{.name = "noncausal", .fill = std::numeric_limits<float>::infinity()}};
    return n;
  }

  void observe(LayerView& at) const override {
    if (at.phase == Phase::Replay || at.decoding()) return;
    Mods mods;
    mods.scale = scaled ? at.mods.scale : 1;
    Observe how;
    how.rows = Observe::Rows::Sum;
    const Plan own = own_tiles(at, tile);
    const Ragged paid = at.per_entry();
    at.run().observe(at.queue, at.q, at.keys(), &own, mods, how, paid);
    // Entries of earlier chunks have their score; new ones have the fill.
    at.set_column("noncausal", combine(at.queue, at.column("noncausal"),
                                       combine(at.queue, paid, row_norms(at.queue, stored_values(at)), Combine::Multiply),
                                       Combine::Finite));
  }

  Ragged score(LayerView& at) const override {
    const Ragged mass = at.column("noncausal");
    Ragged smoothed = mass;
    smoothed.values = at.queue.scratch.take(Dtype::F32, {mass.bound});
    at.run().smooth(at.queue, mass, PoolKind::Mean, kernel, smoothed.values);
    return smoothed;
  }
};

}  // namespace

Entry noncausal() {
  Entry e = entry<NonCausal>(
      "noncausal", "Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate Leverage Scores",
      "Chari et al., 2025, arXiv 2507.08143", 2025, uint8_t(Role::Keep));
  e.equation =
      "s_j = pool_3(mean over the group of Σ_i softmax_j(q_i·k_j) ‖v_j‖), i and j in one tile of 256, unmasked";
  e.needs = "queries of the prompt";
  e.identity = "noncausal(budget=1.0)";
  e.verified = {"identity", "formula", "model"};
  return e;
}

}  // namespace heed::mechanisms
