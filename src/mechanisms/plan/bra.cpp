#include "attention/maps.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Bi-level Routing Attention (Zhu et al., 2023, BiFormer) on one axis: regions are routed to regions by their mean queries
// and keys, all heads taken together, and tokens of a region attend to those of the regions it is routed to. What a
// vision model trains besides (convolution of the values) belongs to the model.
struct Bra final : Mechanism {
  int region, topk;

  static std::vector<ParamInfo> params() {
    using M = Bra;
    return {
        param(&M::region, "region", 64, 1, 1 << 20, "tokens of a region"),
        param(&M::topk, "topk", 4, 1, 1 << 20, "regions that a region is routed to"),
    };
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = n.same_entries = true;
    return n;
  }

  Plan plan(LayerView& at) const override {
    // A sliding window already bounds what is read.
    if (at.mods.window > 0 || topk >= (longest_keys(at) + region - 1) / region) return dense_plan(region, region);
    return chosen_blocks(at, Plan::Scope::Layer, region, region, [&](const Slice& s) -> BlockChoice {
      Proxy plain;
      plain.scale = 1;
      const Grids affinity = sum_of_heads(at.queue, mean_map(at, s, region, region, plain));
      Select best;
      best.k = topk;
      return {rows_of(at.queue, affinity, visible_blocks(at, s, region, region)), best};
    });
  }
};

}  // namespace

Entry bra() {
  Entry e = entry<Bra>("bra", "BiFormer: Vision Transformer with Bi-Level Routing Attention",
                       "Zhu et al., 2023, arXiv 2303.08810", 2023, uint8_t(Role::Plan));
  e.equation = "A = Q^r (K^r)^T of region means over all heads; a region reads its top-k regions by A";
  e.needs = "the whole prompt, the same entries in all heads";
  e.identity = "bra(topk=1000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
