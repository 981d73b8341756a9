#include "attention/maps.h"
#include "attention/scores.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// SpargeAttn (Zhang et al., 2025), its first stage: mean queries and keys stand for blocks whose rows are alike, and a tile
// reads the key blocks that hold `tau` of the estimate, the crossing one left out. Blocks of unlike rows are read by
// all, and tiles of unlike queries read all. Products are not rounded to 8 bits, and the second stage, which skips
// values whose weight vanishes beside what a kernel has already met, is left out: it changes no plan.
struct SpargeAttn final : Mechanism {
  int q_block, k_block;
  double theta, tau, topk;
  bool sink;

  static std::vector<ParamInfo> params() {
    using M = SpargeAttn;
    return {
        param(&M::tau, "tau", 0.98, 0, 1, "share of a tile's estimated mass that is read"),
        param(&M::theta, "theta", 0.6, -1, 1, "mean cosine above which the rows of a block are alike"),
        param(&M::topk, "topk", 0, 0, 1, "instead of tau: the share of all key blocks that a tile reads; 0: by tau"),
        param(&M::sink, "sink", false, "the first key block is always read"),
        param(&M::q_block, "q_block", 128, 1, 4096, "queries of a tile"),
        param(&M::k_block, "k_block", 64, 1, 4096, "keys of a block"),
    };
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = true;
    return n;
  }

  Plan plan(LayerView& at) const override {
    // A sliding window already bounds what is read.
    if (at.mods.window > 0 || tau >= 1 || topk >= 1) return dense_plan(q_block, k_block);
    Queue& queue = at.queue;
    const Ragged q_unit = unit_rows(queue, at.q), k_unit = unit_rows(queue, centred(queue, at.k));
    return chosen_blocks(at, Plan::Scope::QueryHead, q_block, k_block, [&](const Slice& s) -> BlockChoice {
      const int64_t key = s.sequence * at.k.heads + s.kv_head, query = key * s.q.heads,
                    blocks = (s.m + k_block - 1) / k_block;
      const Ragged q_like = likeness(queue, segments(q_unit, query, query + s.q.heads, s.q.heads), s.n, q_block),
                   k_like = likeness(queue, segments(k_unit, key, key + 1, 1), s.m, k_block);
      const Ragged rows = rows_of(queue, mean_map(at, s, q_block, k_block, {}), visible_blocks(at, s, q_block, k_block));
      const Num alike = load(k_like.values, place()) > theta;
      compute(queue, rows, pick(alike, load(rows.values, index()), -kInfinity), rows.values);
      Select most;
      most.by = Select::By::TopP, most.p = float(tau), most.crossing = false, most.at_least = 1;
      if (topk > 0) most.by = Select::By::TopK, most.k = std::max<int64_t>(1, int64_t(topk * double(blocks)));
      const Num whole = load(q_like.values, segment()) <= theta;
      return united(queue, softmax(queue, rows), most, blocks, whole || alike == 0 || (place() == 0 && sink));
    });
  }

  /// The mean cosine of all pairs of rows of a block: the mean of unit rows, squared.
  static Ragged likeness(Queue& queue, const Ragged& unit, int64_t length, int block) {
    const Ragged mean = pooled(queue, unit, length, PoolKind::Mean, block);
    return row_dots(queue, mean, mean, 1 / float(unit.values.size[1]));
  }
};

}  // namespace

Entry spargeattn() {
  Entry e = entry<SpargeAttn>("spargeattn", "SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference",
                              "Zhang et al., 2025, arXiv 2502.18137", 2025, uint8_t(Role::Plan));
  e.equation =
      "P = softmax of mean q · mean k s over blocks with mean cosine > θ; read the largest P while Σ ≤ τ, and all "
      "blocks of unlike rows";
  e.needs = "the whole prompt";
  e.identity = "spargeattn(tau=1)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
