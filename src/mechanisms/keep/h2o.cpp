#include "mechanisms/keep/h2o.h"

#include <cmath>

#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

Needs Accumulated::needs(const ModelInfo&) const {
  Needs n;
  n.columns = {{"paid"}};
  if (counts()) n.columns.push_back({"queries"});
  return n;
}

void Accumulated::observe(LayerView& at) const {
  if (at.phase == Phase::Replay) return;
  Observe how;
  how.rows = decay() < 1 ? Observe::Rows::Decayed : Observe::Rows::Sum, how.decay = float(decay());
  const Ragged now = at.observe(at.q, how, at.decoding() ? &at.read.plan : &at.plan);
  Ragged before = at.column("paid");
  if (decay() < 1) before = combine(at.queue, queries_behind(at), before, Combine::Exp, float(std::log(decay())));
  at.set_column("paid", combine(at.queue, before, now, Combine::Add));
  if (counts()) at.set_column("queries", combine(at.queue, at.column("queries"), queries_behind(at), Combine::Add));
}

Ragged Accumulated::seen(const LayerView& at) {
  const Ragged seen = at.column("queries");
  const int64_t window = at.model.window(at.layer);
  if (window > 0) compute(at.queue, min(load(seen.values, index()), window), seen.values);
  return seen;
}

namespace {

// H2O (Zhang et al., 2023): the largest sums stay, and the latest entries in any case.
struct H2O final : Accumulated {
  double recent;

  static std::vector<ParamInfo> params() {
    using M = H2O;
    return keep_params<M>("1024", "every(1)",
                          {param(&M::recent, "recent", 0.5, 0, 1, "share of the budget that the latest entries hold")});
  }

  Ragged score(LayerView& at) const override {
    std::vector<int64_t> latest;
    for (int64_t length : at.prompt) latest.push_back(int64_t(recent * double(budget.entries(length))));
    return force_last(at.queue, at.column("paid"), latest);
  }
};

// A2SF (Jo et al., 2024): H2O whose payments fade, so that old keys lose the lead of having been seen more often, and no
// recent window is needed. The paper forces nothing; the later repository keeps the last 16.
struct A2SF final : Accumulated {
  double alpha;
  int window;

  static std::vector<ParamInfo> params() {
    using M = A2SF;
    return keep_params<M>(
        "1024", "every(1)",
        {
            param(&M::alpha, "alpha", 0.95, 1e-6, 1, "what is left of a payment behind one query more; 1: h2o's sums"),
            param(&M::window, "window", 0, 0, 4096, "latest entries that always stay"),
        });
  }
  std::string check() const override { return too_small(budget, window, "window"); }

  double decay() const override { return alpha; }
  Ragged score(LayerView& at) const override { return force(at.queue, at.column("paid"), 0, window); }
};

// Observed attention (kvpress): the mean over the queries that could see a key of what they paid to it. On sliding-window
// layers a key is seen by no more queries than the window holds (the library divides by all that follow).
struct ObservedAttention final : Accumulated {
  static std::vector<ParamInfo> params() { return keep_params<ObservedAttention>("1024", "prompt"); }

  bool counts() const override { return true; }

  Ragged score(LayerView& at) const override { return combine(at.queue, at.column("paid"), seen(at), Combine::Divide); }
};

}  // namespace

Entry h2o() {
  Entry e = entry<H2O>("h2o", "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
                       "Zhang et al., 2023, arXiv 2306.14048", 2023, uint8_t(Role::Keep));
  e.equation = "A_j += Σ_i P_ij each step; evict the lowest A outside the last r·B entries";
  e.needs = "column sums of the whole prompt";
  e.identity = "h2o(budget=1.0,when=prompt)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

Entry a2sf() {
  Entry e = entry<A2SF>(
      "a2sf", "A2SF: Accumulative Attention Scoring with Forgetting Factor for Token Pruning in Transformer Decoder",
      "Jo et al., 2024, arXiv 2407.20485", 2024, uint8_t(Role::Keep));
  e.equation = "A_j ← α A_j + P_ij at every query i; evict the lowest A";
  e.needs = "column sums of the whole prompt";
  e.identity = "a2sf(budget=1.0,when=prompt)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

Entry observed_attention() {
  Entry e = entry<ObservedAttention>("observed-attention", "H2O's sums divided by age, as in kvpress",
                                     "Zhang et al., 2023, arXiv 2306.14048", 2023, uint8_t(Role::Keep));
  e.equation = "keep the top B of Σ_i P_ij / number of queries i that see key j";
  e.needs = "column sums of the whole prompt";
  e.identity = "observed-attention(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
