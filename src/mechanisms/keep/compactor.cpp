#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"
#include "mechanisms/keep/leverage.h"
#include "mechanisms/keep/noncausal.h"

namespace heed::mechanisms {

namespace {

// Compactor (Chari et al., 2025): keys that stand out, and keys that draw attention inside their tile, measured in
// deviations over the layer; the first and latest entries stay and have no part in either. Entries decoded later have no
// score and stay.
struct Compactor final : NonCausal {
  int sinks, recent, sketch;
  double ridge, blend;
  int64_t seed;

  static std::vector<ParamInfo> params() {
    using M = Compactor;
    std::vector<ParamInfo> all = NonCausal::params();
    for (ParamInfo p :
         {param(&M::sinks, "sinks", 8, 0, 1 << 20, "first entries that always stay"),
          param(&M::recent, "recent", 4, 0, 1 << 20, "latest entries that always stay"),
          param(&M::blend, "blend", -1, -1, 1000, "weight of leverage; −1: the share of the entries that goes"),
          param(&M::sketch, "sketch", 48, 1, 4096, "channels that keys are sketched to; no sketch of fewer channels"),
          param(&M::ridge, "ridge", 0.01, 1e-6, 1e6, "added to the diagonal of the sketch's products"),
          param(&M::seed, "seed", 0, 0, 1000000000, "of the sketch; layers draw on their own")})
      all.push_back(p);
    return all;
  }
  std::string check() const override {
    const std::string below = too_small(budget, sinks + recent, "sinks + recent");
    return below.empty() ? NonCausal::check() : below;
  }

  std::pair<int64_t, int64_t> outside() const override { return {sinks, recent}; }

  Ragged score(LayerView& at) const override {
    Queue& queue = at.queue;
    const std::vector<int64_t> tail(at.prompt.size(), recent);
    auto inside = [&](const Ragged& x) { return without_last(queue, without_first(queue, x, sinks), tail); };
    const Spread layer{.over = Spread::Over::Layer};
    const Ragged mass = at.column("noncausal"), known = combine(queue, mass, Combine::Finite, 0);
    const Ragged drawn = z_scores(queue, smoothed(at, inside(known)), layer),
                 apart = z_scores(queue, leverage_scores(at, inside(plain_keys(at)), sketch, ridge, seed), layer);
    Ragged total = mass;
    total.values = queue.scratch.take(Dtype::F32, {mass.values.size[0]});
    const Num share = blend < 0 ? 1 - granted(budget, length()) / length() : Num(blend);
    compute(queue, total, share * load(apart.values, index()) + load(drawn.values, index()), total.values);
    return force(queue, combine(queue, mass, total, Combine::Forced), sinks, recent);
  }
};

}  // namespace

Entry compactor() {
  Entry e = entry<Compactor>(
      "compactor", "Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate Leverage Scores",
      "Chari et al., 2025, arXiv 2507.08143", 2025, uint8_t(Role::Keep));
  e.equation = "s_j = r z(leverage_j) + z(noncausal_j), z over all entries of the layer, r the share that goes";
  e.needs = "queries of the prompt";
  e.identity = "compactor(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
