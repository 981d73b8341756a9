#include "attention/inputs.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// KVzap (Jegou, 2026): a small network tells from a token's hidden state alone what KVzip would find its entries
// worth, so that nothing is repeated; dms(kvzap, threshold=…) cuts by it as the paper does. GELU is its tanh form,
// which differs from the exact one by less than 5e-4.
struct KvZap final : KeepPolicy {
  static std::vector<ParamInfo> params() { return keep_params<KvZap>("0.3", "prompt"); }

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.inputs = {"x [m, hidden]: what the attention block of the layer gets, behind its norm",
                "w1 [g, hidden], b1 [g]: the matrix, or [width, hidden], [width]: the first of two",
                "w2 [g, width], b2 [g]: optional, the second"};
    return n;
  }

  Ragged score(LayerView& at) const override {
    Queue& queue = at.queue;
    const int64_t m = at.prompt[0], g = at.store->shape().kv_heads;
    const Tensor x = at.input("x", "[m, hidden]"), w1 = at.input("w1", "[width, hidden]");
    require(x.rank == 2 && w1.rank == 2 && x.size[1] == w1.size[1], "--input",
            "x is " + x.shape() + " and w1 " + w1.shape() + ": [m, hidden] and [width, hidden] are needed");
    const int64_t hidden = x.size[1], width = w1.size[0];
    Tensor y = queue.scratch.take(Dtype::F32, {m, width});
    queue.run->matmul(queue, w1, given(at, "x", "[m, hidden]", {m, hidden}), given(at, "b1", "[width]", {width}), false, y);
    if (is_given(at, "w2")) {
      const Num z = load(y, index());
      compute(queue, 0.5 * z * (1 + tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))), y);
      const Tensor out = queue.scratch.take(Dtype::F32, {m, g});
      queue.run->matmul(queue, given(at, "w2", "[g, width]", {g, width}), y, given(at, "b2", "[g]", {g}), false, out);
      y = out;
    }
    require(y.size[1] == g, "--input", "w1 is " + w1.shape() + ", and the layer has " + std::to_string(g) + " KV heads");
    const Ragged scores = at.per_entry();
    compute(queue, scores, load(y, place() * g + segment()), scores.values);
    return scores;
  }
};

}  // namespace

Entry kvzap() {
  Entry e = entry<KvZap>("kvzap", "KVzap: Fast, Adaptive, and Faithful KV Cache Pruning",
                         "Jegou, 2026, arXiv 2601.07891", 2026, uint8_t(Role::Keep));
  e.equation = "s_j = W x_j + b, or W₂ GELU(W₁ x_j + b₁) + b₂; keep the top B, or with dms what reaches τ";
  e.needs = "a trained network for each layer and its hidden states: --input x=…, w1=…, b1=…";
  e.no_identity = "the network is an input; with budget=1.0 it is dense";
  e.verified = {"formula", "bench"};
  return e;
}

}  // namespace heed::mechanisms
