#include <algorithm>

#include "attention/inputs.h"
#include "attention/maps.h"
#include "attention/plans.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// DeepSeek Sparse Attention (DeepSeek-AI, 2025): a small indexer, with one key a token for all its heads, scores every
// earlier token, and all heads read the best. Its queries and keys come as they are multiplied: normalised and rotated. (The
// Hadamard rotation of the released code changes no product, and 8 bits are rounding.)
struct Dsa final : Mechanism {
  int64_t topk;

  static std::vector<ParamInfo> params() {
    return {param<Dsa, int64_t>(&Dsa::topk, "topk", 2048, 1, 1000000000, "keys that a query reads")};
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = n.same_entries = true;
    n.inputs = {"index_q [heads, n, width]: queries of the indexer", "index_k [m, width]: its keys",
                "index_w [n, heads]: weights of its heads"};
    return n;
  }

  Plan plan(LayerView& at) const override {
    causal_only(at, "dsa");
    Queue& queue = at.queue;
    const int64_t n = at.rows[0], m = at.key_rows[0];
    const Tensor index_q = at.input("index_q", "[heads, n, width]");
    require(index_q.rank == 3, "--input", "index_q is " + index_q.shape() + ", not [heads, n, width]");
    const int64_t heads = index_q.size[0], width = index_q.size[2];
    const Ragged q = heads_of(queue, given(at, "index_q", "[heads, n, width]", {heads, n, width}), heads, n),
                 k = heads_of(queue, given(at, "index_k", "[m, width]", {m, width}), 1, m);
    const Tensor weight = given(at, "index_w", "[n, heads]", {n, heads});
    if (topk >= m) return dense_plan(1, 1);
    const Lists read = lists(queue, n, topk);
    each_part(queue, n, 1, [&](int64_t first, int64_t last) {
      const Grids sum = grids(queue, 1, last - first, m), product = grids(queue, 1, last - first, m);
      compute(queue, 0, sum.cells.values);
      Proxy dot;
      dot.scale = 1, dot.offset = m - n + first;
      for (int64_t head = 0; head < heads; ++head) {
        queue.run->proxy(queue, rows_between(queue, segments(q, head, head + 1, 1), first, last), k, dot, product);
        const Num w = load(weight, (first + floor_div(place(), m)) * heads + head);
        compute(queue, load(sum.cells.values, index()) + w * max(0, load(product.cells.values, index())), sum.cells.values);
      }
      std::vector<int64_t> visible;
      for (int64_t i = first; i < last; ++i) visible.push_back(m - n + i + 1);
      Select best;
      best.k = topk;
      choose(queue, rows_of(queue, sum, visible), best, read.part(first, last));
    });
    return tokens_plan(queue, Plan::Scope::Layer, 1, read.index, read.count, topk);
  }
};

}  // namespace

Entry dsa() {
  Entry e = entry<Dsa>("dsa", "DeepSeek-V3.2-Exp: Boosting Long-Context Efficiency with DeepSeek Sparse Attention",
                       "DeepSeek-AI, 2025, technical report", 2025, uint8_t(Role::Plan));
  e.equation = "I_ij = Σ_h w_ih max(0, q^I_ih · k^I_j); read the top k of I_i, all heads the same";
  e.needs = "a trained indexer: --input index_q=…, --input index_k=…, --input index_w=…";
  e.no_identity = "the indexer is an input; with topk of all keys it is dense";
  e.verified = {"formula", "bench"};
  return e;
}

}  // namespace heed::mechanisms
