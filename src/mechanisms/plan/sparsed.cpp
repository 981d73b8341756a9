#include <algorithm>

#include "attention/inputs.h"
#include "attention/maps.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// SparseD (Wang et al., 2025) for diffusion language models: the first denoising steps are dense, the last of them makes
// a plan from its exact weights, and later steps use it unchanged. A tile reads the best blocks by their mean weight, and
// besides the best of those that are being generated, whose weights among themselves are taken. As released, prompt
// blocks are ranked and counted among all blocks (the paper: among their own), and a short last block is divided by a whole
// one's size. Logits are scaled by 1/√d, as in the released code for Dream (that for LLaDA divides by √heads).
struct SparseD final : Mechanism {
  double ratio, skip;
  int block;
  int64_t generated, step, steps;

  static std::vector<ParamInfo> params() {
    using M = SparseD;
    return {
        param(&M::ratio, "ratio", 0.3, 0, 1, "share of the blocks that a tile reads, and one more"),
        param(&M::block, "block", 128, 1, 4096, "queries and keys of a block"),
        param<M, int64_t>(&M::generated, "generated", 0, 0, 1 << 30, "last tokens, which are being generated"),
        param<M, int64_t>(&M::step, "step", 1024, 1, 1 << 30, "denoising step, counted from 1"),
        param<M, int64_t>(&M::steps, "steps", 1024, 1, 1 << 30, "denoising steps in all"),
        param(&M::skip, "skip", 0.2, 0, 1, "share of the steps that are dense"),
    };
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = true;
    return n;
  }

  Plan plan(LayerView& at) const override {
    // A sliding window already bounds what is read.
    if (at.mods.window > 0 || ratio >= 1 || step <= int64_t(double(steps) * skip) + 1) return dense_plan(block, block);
    Queue& queue = at.queue;
    const Ragged q = given_instead(at, at.q, "plan_q", "[h, n, d]"), k = given_instead(at, at.k, "plan_k", "[g, m, d]");
    return chosen_blocks(at, Plan::Scope::QueryHead, block, block, [&](const Slice& s) -> BlockChoice {
      const int64_t key = s.sequence * at.k.heads + s.kv_head, query = key * s.q.heads, before = s.m - s.n,
                    blocks = (s.m + block - 1) / block,
                    first = std::min(blocks, (std::max<int64_t>(0, s.m - generated) + block - 1) / block);
      const Ragged queries = segments(q, query, query + s.q.heads, s.q.heads), keys = segments(k, key, key + 1, 1);
      std::vector<int64_t> visible = visible_blocks(at, s, block, block);
      // The best of blocks `from` … by the weights among their keys.
      const auto best = [&](int64_t from) {
        Proxy exact;
        exact.scale = at.mods.scale, exact.softcap = at.mods.softcap, exact.softmax = true, exact.causal = at.plan.causal;
        exact.offset = before - from * block;
        const Grids mass = block_map(queue, queries, s.n, rows_between(queue, keys, from * block, s.m),
                                     s.m - from * block, exact, ReduceKind::Sum, block, block);
        std::vector<int64_t> own;
        for (int64_t x : visible) own.push_back(std::max<int64_t>(0, x - from));
        const Ragged rows = rows_of(queue, mass, own);
        Select top;
        top.count = compute(queue, Dtype::I32, {rows.segments()}, floor(length_of(rows, index()) * ratio) + 1);
        return chosen(queue, rows, top, blocks - from);
      };
      const Ragged rows = rows_of(queue, grids(queue, s.q.heads, s.tiles, blocks), visible);
      const Lists all = best(0);
      compute(queue, rows, place() < first && all.has(segment(), place()), rows.values);
      if (first < blocks) {
        const Lists late = best(first);
        compute(queue, rows, max(load(rows.values, index()), late.has(segment(), place() - first)), rows.values);
      }
      return {rows, flagged()};
    });
  }
};

}  // namespace

Entry sparsed() {
  Entry e = entry<SparseD>("sparsed", "SparseD: Sparse Attention for Diffusion Language Models",
                           "Wang et al., 2025, arXiv 2509.24014", 2025, uint8_t(Role::Plan));
  e.equation =
      "of the planning step's softmax(q·k s), summed over blocks: the top ⌊ρ N⌋ + 1 of all in the prompt, and those "
      "of the generated among themselves";
  e.needs =
      "the whole prompt; queries and keys of the planning step, where they are others: --input plan_q=…, --input "
      "plan_k=…";
  e.identity = "sparsed(ratio=1)";
  e.apply_inputs = {"plan_q [h, n, d]: queries of the planning step", "plan_k [g, m, d]: its keys"};
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
