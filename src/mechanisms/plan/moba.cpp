#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// MoBA (Lu et al., 2025): each query of each head reads its own block and the blocks whose mean key it likes best, `topk`
// in all. Only blocks that begin no later than the query compete, so early queries read fewer.
struct Moba final : Mechanism {
  int block, topk;

  static std::vector<ParamInfo> params() {
    using M = Moba;
    return {
        param(&M::block, "block", 512, 1, 1 << 20, "keys of a block"),
        param(&M::topk, "topk", 3, 1, 1 << 20, "blocks that a query reads, its own among them"),
    };
  }

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = true;
    return n;
  }

  Plan plan(LayerView& at) const override {
    if (!at.plan.causal)
      throw Error(Code::Unsupported, "moba", "plans for causal attention only", "leave out --no-causal");
    const int64_t most = (longest_keys(at) + block - 1) / block, capacity = std::min<int64_t>(topk, most),
                  rows = plan_rows(at, 1);
    // A sliding window already bounds what is read.
    if (at.mods.window > 0 || capacity == most) return dense_plan(1, block);
    const Tensor index = at.queue.scratch.take(Dtype::I32, {rows * capacity}),
                 count = at.queue.scratch.take(Dtype::I32, {rows});
    const auto look = [&](const Slice& s) {
      const int64_t blocks = (s.m + block - 1) / block;
      const Ragged means = numbers(at.queue, std::vector<int64_t>(size_t(s.k.heads), blocks), s.k.heads, s.k.values.size[1]);
      at.run().pool(at.queue, s.k, PoolKind::Mean, block, means);
      Proxy gate;
      gate.scale = 1, gate.k_tile = block, gate.offset = s.m - s.n;
      const Grids scores = grids(at.queue, s.q.heads, s.n, blocks);
      at.run().proxy(at.queue, s.q, means, gate, scores);
      // The own block is the last that a query sees; it is read in any case.
      std::vector<int64_t> visible;
      for (int64_t i = 0; i < s.n; ++i) visible.push_back((s.m - s.n + i) / block + 1);
      const Ragged queries = force(at.queue, rows_of(at.queue, scores, visible), 0, 1);
      Select best;
      best.k = topk;
      const int64_t end = s.row + s.q.heads * s.tiles;
      at.run().select(at.queue, queries, best, capacity, index.slice(0, s.row * capacity, end * capacity),
                      count.slice(0, s.row, end));
    };
    each_slice(at, 1, look, Slices::Either);
    return tiled_blocks(at, block, index, count, capacity, most);
  }
};

}  // namespace

Entry moba() {
  Entry e = entry<Moba>("moba", "MoBA: Mixture of Block Attention for Long-Context LLMs",
                        "Lu et al., 2025, arXiv 2502.13189", 2025, uint8_t(Role::Plan));
  e.equation = "gate(i, J) = q_i · mean(k_J); read the own block and the best topk − 1 earlier ones";
  e.needs = "the whole prompt";
  e.identity = "moba(topk=1000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
