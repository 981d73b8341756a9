#include "mechanisms/keep/noncausal.h"

#include <limits>

#include "attention/patterns.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

std::vector<ParamInfo> NonCausal::params() {
  using M = NonCausal;
  return keep_params<M>("1024", "prompt",
                        {
                            param(&M::tile, "tile", 256, 1, 1 << 16, "queries and keys of a tile"),
                            param(&M::kernel, "kernel", 3, 1, 63, "width of the smoothing over keys, odd"),
                            param(&M::scaled, "scaled", false, "logits times 1/√d"),
                        });
}

std::string NonCausal::check() const {
  return kernel % 2 ? "" : "kernel=" + std::to_string(kernel) + " is even: a smoothing width has a middle";
}

Needs NonCausal::needs(const ModelInfo&) const {
  Needs n;
  n.columns = {{.name = "noncausal", .fill = std::numeric_limits<float>::infinity()}};
  return n;
}

void NonCausal::observe(LayerView& at) const {
  if (at.phase == Phase::Replay || at.decoding()) return;
  const auto [first, last] = at.phase == Phase::Prompt ? outside() : std::pair<int64_t, int64_t>{0, 0};
  const std::vector<int64_t> tail(at.rows.size(), last);
  const Ragged paid = at.per_entry();
  if (longest_queries(at) > first + last) {
    Mods mods = {};
    mods.scale = scaled ? at.mods.scale : 1;
    Observe how;
    how.rows = Observe::Rows::Sum;
    const Plan own = own_tiles(at, tile, first, last);
    const Ragged rows = first + last ? without_last(at.queue, without_first(at.queue, at.q, first), tail) : at.q;
    at.run().observe(at.queue, rows, at.keys(), &own, mods, how, paid);
  } else {
    compute(at.queue, 0, paid.values);
  }
  // Entries of earlier chunks have their score; new ones have the fill.
  at.set_column("noncausal", combine(at.queue, at.column("noncausal"),
                                     combine(at.queue, paid, row_norms(at.queue, stored_values(at)), Combine::Multiply),
                                     Combine::Finite));
}

Ragged NonCausal::smoothed(LayerView& at, const Ragged& mass) const {
  Ragged out = mass;
  out.values = at.queue.scratch.take(Dtype::F32, {mass.values.size[0]});
  at.run().smooth(at.queue, mass, PoolKind::Mean, kernel, out.values);
  return out;
}

Ragged NonCausal::score(LayerView& at) const { return smoothed(at, at.column("noncausal")); }

Entry noncausal() {
  Entry e = entry<NonCausal>(
      "noncausal", "Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate Leverage Scores",
      "Chari et al., 2025, arXiv 2507.08143", 2025, uint8_t(Role::Keep));
  e.equation =
      "s_j = pool_3(mean over the group of Σ_i softmax_j(q_i·k_j) ‖v_j‖), i and j in one tile of 256, unmasked";
  e.needs = "queries of the prompt";
  e.identity = "noncausal(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
