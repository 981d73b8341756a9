#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// H2O (Zhang et al., 2023): the attention that every query so far has paid to a key, summed while the text flows, decides;
// the latest entries stay in any case. A sum belongs to a KV head: the mean over its query heads (the paper has one head
// each).
struct H2O final : KeepPolicy {
  double recent;

  static std::vector<ParamInfo> params() {
    using M = H2O;
    return keep_params<M>("1024", "every(1)", {param(&M::recent, "recent", 0.5, 0, 1, "share of the budget that the latest entries hold")});
  }

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.columns = {{"h2o.sum"}};
    return n;
  }

  // Weights are those of the step itself: over the keys that were there and that its plan read, so after a cut they are
  // renormalised.
  void observe(LayerView& at) const override {
    if (at.phase == Phase::Replay) return;
    Observe how;
    how.rows = Observe::Rows::Sum;
    const Ragged sums = at.column("h2o.sum"), paid = at.observe(at.q, how, at.decoding() ? &at.read.plan : &at.plan);
    at.run().add(at.queue, paid.values.reshape({1, paid.bound}), sums.values.reshape({1, sums.bound}));
    at.set_column("h2o.sum", sums);
  }

  Ragged score(LayerView& at) const override {
    std::vector<int64_t> latest;
    for (int64_t length : at.prompt) latest.push_back(int64_t(recent * double(budget.entries(length))));
    return force_last(at.column("h2o.sum"), latest);
  }
};

}  // namespace

Entry h2o() {
  Entry e = entry<H2O>("h2o", "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", "Zhang et al., 2023, arXiv 2306.14048", 2023, uint8_t(Role::Keep));
  e.equation = "A_j += Σ_i P_ij each step; evict the lowest A outside the last r·B entries";
  e.needs = "column sums of the whole prompt";
  e.identity = "h2o(budget=1.0,when=prompt)";
  e.verified = {"identity", "formula", "model"};
  return e;
}

}  // namespace heed::mechanisms
