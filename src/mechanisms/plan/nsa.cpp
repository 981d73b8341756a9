#include <algorithm>

#include "attention/inputs.h"
#include "attention/maps.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Native Sparse Attention (Yuan et al., 2025): three attentions, each with a gate of its own: over compressed windows of keys,
// over the blocks that these windows weigh most, and over the latest keys. A block's score is what its windows weigh, each
// as often as it shares a stride with the block, summed over the group's heads; the first, the own and the block before it
// are among those read. Windows are compressed by their means unless the learned compression comes as an input, and
// the three share keys and values (the paper projects them anew for each).
struct Nsa final : Mechanism {
  int stride, block, topk;
  int64_t window;

  static std::vector<ParamInfo> params() {
    using M = Nsa;
    return {
        param(&M::topk, "topk", 16, 1, 1000000000, "blocks that a query reads, the first and the two latest among them"),
        param(&M::block, "block", 64, 1, 4096, "keys of a block"),
        param(&M::stride, "stride", 16, 1, 4096,
              "keys between compressed windows, which are twice as long; divides block"),
        param<M, int64_t>(&M::window, "window", 512, 1, 1 << 30, "latest keys of a query, its own among them"),
    };
  }
  std::string check() const override {
    return block % stride ? "stride=" + std::to_string(stride) + " does not divide block=" + std::to_string(block) : "";
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = n.same_entries = true;
    n.inputs = {"gates [h, n, 3]: of windows, blocks and latest keys",
                "compressed_k [g, ⌊m / stride⌋ − 1, d]: optional, instead of the windows' means",
                "compressed_v [g, ⌊m / stride⌋ − 1, d_v]: optional, likewise"};
    return n;
  }
  static int64_t windows(int64_t m, int64_t stride) { return std::max<int64_t>(1, m / stride - 1); }

  Ragged compressed(LayerView& at, const Ragged& x, const char* name) const {
    const int64_t m = at.key_rows[0], count = windows(m, stride), width = x.values.size[1];
    if (!is_given(at, name)) return window_means(at.queue, x, m, stride);
    return heads_of(at.queue, given(at, name, "[g, ⌊m / stride⌋ − 1, width]", {x.heads * count, width}), x.heads, count);
  }

  Plan plan(LayerView& at) const override {
    causal_only(at, "nsa");
    Queue& queue = at.queue;
    const int64_t m = at.key_rows[0], blocks = (m + block - 1) / block, capacity = std::min<int64_t>(blocks, topk),
                  ratio = block / stride, count = windows(m, stride);
    if (topk >= blocks) return dense_plan(1, block);
    const Ragged keys = compressed(at, at.k, "compressed_k");
    const Lists read = lists(queue, plan_rows(at, 1), capacity);
    each_slice(at, 1, [&](const Slice& s) {
      const Grids weights = window_weights(at, s, segments(keys, s.kv_head, s.kv_head + 1, 1), count, stride),
                  scores = grids(queue, 1, s.n, blocks);
      const Num i = floor_div(place(), blocks), j = mod(place(), blocks), own = floor_div(s.m - s.n + i, block);
      compute(queue, scores.cells, 0, scores.cells.values);
      for (int64_t u = -1; u < ratio; ++u) {
        const Num w = j * ratio + u;
        const double shared = u < 0 || u == ratio - 1 ? 1 : 2;  // strides of the window that lie in the block
        const Num more = pick(w >= 0 && w < count, shared * load(weights.cells.values, i * count + w), 0);
        compute(queue, scores.cells, load(scores.cells.values, index()) + more, scores.cells.values);
      }
      compute(queue, scores.cells, pick(j == 0 || j >= own - 1, kInfinity, load(scores.cells.values, index())),
              scores.cells.values);
      std::vector<int64_t> visible;
      for (int64_t r = 0; r < s.n; ++r) visible.push_back((s.m - s.n + r) / block + 1);
      Select best;
      best.k = topk;
      const Lists group = chosen(queue, rows_of(queue, scores, visible), best, capacity),
                  each = read.part(s.row, s.row + s.q.heads * s.n);
      compute(queue, load(group.index, mod(index(), s.n * capacity)), each.index);
      compute(queue, load(group.count, mod(index(), s.n)), each.count);
    });
    return tiled_blocks(at, block, read.index, read.count, capacity, blocks);
  }

  Tensor edit(LayerView& at) const override {
    Queue& queue = at.queue;
    const int64_t n = at.rows[0], m = at.key_rows[0], rows = at.out.size[0], width = at.out.size[1];
    const Tensor gates = given(at, "gates", "[h, n, 3]", {rows, 3}),
                 coarse = queue.scratch.take(Dtype::F32, {rows, width}),
                 latest = queue.scratch.take(Dtype::F32, {rows, width}),
                 out = queue.scratch.take(Dtype::F32, {rows, width});
    // A query sees the windows that end at or before it.
    Plan ended;
    ended.form = Plan::Form::Interval, ended.scope = Plan::Scope::Layer, ended.causal = false, ended.nnz_bound = n;
    ended.rowptr = compute(queue, Dtype::I64, {n + 1}, index());
    ended.index = compute(queue, Dtype::I32, {n, 2},
                          channel() * max(0, min(windows(m, stride), floor_div(m - n + place() + 1, stride) - 1)));
    Mods scaled;
    scaled.scale = at.mods.scale;
    at.run().attend(queue, at.q, compressed(at, at.k, "compressed_k"), compressed(at, at.v, "compressed_v"), ended,
                    scaled, coarse, {});
    Mods near = at.mods;
    near.window = window;
    at.run().attend(queue, at.q, at.k, at.v, Plan(), near, latest, {});
    const Num row = floor_div(index(), width), selected = load(at.out, index());
    const auto gate = [&](int64_t branch) { return load(gates, row * 3 + branch); };
    const Num mixed = gate(0) * load(coarse, index()) + gate(1) * selected + gate(2) * load(latest, index());
    compute(queue, at.q, pick(among(at, heads, segment()), mixed, selected), out);
    return out;
  }
};

}  // namespace

Entry nsa() {
  Entry e = entry<Nsa>("nsa", "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention",
                       "Yuan et al., 2025, arXiv 2502.11089", 2025, Role::Plan | Role::Edit);
  e.equation =
      "o = g₁ attention over compressed windows + g₂ attention over the top blocks by Σ of the windows' weights + "
      "g₃ attention over i − j < w";
  e.needs =
      "trained gates: --input gates=…; the learned compression, if it is not the mean: --input compressed_k=…, "
      "--input compressed_v=…";
  e.no_identity = "gates are inputs; with gates (0, 1, 0) and topk of all blocks it is dense";
  e.verified = {"formula", "bench"};
  return e;
}

}  // namespace heed::mechanisms
