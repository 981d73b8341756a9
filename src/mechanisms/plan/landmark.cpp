#include <algorithm>

#include "attention/maps.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Landmark Attention (Mohtashami and Jaggi, 2023): the last token of each block is a landmark. What a query pays the landmarks
// of earlier blocks, beside the tokens of its own, it pays in those blocks, each divided by a softmax of its own. As logits
// that is a bias for a block: its landmark's less the log of its tokens' sum. Only the blocks of best landmarks are read.
// A model must have been trained with landmarks in the text; positions are as they come.
struct Landmark final : Mechanism {
  int block, topk;

  static std::vector<ParamInfo> params() {
    using M = Landmark;
    return {
        param(&M::block, "block", 64, 2, 1 << 16, "tokens of a block, its landmark among them"),
        param(&M::topk, "topk", 5, 0, 1000000000, "earlier blocks that a query reads"),
    };
  }
  std::string check() const override {
    return heads.all() ? "" : "a landmark is hidden from all heads: leave out heads";
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = n.same_entries = true;
    return n;
  }

  Plan plan(LayerView& at) const override {
    causal_only(at, "landmark");
    Queue& queue = at.queue;
    const int64_t blocks = (longest_keys(at) + block - 1) / block, rows = at.q.values.size[0],
                  keys = at.k.values.size[0], capacity = std::min<int64_t>(blocks, int64_t(topk) + 1);
    const Num bias = at.mods.key_bias ? load(at.mods.key_bias, index()) : Num(0);
    const Tensor hidden = queue.scratch.take(Dtype::F32, {keys}),
                 row_factor = queue.scratch.take(Dtype::F32, {rows, blocks}),
                 key_factor = queue.scratch.take(Dtype::F32, {keys, blocks});
    compute(queue, at.k, pick(mod(place(), block) == block - 1, -kInfinity, bias), hidden);
    compute(queue, at.k, floor_div(place(), block) == channel(), key_factor);
    const Lists read = lists(queue, plan_rows(at, 1), capacity);
    each_slice(at, 1, [&](const Slice& s) {
      const Blocks of = paid(at, s);
      const int64_t there = (s.m + block - 1) / block;
      const Num cell = segment() * (s.n * there) + place() * there + min(channel(), there - 1);
      const Num own = floor_div(s.m - s.n + place(), block);
      compute(queue, s.q, pick(channel() < own, load(of.landmark.cells.values, cell) - load(of.lse.cells.values, cell), 0),
              row_factor);
      std::vector<int64_t> visible;
      for (int64_t i = 0; i < s.n; ++i) visible.push_back((s.m - s.n + i) / block + 1);
      Select best;
      best.k = capacity;
      choose(queue, force(queue, rows_of(queue, of.landmark, visible), 0, 1), best,
             read.part(s.row, s.row + s.q.heads * s.n));
    });
    at.mods.key_bias = hidden, at.mods.row_factor = row_factor, at.mods.key_factor = key_factor;
    return tiled_blocks(at, block, read.index, read.count, capacity, blocks);
  }

  /// For each query and block, the logit of its landmark and the log of the sum of its tokens' weights.
  struct Blocks {
    Grids landmark, lse;
  };
  Blocks paid(LayerView& at, const Slice& s) const {
    Queue& queue = at.queue;
    const int64_t blocks = (s.m + block - 1) / block;
    Proxy exact;
    exact.scale = at.mods.scale, exact.softcap = at.mods.softcap, exact.offset = s.m - s.n;
    const auto map = [&](ReduceKind kind, const ScoreFormula& make) {
      return block_map(queue, s.q, s.n, s.k, s.m, exact, kind, 1, block, make);
    };
    const Grids most = map(ReduceKind::Max, {}),
                lse = map(ReduceKind::Sum, [&](const Num& x, const Num& i, const Num& j) {
                  const Num top = load(most.cells.values, segment() * (s.n * blocks) + i * blocks + floor_div(j, block));
                  return pick(mod(j, block) == block - 1, 0, exp(x - top));
                });
    const Tensor& sum = lse.cells.values;
    compute(queue, log(max(load(sum, index()), 1e-37)) + load(most.cells.values, index()), sum);
    const Ragged keys = picked_rows(queue, s.k, begin_of(s.k, 0) + min((place() + 1) * block, s.m) - 1,
                                    numbers(queue, std::span(&blocks, 1), 1));
    const Grids landmark = grids(queue, s.q.heads, s.n, blocks);
    exact.k_tile = block, exact.offset -= block - 1;  // a block's last token is its landmark
    at.run().proxy(queue, s.q, keys, exact, landmark);
    return {landmark, lse};
  }
};

}  // namespace

Entry landmark() {
  Entry e = entry<Landmark>("landmark", "Landmark Attention: Random-Access Infinite Context Length for Transformers",
                            "Mohtashami and Jaggi, 2023, arXiv 2305.16300", 2023, uint8_t(Role::Plan));
  e.equation =
      "p = softmax over own tokens and landmarks of earlier blocks; a token of block b weighs p(landmark_b) "
      "softmax_b(q·k s)";
  e.needs = "a model trained with landmark tokens; the whole prompt, the same entries in all heads";
  e.no_identity =
      "landmarks carry no value; where each landmark's logit is the log-sum-exp of its block, the rest is dense";
  e.verified = {"formula", "bench"};
  return e;
}

}  // namespace heed::mechanisms
