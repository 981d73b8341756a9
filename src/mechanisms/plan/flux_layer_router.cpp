#include <array>

#include "attention/inputs.h"
#include "attention/maps.h"
#include "attention/plans.h"
#include "attention/reads.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Flux Attention (2026): a small network looks at the first and the last queries of a prompt and decides for a layer,
// once, whether it reads everything or sinks and a window; decoding goes on as decided. Queries are those before
// rotation: where q is rotated they come as an input of their own. While decoding the window ends at the token
// itself, in a prompt it is of whole blocks, as in the block-sparse kernels that the authors use.
struct FluxLayerRouter final : Mechanism {
  int pooled;
  int64_t block, sinks, window;

  static std::vector<ParamInfo> params() {
    using M = FluxLayerRouter;
    return {
        param(&M::pooled, "pooled", 100, 1, 1 << 20, "first queries, and last ones, that the router sees"),
        param<M, int64_t>(&M::block, "block", 128, 1, 1 << 20, "queries that share a window; divides it"),
        param<M, int64_t>(&M::sinks, "sinks", 128, 1, 1 << 30, "first keys that a sparse layer reads"),
        param<M, int64_t>(&M::window, "window", 2048, 1, 1 << 30, "latest keys that a sparse layer reads"),
    };
  }
  std::string check() const override {
    return window % block ? "block=" + std::to_string(block) + " does not divide window=" + std::to_string(window) : "";
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = n.same_entries = true;
    n.inputs = {"w1 [8d, d], b1 [8d]: the router's first matrix",
                "w2 [2d, 8d], b2 [2d]",
                "w3 [4d, 2d], b3 [4d]",
                "w4 [d, 4d], b4 [d]",
                "w5 [2, d], b5 [2]: scores of sparse and of dense",
                "plain_q [h, n, d]: optional, queries before rotation"};
    return n;
  }

  /// What the router said of the layer: F32 [1, 2]. Written anew, never changed: forks share it.
  struct Route final : State {
    std::shared_ptr<const Buffer> scores;
    std::unique_ptr<State> clone() const override { return std::make_unique<Route>(*this); }
    Num dense() const { return load(*scores, 1) > load(*scores, 0); }
  };
  std::unique_ptr<State> open(const ModelInfo&) const override { return std::make_unique<Route>(); }

  std::shared_ptr<const Buffer> routed(LayerView& at) const {
    Queue& queue = at.queue;
    const int64_t d = at.model.d, h = at.q.heads, n = at.rows[0], p = std::min<int64_t>(pooled, n);
    const Ragged q = given_instead(at, at.q, "plain_q", "[h, n, d]");
    const Ragged first = mean_rows(queue, rows_between(queue, q, 0, p)), last = mean_rows(queue, last_rows(queue, q, p));
    const Ragged both = combine(queue, combine(queue, first, last, Combine::Add), Combine::Multiply, 0.5f);
    Tensor x = mean_rows(queue, heads_of(queue, both.values, 1, h)).values;
    const std::array<int64_t, 6> widths{d, 8 * d, 2 * d, 4 * d, d, 2};
    for (size_t i = 1; i < widths.size(); ++i) {
      const std::string number = std::to_string(i), rows = std::to_string(widths[i]);
      const Tensor w = given(at, "w" + number, "[" + rows + ", " + std::to_string(widths[i - 1]) + "]",
                             {widths[i], widths[i - 1]}),
                   b = given(at, "b" + number, "[" + rows + "]", {widths[i]}),
                   y = queue.scratch.take(Dtype::F32, {1, widths[i]});
      queue.run->matmul(queue, w, x, b, false, y);
      const Num out = load(y, index());
      if (i != 2 && i != 5) compute(queue, out / (1 + exp(0 - out)), y);
      x = y;
    }
    auto scores = std::make_shared<Buffer>(Dtype::F32, std::initializer_list<int64_t>{1, 2}, *queue.memory);
    queue.move(x, *scores);
    return scores;
  }

  Plan plan(LayerView& at) const override {
    causal_only(at, "flux_layer_router");
    Queue& queue = at.queue;
    auto& route = static_cast<Route&>(at.state());
    route.scores = routed(at);
    const int64_t m = at.key_rows[0], first = m - at.rows[0], tiles = (at.rows[0] + block - 1) / block;
    const Tensor dense = compute(queue, Dtype::I32, {1}, route.dense());
    const Num all = load(dense, 0), end = min(first + (index() + 1) * block, m);
    return ranges_plan(queue, Plan::Scope::Layer, int(block), tiles, {0, pick(all, m, min(sinks, end))},
                       {max(sinks, first + (index() + 1) * block - window), pick(all, 0, end)});
  }

  Read read(LayerView& at) const override {
    const auto& route = static_cast<const Route&>(at.state());
    if (!route.scores) return {};
    const Ragged all = members(at.queue, at.per_entry(), at.store->shape().kv_heads, 0);
    return named_entries(at, Plan::Scope::Layer, all, route.dense() || place() < sinks || place() >= length() - window);
  }
};

}  // namespace

Entry flux_layer_router() {
  Entry e = entry<FluxLayerRouter>("flux_layer_router",
                                   "Flux Attention: Context-Aware Hybrid Attention for Efficient LLMs Inference",
                                   "2026, arXiv 2604.07394", 2026, Role::Plan | Role::Read);
  e.equation =
      "a = MLP(mean over heads and the first and last p queries of q); dense if a₁ > a₀, else j < s or i − j < w";
  e.needs = "a trained router: --input w1=…, b1=… to w5=…, b5=…; the whole prompt";
  e.no_identity = "the router is an input; one that says a₁ > a₀ is dense";
  e.verified = {"formula", "bench"};
  return e;
}

}  // namespace heed::mechanisms
