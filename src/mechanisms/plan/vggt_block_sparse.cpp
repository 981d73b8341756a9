#include <algorithm>

#include "attention/maps.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Block-sparse global attention for VGGT (Wang et al., 2025): mean queries and keys foretell a tile's masses, and it
// reads the blocks that hold `cdf` of them, but no fewer than a share of all. Special tokens, the first of each frame,
// see all and are seen by all. Here tokens keep their order, so a tile or block that holds a special token is treated
// as one.
struct VggtBlockSparse final : Mechanism {
  int q_block, k_block;
  int64_t special, frame;
  double cdf, sparse_ratio;

  static std::vector<ParamInfo> params() {
    using M = VggtBlockSparse;
    return {
        param(&M::cdf, "cdf", 0.97, 0, 1, "share of a tile's estimated mass that is read"),
        param(&M::sparse_ratio, "sparse_ratio", 0.1, 0, 1, "share of all key blocks that a tile may leave out"),
        param<M, int64_t>(&M::special, "special", 5, 0, 1 << 20, "special tokens at the beginning of each frame"),
        param<M, int64_t>(&M::frame, "frame", 0, 0, 1 << 30, "tokens of a frame; 0: all are of one"),
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
    if (at.mods.window > 0 || sparse_ratio <= 0) return dense_plan(q_block, k_block);
    return chosen_blocks(at, Plan::Scope::QueryHead, q_block, k_block, [&](const Slice& s) {
      const int64_t blocks = (s.m + k_block - 1) / k_block;
      Proxy mean;
      mean.softmax = true;
      const Ragged rows = rows_of(at.queue, mean_map(at, s, q_block, k_block, mean), visible_blocks(at, s, q_block, k_block));
      Select most;
      most.by = Select::By::TopP, most.p = float(cdf + 1e-5), most.crossing = false;
      most.at_least = std::max<int64_t>(1, int64_t(double(blocks) * (1 - sparse_ratio)));
      const Num tile = s.m - s.n + mod(index(), s.tiles) * q_block;
      const Tensor whole = compute(at.queue, Dtype::I32, {rows.segments()}, has_special(tile, min(tile + q_block, s.m))),
                   marked = compute(at.queue, Dtype::I32, {blocks}, has_special(index() * k_block, (index() + 1) * k_block));
      return united(at.queue, rows, most, blocks, load(whole, segment()) || load(marked, place()));
    });
  }

  /// Whether one of tokens first … end − 1 is among the first of its frame.
  Num has_special(const Num& first, const Num& end) const {
    const int64_t length = frame > 0 ? frame : int64_t(1) << 40;
    return Num(special > 0) && (mod(first, length) < special || floor_div(end - 1, length) > floor_div(first, length));
  }
};

}  // namespace

Entry vggt_block_sparse() {
  Entry e = entry<VggtBlockSparse>("vggt_block_sparse", "Faster VGGT with Block-Sparse Global Attention",
                                   "Wang et al., 2025, arXiv 2509.07120", 2025, uint8_t(Role::Plan));
  e.equation =
      "P = softmax(mean q · mean k s); read the max(#(Σ P ≤ cdf), ⌊n (1 − ratio)⌋) largest, and special tokens";
  e.needs = "the whole prompt";
  e.identity = "vggt_block_sparse(sparse_ratio=0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
