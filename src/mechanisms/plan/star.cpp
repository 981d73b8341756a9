#include "attention/patterns.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Star Attention (Acharya et al., 2024), the single-pass form of its first phase: a block of context sees itself and the
// anchor, the first tokens. The query behind the context, here the last `query` tokens, sees all, as decoding does.
struct Star final : Mechanism {
  int64_t block, anchor, query;

  static std::vector<ParamInfo> params() {
    using M = Star;
    return {
        param<M, int64_t>(&M::block, "block", 4096, 1, 1 << 30,
                          "tokens of a block (the paper: a quarter of the context)"),
        param<M, int64_t>(&M::anchor, "anchor", 0, 0, 1 << 30, "tokens of the anchor, no more than a block; 0: a block"),
        param<M, int64_t>(&M::query, "query", 64, 0, 1 << 30, "last tokens of the prompt, which see all"),
    };
  }
  std::string check() const override {
    return anchor <= block ? "" : "anchor=" + std::to_string(anchor) + " is longer than block=" + std::to_string(block);
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = true;
    return n;
  }

  Plan plan(LayerView& at) const override {
    return pattern_plan(at, [this](int64_t i, int64_t m, const AddKeys& add) {
      add(0, i >= m - query ? m : anchor > 0 ? anchor : block);
      add(i / block * block, i + 1);
    });
  }
};

}  // namespace

Entry star() {
  Entry e = entry<Star>("star", "Star Attention: Efficient LLM Inference over Long Sequences",
                        "Acharya et al., 2024, arXiv 2411.17116", 2024, uint8_t(Role::Plan));
  e.equation = "t sees j ≤ t iff j < anchor or j ≥ b ⌊t / b⌋; the query sees all";
  e.needs = "the whole prompt";
  e.identity = "star(block=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
