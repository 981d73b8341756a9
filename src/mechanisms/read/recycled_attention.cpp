#include <limits>

#include "attention/reads.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Recycled Attention (Xu et al., 2024): most steps read the entries that the last full step paid most, and every token that
// came since, which has no score yet and pushes out the lowest; every `stride`-th step reads all and scores anew. The
// fixed schedule; the one that compares queries is left out.
struct RecycledAttention final : Mechanism {
  Budget budget;
  int stride, kernel;

  static std::vector<ParamInfo> params() {
    using M = RecycledAttention;
    return {
        budget_param(&M::budget, "0.125", "entries read in a partial step by each KV head; a fraction is of the prompt"),
        param(&M::stride, "stride", 50, 1, 1 << 20, "decoded tokens from one full step to the next; 1: all are full"),
        param(&M::kernel, "kernel", 1, 1, 63, "width of the maximum over neighbouring keys, odd"),
    };
  }
  std::string check() const override {
    return kernel % 2 ? "" : "kernel=" + std::to_string(kernel) + " is even: a smoothing width has a middle";
  }

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.columns = {{.name = "recycled", .fill = std::numeric_limits<float>::infinity()}};
    return n;
  }

  bool full(const LayerView& at) const { return !at.decoding() || (at.step() + 1) % stride == 0; }

  void observe(LayerView& at) const override {
    if (at.phase == Phase::Replay || !full(at)) return;
    Observe how;
    how.rows = Observe::Rows::Last, how.heads = Observe::Heads::GroupMax;
    Ragged scores = at.observe(at.last_queries(1), how), smoothed = scores;
    smoothed.values = at.queue.scratch.take(Dtype::F32, {scores.bound});
    at.run().smooth(at.queue, scores, PoolKind::Max, kernel, smoothed.values);
    at.set_column("recycled", smoothed);
  }

  Read read(LayerView& at) const override {
    if (full(at) || at.mods.window > 0) return {};  // a sliding window already bounds what is read
    std::vector<int64_t> counts;
    for (int64_t length : at.prompt) counts.push_back(std::max(budget.entries(length), (at.step() + 1) % stride));
    return best_entries(at, Plan::Scope::KvHead, at.column("recycled"), counts);
  }
};

}  // namespace

Entry recycled_attention() {
  Entry e = entry<RecycledAttention>("recycled-attention",
                                     "Recycled Attention: Efficient inference for long-context language models",
                                     "Xu et al., 2024, arXiv 2411.05787", 2024, uint8_t(Role::Read));
  e.equation =
      "every S-th step: dense, a_j = max over the group of P_j; others: attend over the top K of a, newer tokens first";
  e.needs = "a number beside each entry";
  e.identity = "recycled-attention(stride=1)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
