#include <algorithm>

#include "attention/inputs.h"
#include "attention/maps.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Fast KVzip (Kim et al., 2026): a trained gate compares, in 16 channels, a token's key with 16 fixed ones by queries
// made of the same token; the share it wins is what the entry is worth. The lowest go, over all layers and heads
// together. The first entries and the latest 2 % always stay (4096 of a text of 32000 or more).
struct FastKVzip final : KeepPolicy {
  int sinks;
  Choice share;

  static constexpr int64_t kWidth = 16;  // channels, and fixed keys of each KV head

  static std::vector<ParamInfo> params() {
    using M = FastKVzip;
    return keep_params<M>(
        "0.3", "prompt",
        {
            param(&M::sinks, "sinks", 4, 0, 1 << 20, "first entries that always stay"),
            param(&M::share, "share", {"all", "layer"}, 0, "what divides the budget: all layers, or each layer's heads"),
        });
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.all_layers = true;
    n.inputs = {"x [m, hidden]: what the attention block of the layer gets, behind its norm",
                "w_q [h · 16, hidden], b_q [h · 16]: the gate's queries",
                "w_k [g · 16, hidden]: its keys",
                "b [h]: a bias for each query head",
                "fixed_k [g, 16, 16]: the keys that a token's own is compared with",
                "q_norm [16], k_norm [16]: optional, weights of the norms behind w_q and w_k"};
    return n;
  }

  /// x · w^T (+ bias) as normalised rows of `heads` heads.
  Ragged projected(LayerView& at, const std::string& name, int64_t heads, const Tensor& bias) const {
    Queue& queue = at.queue;
    const int64_t m = at.prompt[0];
    const Tensor x = at.input("x", "[m, hidden]");
    const int64_t hidden = x.numel() / m;
    const Tensor y = queue.scratch.take(Dtype::F32, {m, heads * kWidth});
    queue.run->matmul(queue, given(at, "w_" + name, "[heads · 16, hidden]", {heads * kWidth, hidden}),
                      given(at, "x", "[m, hidden]", {m, hidden}), bias, false, y);
    const std::string norm = name + "_norm";
    const Tensor weight = is_given(at, norm) ? given(at, norm, "[16]", {kWidth}) : ones(queue, kWidth);
    const Ragged out = heads_of(queue, queue.scratch.take(Dtype::F32, {heads * m, kWidth}), heads, m);
    const Heads split{.x = y.reshape({m, heads, kWidth}), .norm = weight, .out = out};
    queue.run->split_heads(queue, compute(queue, Dtype::I64, {2}, index() * m), 1e-6f, {&split, 1});
    return out;
  }

  Ragged score(LayerView& at) const override {
    Queue& queue = at.queue;
    const int64_t m = at.prompt[0], g = at.store->shape().kv_heads, h = at.model.h, group = h / g;
    const Ragged q = projected(at, "q", h, given(at, "b_q", "[h · 16]", {h * kWidth})), k = projected(at, "k", g, {}),
                 fixed = heads_of(queue, given(at, "fixed_k", "[g, 16, 16]", {g * kWidth, kWidth}), g, kWidth);
    const Tensor bias = given(at, "b", "[h]", {h});
    const Ragged own = row_dots(queue, q, k, 0.25f);
    const Grids others = grids(queue, h, m, kWidth), sum = grids(queue, h, m, 1);
    Proxy dots;
    dots.scale = 0.25f, dots.causal = false;
    queue.run->proxy(queue, q, fixed, dots, others);
    const Num row = floor_div(index(), kWidth), a = load(own.values, row) + load(bias, floor_div(row, m));
    compute(queue, exp(load(others.cells.values, index()) - a), others.cells.values);
    queue.run->reduce(queue, others, {.to = Reduce::To::Rows}, sum);
    compute(queue, 1 / (1 + load(sum.cells.values, index())), sum.cells.values);
    Ragged won = sum.cells;
    won.heads = group;
    won = spread(queue, won, {.of = Spread::Of::Mean, .over = Spread::Over::Heads});
    const Ragged out = at.per_entry();
    compute(queue, out, load(won.values, segment() * group * m + place()), out.values);
    return force(queue, out, sinks, m >= 32000 ? 4096 : std::max<int64_t>(1, m / 50));
  }

  Tensor allocate(const Allocation& a) const override {
    return divide(a, a.scores, KeepPolicy::allocate(a), share.value ? Pool::Layer : Pool::All);
  }
};

}  // namespace

Entry fast_kvzip() {
  Entry e = entry<FastKVzip>("fast-kvzip", "Fast KVzip: Efficient and Accurate LLM Inference with Gated KV Eviction",
                             "Kim et al., 2026, arXiv 2601.17668", 2026, uint8_t(Role::Keep));
  e.equation =
      "s_j = mean over the group of 1 / (1 + Σ_f exp(q_j·(k_f − k_j) / 4 − b)), q, k = RMS norms of W x_j; keep the"
      " best of all layers and heads";
  e.needs = "a trained gate for each layer and its hidden states: --input x=…, w_q=…, b_q=…, w_k=…, b=…, fixed_k=…";
  e.no_identity = "the gate is an input; with budget=1.0 it is dense";
  e.verified = {"formula", "bench"};
  return e;
}

}  // namespace heed::mechanisms
