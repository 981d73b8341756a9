#include <algorithm>
#include <cmath>

#include "attention/inputs.h"
#include "attention/maps.h"
#include "attention/rotation.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// SeerAttention (Gao et al., 2024): a trained gate between mean queries and a linear image of the largest and smallest keys of
// a block, both from before the rotation and turned as the block's first token. Blocks whose gate exceeds a threshold are
// read, or as many for every tile as fill a share of the causal triangle; the last two tiles read all. The diagonal is
// forced besides, which the released code leaves open. Its decoding gate is another.
struct SeerAttention final : Mechanism {
  double threshold, ratio, base;
  int block;
  bool last;

  static std::vector<ParamInfo> params() {
    using M = SeerAttention;
    return {
        param(&M::threshold, "threshold", 2e-3, 0, 1, "gate from which a block is read"),
        param(&M::ratio, "ratio", 0, 0, 1,
              "instead of the threshold: the share of the triangle that is read; 0: by threshold"),
        param(&M::last, "last", true, "the last two tiles read all"),
        param(&M::block, "block", 64, 1, 4096, "queries and keys of a block"),
        param(&M::base, "base", 10000, 1, 1e12, "of the rotary embedding"),
    };
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = n.same_entries = true;
    n.inputs = {"plain_q [h, n, d]: queries before rotation", "plain_k [g, m, d]: keys before rotation",
                "w_k [h, 2·d, d]: from a block's largest and smallest keys"};
    return n;
  }

  Plan plan(LayerView& at) const override {
    causal_only(at, "seer_attention");
    if (ratio >= 1) return dense_plan(block, block);
    Queue& queue = at.queue;
    const int64_t h = at.q.heads, g = at.k.heads, d = at.q.values.size[1];
    Ragged q = at.q, k = at.k;
    q.values = given(at, "plain_q", "[h, n, d]", {q.values.size[0], d});
    k.values = given(at, "plain_k", "[g, m, d]", {k.values.size[0], d});
    const Tensor w = given(at, "w_k", "[h, 2·d, d]", {h, 2 * d, d});
    Rope rope;
    rope.dims = int(d);
    rope.inv_freq = compute(queue, Dtype::F32, {d / 2}, exp(index() * (-2 * std::log(base) / double(d))));
    return chosen_blocks(at, Plan::Scope::QueryHead, block, block, [&](const Slice& s) -> BlockChoice {
      const int64_t query = s.kv_head * s.q.heads, blocks = (s.m + block - 1) / block, before = s.m - s.n;
      const Ragged gate_q = pooled(queue, segments(q, query, query + h / g, h / g), s.n, PoolKind::Mean, block),
                   gate_k = transformed(queue, extremes(queue, segments(k, s.kv_head, s.kv_head + 1, 1), s),
                                        w.slice(0, query, query + h / g));
      const auto first_token = [&](const Ragged& x, int64_t each, int64_t from) {
        return compute(queue, Dtype::I32, {x.bound}, from + mod(index(), each) * block);
      };
      Proxy gate;
      gate.softmax = true, gate.q_tile = gate.k_tile = block, gate.offset = before;
      const Grids map = grids(queue, s.q.heads, s.tiles, blocks);
      at.run().proxy(queue, turned(queue, gate_q, rope, first_token(gate_q, s.tiles, before)),
                     turned(queue, gate_k, rope, first_token(gate_k, blocks, 0)), gate, map);
      Select open;
      open.by = Select::By::Threshold, open.p = std::nextafter(float(threshold), INFINITY);
      if (ratio > 0)
        open.by = Select::By::TopK, open.k = std::max<int64_t>(1, int64_t((1 - std::sqrt(1 - ratio)) * double(blocks)));
      const Num late = mod(segment(), s.tiles) >= s.tiles - (last ? 2 : 0);
      return united(queue, rows_of(queue, map, visible_blocks(at, s, block, block)), open, blocks,
                    late || own_block(s, block, block));
    });
  }

  /// For each query head of the slice, the largest and the smallest keys of every block side by side.
  Ragged extremes(Queue& queue, const Ragged& k, const Slice& s) const {
    const int64_t d = k.values.size[1], blocks = (s.m + block - 1) / block;
    const Ragged high = pooled(queue, k, s.m, PoolKind::Max, block), low = pooled(queue, k, s.m, PoolKind::Min, block),
                 out = numbers(queue, std::vector<int64_t>(size_t(s.q.heads), blocks), s.q.heads, 2 * d);
    const Num at = place() * d + mod(channel(), d);
    compute(queue, out, pick(channel() < d, load(high.values, at), load(low.values, at)), out.values);
    return out;
  }
};

}  // namespace

Entry seer_attention() {
  Entry e = entry<SeerAttention>("seer_attention", "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
                                 "Gao et al., 2024, arXiv 2410.13276", 2024, uint8_t(Role::Plan));
  e.equation = "G = softmax(R(mean q) · R([max k, min k] W) / √d) over blocks; read G > t";
  e.needs = "a trained gate, and queries and keys before rotation: --input w_k=…, --input plain_q=…, --input plain_k=…";
  e.no_identity = "the gate is an input; with threshold=0 it is dense";
  e.verified = {"formula", "bench"};
  return e;
}

}  // namespace heed::mechanisms
