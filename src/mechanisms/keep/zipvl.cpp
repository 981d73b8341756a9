#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"
#include "mechanisms/keep/h2o.h"

namespace heed::mechanisms {

namespace {

// ZipVL (He et al., 2024), what it keeps: a layer holds as many entries as it takes to gather `tau` of all attention, and
// which those are is ranked by what a query that could see the entry paid on average. The exact sums stand for the
// paper's probe rows; the rest is dropped (the paper's later form), and the prompt itself is read densely.
struct ZipVL final : Accumulated {
  double tau;

  static std::vector<ParamInfo> params() {
    using M = ZipVL;
    return {
        param(&M::when, "when", "when", "prompt", "prompt, chunk, every(n)", "when the policy cuts"),
        param(&M::tau, "tau", 0.975, 0, 1, "share of the layer's attention that what stays had gathered; 1: all"),
    };
  }
  bool counts() const override { return true; }
  bool unbounded() const override { return true; }

  Ragged score(LayerView& at) const override {
    return spread(at.queue, at.column("paid"), {.of = Spread::Of::Sum, .over = Spread::Over::Heads});
  }

  Tensor allocate(const Allocation& a) const override {
    const int64_t layers = int64_t(a.scores.size()), all = a.scores[0].segments();
    const Tensor counts = a.queue.scratch.take(Dtype::I32, {layers, all});
    for (int64_t l = 0; l < layers; ++l) {
      const Ragged& mass = a.scores[size_t(l)];
      // A sum that rounds must not lose the last entries when all are wanted.
      if (tau == 1) {
        compute(a.queue, length_of(mass, index()), counts.select(0, l));
        continue;
      }
      const int64_t capacity = std::max<int64_t>(1, mass.bound);
      Select top_p;
      top_p.by = Select::By::TopP, top_p.p = float(tau), top_p.at_least = 1;
      a.queue.run->select(a.queue, mass, top_p, capacity, a.queue.scratch.take(Dtype::I32, {all * capacity}),
                          counts.select(0, l));
    }
    return counts;
  }

  Ragged rank(LayerView& at, const Ragged& mass, const Tensor&) const override {
    return combine(at.queue, mass, seen(at), Combine::Divide);
  }
};

}  // namespace

Entry zipvl() {
  Entry e = entry<ZipVL>(
      "zipvl",
      "ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification and KV Cache Compression",
      "He et al., 2024, arXiv 2410.08584", 2024, uint8_t(Role::Keep));
  e.equation = "p = the fewest entries whose Σ_i P_ij make up τ n; keep the top p of Σ_i P_ij / rows that see j";
  e.needs = "column sums of the whole prompt";
  e.identity = "zipvl(tau=1)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
