#include <algorithm>
#include <bit>
#include <cmath>

#include "attention/maps.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// XAttention (Xu et al., 2025): sums along the antidiagonals of stride × stride tiles stand for the scores of a block. The
// paper's rule holds for every chunk: block 0 and the diagonal stay, and blocks join in order of their mass while what is
// in holds less than `threshold` of the row, the crossing one included. As released, the mass of block 0 is not counted
// beforehand in the first chunk (16384 tokens of a prompt, and fewer the longer it is) and the test there lags by one
// block, so that one more is read; what the code leaves out it writes as block 0, which is therefore read as well.
struct XAttention final : Mechanism {
  int stride, block;
  double threshold;
  bool as_released;

  static std::vector<ParamInfo> params() {
    using M = XAttention;
    return {
        param(&M::stride, "stride", 8, 1, 128, "side of the tiles whose antidiagonals are summed; divides block"),
        param(&M::threshold, "threshold", 0.9, 0, 1, "share of a row's estimated mass that is read"),
        param(&M::block, "block", 128, 1, 1 << 16, "queries and keys of a block"),
        param(&M::as_released, "as_released", false,
              "the released code's first chunk: block 0 competes and is read in any case, and so is one block more"),
    };
  }
  std::string check() const override {
    return block % stride ? "stride=" + std::to_string(stride) + " does not divide block=" + std::to_string(block) : "";
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = true;
    return n;
  }

  Plan plan(LayerView& at) const override {
    // A sliding window already bounds what is read.
    if (at.mods.window > 0 || threshold >= 1) return dense_plan(block, block);
    const int64_t capacity = (longest_keys(at) + block - 1) / block, all = plan_rows(at, block);
    const Tensor listed = at.queue.scratch.take(Dtype::I32, {all * capacity}),
                 count = at.queue.scratch.take(Dtype::I32, {all});
    const bool causal = at.plan.causal;
    const auto look = [&](const Slice& s) {
      const Grids mass = block_mass(at, s);
      const int64_t before = s.m - s.n;
      std::vector<int64_t> visible;
      for (int64_t t = 0; t < s.tiles; ++t)
        visible.push_back(((causal ? before + std::min((t + 1) * block, s.n) : s.m) - 1) / block + 1);
      const Ragged rows = rows_of(at.queue, mass, visible);
      // Block 0 and the diagonal leave the competition; their mass counts. A tile behind an earlier text may straddle two.
      const int64_t all_rows = rows.segments();
      const Num r = index(), tile = mod(r, s.tiles);
      const Tensor own = compute(at.queue, Dtype::I32, {all_rows}, floor_div(before + tile * block, block));
      const Tensor last = compute(at.queue, Dtype::I32, {all_rows},
                                  floor_div(before + min((tile + 1) * block, s.n) - 1, block));
      const Tensor first = compute(at.queue, Dtype::I32, {all_rows}, pick(released(s, tile), -1, 0));  // −1: block 0 competes
      const auto mass_of = [&](const Tensor& block) {
        const Num x = load(rows.values, begin_of(rows, r) + load(block, r));
        return pick(load(block, r) >= 0 && x > -kInfinity, x, 0);
      };
      const auto differ = [&](const Tensor& a, const Tensor& b) { return 1 - (load(a, r) == load(b, r)); };
      const Tensor early = compute(at.queue, Dtype::F32, {all_rows}, mass_of(first) + differ(own, first) * mass_of(own));
      Select most;
      most.by = Select::By::TopP, most.p = float(threshold);
      most.held = compute(at.queue, Dtype::F32, {all_rows}, load(early, r) + differ(last, own) * mass_of(last));
      const Num j = place(), x = load(rows.values, index());
      const Num forced = j == load(first, segment()) || (j >= load(own, segment()) && j <= load(last, segment()));
      compute(at.queue, rows, pick(forced && x > -kInfinity, kInfinity, x), rows.values);
      const int64_t end = s.row + s.q.heads * s.tiles;
      const Tensor blocks = listed.slice(0, s.row * capacity, end * capacity), taken = count.slice(0, s.row, end);
      at.run().select(at.queue, rows, most, capacity, blocks, taken);
      if (!as_released) return;
      const Lists read{blocks, taken, capacity};
      Select more;
      more.count = compute(at.queue, Dtype::I32, {all_rows}, load(taken, r) + released(s, tile));
      choose(at.queue, rows, more, read);
      compute(at.queue, load(taken, r) + (read.has(r, 0) == 0), more.count);
      compute(at.queue, rows, pick(place() == 0, kInfinity, load(rows.values, index())), rows.values);
      choose(at.queue, rows, more, read);
    };
    each_slice(at, block, look, Slices::Either);
    return blocks_plan(at.queue, Plan::Scope::QueryHead, block, block, listed, count, capacity);
  }

  /// Whether a tile lies in the first chunk of the released code, which has one where nothing comes before the queries:
  /// 16384 tokens, or 2^28 / P of a longer text, P the power of 2 that holds it.
  Num released(const Slice& s, const Num& tile) const {
    const int64_t first = std::clamp<int64_t>((int64_t(1) << 28) / int64_t(std::bit_ceil(uint64_t(s.m))), 2048, 16384);
    return as_released && s.m == s.n ? tile * block < first : Num(0);
  }

  // Softmax over groups of `stride` keys of the antidiagonal sums, summed to blocks.
  Grids block_mass(LayerView& at, const Slice& s) const {
    const int64_t d = s.k.values.size[1], q_groups = (s.n + stride - 1) / stride, k_groups = (s.m + stride - 1) / stride;
    // As wide as the keys are: attention itself rounds queries to that.
    const Dtype type = s.k.values.type == Dtype::BF16 ? Dtype::BF16 : Dtype::F32;
    const auto rows = [&](const Ragged& x, int64_t groups, PoolKind kind) {
      const std::vector<int64_t> lengths(size_t(x.segments()), groups);
      Ragged out = numbers(at.queue, lengths, x.heads);
      out.values = at.queue.scratch.take(type, {out.bound, stride * d});
      at.run().pool(at.queue, x, kind, stride, out);
      return out;
    };
    Proxy anti;
    anti.scale = at.scale() / float(stride);
    anti.softmax = true, anti.causal = at.plan.causal;
    anti.q_tile = anti.k_tile = stride;
    anti.offset = s.m - s.n;
    const Ragged q = rows(s.q, q_groups, PoolKind::ConcatReversed), k = rows(s.k, k_groups, PoolKind::Concat);
    return block_map(at.queue, q, q_groups, k, k_groups, anti, ReduceKind::Sum, block / stride, block / stride);
  }
};

}  // namespace

Entry xattention() {
  Entry e = entry<XAttention>("xattention", "XAttention: Block Sparse Attention with Antidiagonal Scoring",
                              "Xu et al., 2025, arXiv 2503.16428", 2025, uint8_t(Role::Plan));
  e.equation =
      "M[I, J] = Σ softmax_c(Σ_u q_{aS+S−1−u} · k_{cS+u} s / S); read the largest M of a row until they hold τ of it";
  e.needs = "the whole prompt";
  e.identity = "xattention(threshold=1)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
