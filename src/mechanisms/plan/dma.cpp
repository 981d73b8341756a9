#include <algorithm>

#include "attention/inputs.h"
#include "attention/maps.h"
#include "attention/plans.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Dynamic Mask Attention (Shi et al., 2025): a bias made of values alone says which keys matter, whoever asks; a query
// reads the best of those before it and adds the bias to their logits. All keys of a KV head compete up to the query (the
// released helper chooses once over the whole text, which leaves early queries with few).
struct Dma final : Mechanism {
  int64_t topk;
  Choice form;

  static std::vector<ParamInfo> params() {
    using M = Dma;
    return {
        param<M, int64_t>(&M::topk, "topk", 2048, 1, 1000000000, "keys that a query reads"),
        param(&M::form, "form", {"exp", "linear"}, 0,
              "of the bias: e^(A δ) as in the paper, or A δ as in an example of the code"),
    };
  }
  std::string check() const override {
    return heads.all() ? "" : "a key's bias is one for all the heads that read it: leave out heads";
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = n.same_entries = true;
    n.inputs = {"w_dt [g, g·d_v]: from the values of all KV heads to a step for each", "a [g]: what a step is worth"};
    return n;
  }

  Plan plan(LayerView& at) const override {
    causal_only(at, "dma");
    Queue& queue = at.queue;
    const int64_t n = at.rows[0], m = at.key_rows[0];
    const Tensor bias = biases(at);
    at.mods.key_bias = bias;
    if (topk >= m) return dense_plan(1, 1);
    Ragged each = at.k;
    each.values = bias;
    Select best;
    best.k = topk;
    const Lists read = chosen(queue, up_to_each(queue, each, m, n), best, topk);
    return tokens_plan(queue, Plan::Scope::KvHead, 1, read.index, read.count, topk);
  }

  /// What every key's logits are raised by.
  Tensor biases(LayerView& at) const {
    Queue& queue = at.queue;
    const int64_t g = at.k.heads, m = at.key_rows[0], d = at.v.values.size[1];
    const Tensor w = given(at, "w_dt", "[g, g·d_v]", {g, g * d}), a = given(at, "a", "[g]", {g});
    // The part of every row of w that a KV head's values meet, and the sum of what they give.
    const Num part = floor_div(place(), g), row = mod(place(), g);
    const Ragged weights = heads_of(
        queue, compute(queue, Dtype::F32, {g * g, d}, load(w, (row * g + part) * d + channel())), g, g);
    const Grids products = grids(queue, g, m, g);
    Proxy dot;
    dot.scale = 1, dot.causal = false;
    at.run().proxy(queue, at.v, weights, dot, products);
    const Grids sum = sum_of_heads(queue, products);
    const Num head = floor_div(index(), m), x = load(sum.cells.values, mod(index(), m) * g + head);
    const Num step = load(a, head) * (max(x, 0) + log1p(exp(0 - abs(x))));
    return compute(queue, Dtype::F32, {g * m},
                   (form.value ? step : exp(step)) + (at.mods.key_bias ? load(at.mods.key_bias, index()) : Num(0)));
  }
};

}  // namespace

Entry dma() {
  Entry e = entry<Dma>("dma", "Trainable Dynamic Mask Sparse Attention", "Shi et al., 2025, arXiv 2508.02124", 2025,
                       uint8_t(Role::Plan));
  e.equation = "b_j = e^(A softplus(W v_j)); read the top k of b_j, j ≤ i; logit = q·k s + b_j";
  e.needs = "trained weights: --input w_dt=…, --input a=…";
  e.no_identity = "its weights are inputs; with A = 0 and topk of all keys it is dense";
  e.verified = {"formula", "bench"};
  return e;
}

}  // namespace heed::mechanisms
