#include <algorithm>
#include <numeric>

#include "attention/patterns.h"
#include "base/random.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Stochastic Attention (Jin and Sui, 2026): the tokens of each layer are shuffled, and a query sees the keys near it in
// that order which are not later in the text. Which side of the shuffled window counts is not settled by the source: both
// halves by default.
struct StochasticSA final : Mechanism {
  int64_t window, seed;
  Choice side;
  bool circular;

  static std::vector<ParamInfo> params() {
    using M = StochasticSA;
    return {
        param<M, int64_t>(&M::window, "window", 256, 1, 1000000000, "width in shuffled order"),
        param<M, int64_t>(&M::seed, "seed", 0, 0, 1000000000, "of the shuffles; every layer has its own"),
        param(&M::side, "side", {"both", "left"}, 0,
              "both: half the width on either side; left: those before and the query itself"),
        param(&M::circular, "circular", false, "windows wrap around"),
    };
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = true;
    return n;
  }

  /// place → token, for m tokens of a layer (Fisher–Yates).
  std::vector<int64_t> shuffled(int layer, int64_t m) const {
    std::vector<int64_t> order(static_cast<size_t>(m));
    std::iota(order.begin(), order.end(), 0);
    Random random(uint64_t(seed) * 1000003u + uint64_t(layer));
    for (int64_t i = m; i > 1; --i) std::swap(order[size_t(i - 1)], order[size_t(random.below(i))]);
    return order;
  }

  Plan plan(LayerView& at) const override {
    std::vector<int64_t> order, rank;
    return pattern_plan(at, [&](int64_t i, int64_t m, const AddKeys& add) {
      if (int64_t(order.size()) != m) {
        order = shuffled(at.layer, m), rank.resize(order.size());
        for (size_t r = 0; r < order.size(); ++r) rank[size_t(order[r])] = int64_t(r);
      }
      const int64_t before = side.value ? window - 1 : window / 2, after = side.value ? 0 : window / 2,
                    here = rank[size_t(i)];
      if (before >= m) return add(0, i + 1);
      for (int64_t r = here - before; r <= here + std::min(after, m); ++r) {
        if (!circular && (r < 0 || r >= m)) continue;
        const int64_t token = order[size_t((r % m + m) % m)];
        add(token, token + 1);
      }
    });
  }
};

}  // namespace

Entry stochastic_sa() {
  Entry e = entry<StochasticSA>(
      "stochastic-sa",
      "Stochastic Attention: Connectome-Inspired Randomized Routing for Expressive Linear-Time Attention",
      "Jin and Sui, 2026, arXiv 2604.00754", 2026, uint8_t(Role::Plan));
  e.equation = "i sees j ≤ i iff |rank(i) − rank(j)| ≤ w / 2, rank a random order of the layer's tokens";
  e.needs = "the whole prompt";
  e.identity = "stochastic-sa(window=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
