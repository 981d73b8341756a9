#include <algorithm>

#include "attention/inputs.h"
#include "attention/maps.h"
#include "attention/plans.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Mixture of Sparse Attention (Piękos et al., 2025): each head takes the tokens that its router likes best, and attends
// among them alone; the router's number scales what a token gets, and a token that a head has not taken gets nothing from
// it. Choosing looks at the whole text, so only values are causal.
struct Mosa final : Mechanism {
  double sparsity;
  bool first;

  static std::vector<ParamInfo> params() {
    using M = Mosa;
    return {
        param(&M::sparsity, "sparsity", 16, 1, 1e9, "a head takes 1 / so many of the tokens, two at least"),
        param(&M::first, "include_first", false, "the first token is among them"),
    };
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = true;
    n.inputs = {"router [h, n]: σ(x W_r) of each token for each head"};
    return n;
  }

  Plan plan(LayerView& at) const override {
    Queue& queue = at.queue;
    const int64_t h = at.q.heads, n = at.rows[0];
    require(n == at.key_rows[0], "mosa", "tokens are chosen as queries and keys together: as many of both are needed");
    const Tensor router = given(at, "router", "[h, n]", {h * n});
    Ragged scores = at.q;
    scores.values = queue.scratch.take(Dtype::F32, {h * n});
    queue.move(router, scores.values);
    Select best;
    best.k = std::min(n, std::max<int64_t>(2, int64_t(double(n) / sparsity)));
    const Lists taken = chosen(queue, force(queue, scores, first ? 1 : 0, 0), best, best.k);
    const Tensor gain = queue.scratch.take(Dtype::F32, {h * n});
    const Num given_gain = at.mods.gain ? load(at.mods.gain, index()) : Num(1);
    const Num routed = taken.has(segment(), place()) * load(router, index());
    compute(queue, at.q, pick(among(at, heads, segment()), routed, 1) * given_gain, gain);
    at.mods.gain = gain;
    return tokens_plan(queue, Plan::Scope::QueryHead, int(n), taken.index, taken.count, best.k);
  }
};

}  // namespace

Entry mosa() {
  Entry e = entry<Mosa>(
      "mosa", "Mixture of Sparse Attention: Content-Based Learnable Sparse Attention via Expert-Choice Routing",
      "Piękos et al., 2025, arXiv 2505.00315", 2025, uint8_t(Role::Plan));
  e.equation = "I = top T/ρ of r; o_i = r_i softmax over j in I, j ≤ i of (q·k s) v for i in I, else 0";
  e.needs = "a trained router: --input router=…";
  e.no_identity = "the router is an input; with sparsity=1 and r = 1 it is dense";
  e.verified = {"formula", "bench"};
  return e;
}

}  // namespace heed::mechanisms
