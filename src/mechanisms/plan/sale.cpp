#include <cmath>

#include "attention/maps.h"
#include "attention/scores.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// SALE (Ji et al., 2025): products of 4-bit queries and keys foretell every single weight, measured by what the tile's
// first and latest keys weigh exactly, and a block is read in which some pair exceeds tau. Smoothed queries take their mean's
// part of a product back unrounded. One scale a token (the released fast mode shares it between a few); tau is one for all
// heads, where the paper halves it head by head on a calibration text.
struct Sale final : Mechanism {
  double tau;
  int bits, q_block, k_block;
  int64_t local, stretch, dense_len;

  static std::vector<ParamInfo> params() {
    using M = Sale;
    return {
        param(&M::tau, "tau", 0.004, 0, 1,
              "weight relative to the first and latest keys from which a pair is read; below 1e-5: all"),
        param(&M::bits, "bits", 4, 2, 24, "of the estimate's queries and keys"),
        param<M, int64_t>(&M::local, "local", 128, 1, 1 << 30, "latest keys of a tile that are always read, at least"),
        param<M, int64_t>(&M::stretch, "segment", 128, 1, 1 << 30,
                          "keys between the first block and the latest come in whole stretches of so many"),
        param<M, int64_t>(&M::dense_len, "dense_len", 1024, 0, 1 << 30, "texts no longer than this are dense"),
        param(&M::q_block, "q_block", 64, 1, 4096, "queries of a tile"),
        param(&M::k_block, "k_block", 32, 1, 4096, "keys of a block"),
    };
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = true;
    return n;
  }

  Plan plan(LayerView& at) const override {
    causal_only(at, "sale");
    // A sliding window already bounds what is read.
    if (at.mods.window > 0 || tau < 1e-5 || longest_keys(at) <= dense_len) return dense_plan(q_block, k_block);
    Queue& queue = at.queue;
    const Ragged k = centred(queue, at.k);
    const Tensor lse = exact_part(at, k);
    const int levels = (1 << (bits - 1)) - 1;
    // [q₄, mean q, −log Σ / s] · [k₄, k, 1]
    const int64_t d = k.values.size[1], width = 2 * d + 1;
    const Ragged mean = mean_rows(queue, at.q), q_code = coded(queue, centred(queue, at.q), levels),
                 k_code = coded(queue, k, levels);
    Ragged q_side = at.q, k_side = k;
    q_side.values = queue.scratch.take(Dtype::F32, {q_code.values.size[0], width});
    k_side.values = queue.scratch.take(Dtype::F32, {k.values.size[0], width});
    const Num c = channel(), q_row = begin_of(at.q, segment()) + place(), k_row = begin_of(k, segment()) + place();
    const Num rest = pick(c < 2 * d, load(mean.values, segment() * d + c - d), load(lse, q_row) / (0 - at.scale()));
    compute(queue, at.q, pick(c < d, load(q_code.values, q_row * d + c), rest), q_side.values);
    compute(queue, k,
            pick(c < d, load(k_code.values, k_row * d + c), pick(c < 2 * d, load(k.values, k_row * d + c - d), 1)),
            k_side.values);
    return chosen_blocks(at, Plan::Scope::QueryHead, q_block, k_block, [&](const Slice& s) -> BlockChoice {
      const int64_t key = s.sequence * at.k.heads + s.kv_head, query = key * s.q.heads;
      Proxy dot;
      dot.scale = at.scale(), dot.offset = s.m - s.n;
      const Grids most = block_map(queue, segments(q_side, query, query + s.q.heads, s.q.heads), s.n,
                                   segments(k_side, key, key + 1, 1), s.m, dot, ReduceKind::Max, q_block, k_block);
      const Ragged rows = rows_of(queue, most, visible_blocks(at, s, q_block, k_block));
      compute(queue, rows, pick(near(), kInfinity, load(rows.values, index())), rows.values);
      Select above;
      above.by = Select::By::Threshold, above.p = float(std::log(tau));
      return {rows, above};
    });
  }

  /// Whether block place() of length() visible ones is the first or a latest one.
  Num near() const {
    const int64_t few = (local + k_block - 1) / k_block, whole = (stretch + k_block - 1) / k_block;
    return place() == 0 || place() >= length() - few - mod(max(length() - 1 - few, 0), whole);
  }

  /// log Σ e^logit of each query over the first and latest blocks.
  Tensor exact_part(LayerView& at, const Ragged& k) const {
    const Plan plan = chosen_blocks(at, Plan::Scope::QueryHead, q_block, k_block, [&](const Slice& s) -> BlockChoice {
      const Grids flags = grids(at.queue, s.q.heads, s.tiles, (s.m + k_block - 1) / k_block);
      const Ragged rows = rows_of(at.queue, flags, visible_blocks(at, s, q_block, k_block));
      compute(at.queue, rows, near(), rows.values);
      return {rows, flagged()};
    });
    Mods exact;
    exact.scale = at.mods.scale;
    RowStats stats;
    stats.lse = at.queue.scratch.take(Dtype::F32, {at.q.values.size[0]});
    at.run().observe_rows(at.queue, at.q, {.panel = &k, .pages = nullptr, .read = nullptr}, &plan, exact, stats);
    return stats.lse;
  }
};

}  // namespace

Entry sale() {
  Entry e = entry<Sale>("sale", "SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling",
                        "Ji et al., 2025, arXiv 2505.24179", 2025, uint8_t(Role::Plan));
  e.equation =
      "read block J iff max of e^(s q₄·k₄) / Σ over first and latest keys of e^(s q·k) > τ, or it is one of those";
  e.needs = "the whole prompt";
  e.identity = "sale(tau=0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
