#include <algorithm>

#include "attention/inputs.h"
#include "attention/maps.h"
#include "attention/patterns.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// FlashBlock (Chen et al., 2026) for block diffusion: what a block reads before itself changes little between
// denoising steps, so a step computes attention inside its block alone and joins it with an earlier step's output
// over the rest, by their sums. That step's queries are given: cached_q. A block is seen as a whole, unless attention
// is causal. When to refresh, and the residual that is kept beside a sparse step, are left to who runs the steps.
struct FlashBlock final : Mechanism {
  int64_t block;

  static std::vector<ParamInfo> params() {
    using M = FlashBlock;
    return {param<M, int64_t>(&M::block, "block", 32, 1, 1000000000, "tokens that are denoised together")};
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = true;
    n.inputs = {"cached_q [h, n, d]: queries of the step that read what lies before each block"};
    return n;
  }

  int64_t first(int64_t i) const { return i / block * block; }

  Plan plan(LayerView& at) const override {
    return pattern_plan(at, [this](int64_t i, int64_t, const AddKeys& add) { add(first(i), first(i) + block); });
  }

  Tensor edit(LayerView& at) const override {
    Queue& queue = at.queue;
    const int64_t rows = at.out.size[0], width = at.out.size[1];
    const Tensor outs = queue.scratch.take(Dtype::F32, {2, rows, width}), sums = queue.scratch.take(Dtype::F32, {2, rows}),
                 out = queue.scratch.take(Dtype::F32, {rows, width}), lse = queue.scratch.take(Dtype::F32, {rows});
    queue.move(at.out, outs.select(0, 0)), queue.move(at.lse, sums.select(0, 0));
    Ragged q = at.q;
    q.values = given(at, "cached_q", "[h, n, d]", {rows, at.q.values.size[1]});
    const Plan before = pattern_plan(at, [this](int64_t i, int64_t, const AddKeys& add) { add(0, first(i)); });
    at.run().attend(queue, q, at.k, at.v, before, at.mods, outs.select(0, 1), sums.select(0, 1));
    // Other heads have read all already.
    compute(queue, at.q, pick(among(at, heads, segment()), load(sums.select(0, 1), index()), -kInfinity), sums.select(0, 1));
    at.run().merge(queue, outs, sums, out, lse);
    queue.move(lse, at.lse);
    return out;
  }
};

}  // namespace

Entry flashblock() {
  Entry e = entry<FlashBlock>("flashblock", "FlashBlock: Attention Caching for Efficient Long-Context Block Diffusion",
                              "Chen et al., 2026, arXiv 2602.05305", 2026, Role::Plan | Role::Edit);
  e.equation = "o = merge(attention of q inside its block, attention of an earlier step's q before the block)";
  e.needs = "an earlier step: --input cached_q=…";
  e.no_identity = "it takes another step's queries; with the step's own it is dense attention of blocks";
  e.verified = {"formula", "bench"};
  return e;
}

}  // namespace heed::mechanisms
