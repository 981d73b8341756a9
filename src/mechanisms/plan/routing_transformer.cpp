#include <algorithm>

#include "attention/inputs.h"
#include "attention/maps.h"
#include "attention/plans.h"
#include "attention/scores.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Routing Transformer (Roy et al., 2020): each centroid of a head takes the queries and the keys of largest cosine with it, and
// they attend to one another; a query's outputs are averaged over the clusters that took it, and one that none took gets
// nothing. As in the PyTorch port: unit vectors route, logits are those of q and k as they are. (The original routes and
// attends with normalised ones.) Shared queries and keys are given as both. Choosing looks at the whole text.
struct RoutingTransformer final : Mechanism {
  int64_t window;

  static std::vector<ParamInfo> params() {
    return {param<RoutingTransformer, int64_t>(&RoutingTransformer::window, "window", 256, 1, 1000000000,
                                               "queries, and keys, that a centroid takes")};
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = n.same_entries = true;
    n.inputs = {"centroids [h, c, d]: of each head"};
    return n;
  }

  Plan plan(LayerView& at) const override { return replaced(at, heads, 1, 1); }

  Tensor edit(LayerView& at) const override {
    Queue& queue = at.queue;
    const int64_t h = at.q.heads, n = at.rows[0], m = at.key_rows[0], d = at.q.values.size[1], rows = at.out.size[0],
                  width = at.out.size[1], count = at.input("centroids", "[h, c, d]").numel() / (h * d);
    const Ragged centroids = heads_of(queue, given(at, "centroids", "[h, c, d]", {h * count, d}), h, count);
    const Lists queries = taken(queue, centroids, count, unit_rows(queue, in_f32(queue, at.q)), n),
                keys = taken(queue, centroids, count, unit_rows(queue, in_f32(queue, at.k)), m);
    const Tensor part = queue.scratch.take(Dtype::F32, {rows, width}),
                 out = queue.scratch.take(Dtype::F32, {rows, width}), times = queue.scratch.take(Dtype::F32, {rows});
    queue.fill(out, 0), queue.fill(times, 0);
    for (int64_t cluster = 0; cluster < count; ++cluster) {
      const Scratch scratch(queue.scratch);
      Mods mods = at.mods;
      mods.gain = queue.scratch.take(Dtype::F32, {rows});
      compute(queue, at.q, among(at, heads, segment()) * queries.has(segment() * count + cluster, place()), mods.gain);
      Plan plan;
      plan.form = Plan::Form::Tokens, plan.q_tile = int(n), plan.causal = at.plan.causal;
      plan.rowptr = compute(queue, Dtype::I64, {h + 1}, min(index() * count + cluster, h * count) * keys.capacity);
      plan.count = compute(queue, Dtype::I32, {h}, load(keys.count, index() * count + cluster));
      plan.index = keys.index, plan.nnz_bound = keys.index.size[0];
      at.run().attend(queue, at.q, at.k, at.v, plan, mods, part, {});
      compute(queue, load(times, index()) + load(mods.gain, index()), times);
      compute(queue, load(out, index()) + load(part, index()), out);
    }
    compute(queue, load(at.out, index()) + load(out, index()) / max(1, load(times, place())), out);
    return out;
  }

  /// The rows of largest product with each centroid.
  Lists taken(Queue& queue, const Ragged& centroids, int64_t count, const Ragged& unit, int64_t length) const {
    const Grids likeness = grids(queue, centroids.heads, count, length);
    Proxy dot;
    dot.scale = 1, dot.causal = false;
    queue.run->proxy(queue, centroids, unit, dot, likeness);
    Select best;
    best.k = window;
    return chosen(queue, rows_of(queue, likeness, std::vector<int64_t>(size_t(count), length)), best,
                  std::min(window, length));
  }
};

}  // namespace

Entry routing_transformer() {
  Entry e = entry<RoutingTransformer>("routing_transformer",
                                      "Efficient Content-Based Sparse Attention with Routing Transformers",
                                      "Roy et al., 2020, arXiv 2003.05997", 2020, Role::Plan | Role::Edit);
  e.equation =
      "cluster c: the w queries and the w keys of largest q̂·μ_c, k̂·μ_c; o_i = mean over its clusters of their "
      "causal attention";
  e.needs = "trained centroids: --input centroids=…";
  e.no_identity = "centroids are inputs; one cluster of all tokens is dense";
  e.verified = {"formula", "bench"};
  return e;
}

}  // namespace heed::mechanisms
