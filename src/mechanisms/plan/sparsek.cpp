#include <algorithm>

#include "attention/inputs.h"
#include "attention/maps.h"
#include "attention/plans.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// SparseK Attention (Lou et al., 2024): a number made of each token alone says whether later queries keep it; a query reads
// its window and, of what has left it, the best. This is the forward pass of hard selection. The soft weights of the
// SparseK operator, which differ from query to query, belong to training.
struct SparseK final : Mechanism {
  int64_t topk, window;
  double recency;

  static std::vector<ParamInfo> params() {
    using M = SparseK;
    return {
        param<M, int64_t>(&M::topk, "topk", 512, 1, 1000000000, "keys behind its window that a query reads"),
        param<M, int64_t>(&M::window, "window", 512, 0, 1000000000, "latest keys, which a query reads anyway"),
        param(&M::recency, "recency", 0, 0, 1e6, "what importance grows by with every token"),
    };
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = n.same_entries = true;
    n.inputs = {"importance [g, m]: of every key"};
    return n;
  }

  Plan plan(LayerView& at) const override {
    causal_only(at, "sparsek");
    Queue& queue = at.queue;
    const int64_t g = at.k.heads, n = at.rows[0], m = at.key_rows[0];
    Ragged importance = at.k;
    importance.values = given(at, "importance", "[g, m]", {g * m});
    if (topk + window >= m) return dense_plan(1, 1);
    if (recency > 0)
      importance.values = compute(queue, Dtype::F32, {g * m}, load(importance.values, index()) + recency * mod(index(), m));
    Select best;
    best.k = topk;
    const Lists kept = chosen(queue, up_to_each(queue, importance, m, n, window), best, topk);
    // Behind those, which end before it, the window.
    const int64_t capacity = topk + window;
    const Lists read = lists(queue, g * n, capacity);
    const auto old = [&](const Num& row) { return load(kept.count, row); };
    const auto left = [&](const Num& row) { return max(0, m - n + mod(row, n) + 1 - window); };
    const Num row = floor_div(index(), capacity), place = mod(index(), capacity);
    compute(queue, pick(place < old(row), load(kept.index, row * topk + place), left(row) + place - old(row)), read.index);
    compute(queue, old(index()) + m - n + mod(index(), n) + 1 - left(index()), read.count);
    return tokens_plan(queue, Plan::Scope::KvHead, 1, read.index, read.count, capacity);
  }
};

}  // namespace

Entry sparsek() {
  Entry e = entry<SparseK>("sparsek",
                           "Sparser is Faster and Less is More: Efficient Sparse Attention for Long-Range Transformers",
                           "Lou et al., 2024, arXiv 2406.16747", 2024, uint8_t(Role::Plan));
  e.equation = "read i − j < w, and the top k of u_j + ε j among the keys before";
  e.needs = "a trained score of each token: --input importance=…";
  e.no_identity = "importance is an input; with topk + window of all keys it is dense";
  e.verified = {"formula", "bench"};
  return e;
}

}  // namespace heed::mechanisms
