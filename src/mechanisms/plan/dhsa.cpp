#include <algorithm>
#include <cmath>

#include "attention/maps.h"
#include "attention/scores.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Dynamic Hierarchical Sparse Attention (Xiong et al., 2025) without its trained boundaries: chunks of one length.
// Chunks are represented by the mean over heads and tokens times the root of their length, so that a short one weighs
// less; one map serves all heads, and tiles read the best share of what they see. The last queries, the instruction,
// see all. In the a-shape the first and the latest block are among those read.
struct Dhsa final : Mechanism {
  int q_block, k_block;
  int64_t last;
  double density;
  bool a_shape;

  static std::vector<ParamInfo> params() {
    using M = Dhsa;
    return {
        param(&M::density, "density", 0.125, 1e-6, 1, "share of the visible key blocks that a tile reads, rounded up"),
        param<M, int64_t>(&M::last, "last", 64, 0, 1 << 30, "last queries, whose tiles see all"),
        param(&M::a_shape, "a_shape", false, "the first and the latest key block are among those read"),
        param(&M::q_block, "q_block", 128, 1, 4096, "queries of a tile"),
        param(&M::k_block, "k_block", 32, 1, 4096, "keys of a block"),
    };
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = n.same_entries = true;
    return n;
  }

  Plan plan(LayerView& at) const override {
    causal_only(at, "dhsa");
    // A sliding window already bounds what is read.
    if (at.mods.window > 0 || density >= 1) return dense_plan(q_block, k_block);
    return chosen_blocks(at, Plan::Scope::Layer, q_block, k_block, [&](const Slice& s) -> BlockChoice {
      const std::vector<int64_t> visible = visible_blocks(at, s, q_block, k_block);
      const Ragged rows = rows_of(at.queue, map(at, s), visible);
      if (a_shape)
        compute(at.queue, rows, pick(place() == 0 || place() == length() - 1, kInfinity, load(rows.values, index())),
                rows.values);
      Select best;
      std::vector<int32_t> counts;
      for (int64_t t = 0; t < s.tiles; ++t) {
        const bool whole = std::min((t + 1) * q_block, s.n) > s.n - last;
        const double share = std::ceil(density * double(visible[size_t(t)]) - 1e-9);
        counts.push_back(whole ? int32_t(visible[size_t(t)]) : std::max(int32_t(share), a_shape ? 2 : 1));
      }
      best.count = at.queue.upload(counts);
      return {rows, best};
    });
  }

  Grids map(LayerView& at, const Slice& s) const {
    const Ragged q = head_mean(at.queue, pooled(at.queue, s.q, s.n, PoolKind::Mean, q_block)),
                 k = head_mean(at.queue, pooled(at.queue, s.k, s.m, PoolKind::Mean, k_block));
    const Num tokens = min(k_block, s.m - place() * k_block);
    compute(at.queue, k, load(k.values, index()) * sqrt(tokens), k.values);
    const Grids out = grids(at.queue, 1, s.tiles, (s.m + k_block - 1) / k_block);
    Proxy dot;
    dot.scale = 1, dot.q_tile = q_block, dot.k_tile = k_block, dot.offset = s.m - s.n;
    at.run().proxy(at.queue, q, k, dot, out);
    return out;
  }

  static Ragged head_mean(Queue& queue, const Ragged& x) {
    return segments(spread(queue, x, {.of = Spread::Of::Mean, .over = Spread::Over::Heads}), 0, 1, 1);
  }
};

}  // namespace

Entry dhsa() {
  Entry e = entry<Dhsa>("dhsa", "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs",
                        "Xiong et al., 2025, arXiv 2510.24606", 2025, uint8_t(Role::Plan));
  e.equation = "S = mean_h(q of a tile) · mean_h(k of a chunk) √length; read the top ⌈density · visible⌉ chunks";
  e.needs = "the whole prompt, the same entries in all heads";
  e.identity = "dhsa(density=1)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
