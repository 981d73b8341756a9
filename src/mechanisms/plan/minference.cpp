#include <algorithm>

#include "attention/maps.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// MInference (Jiang et al., 2024): each query head has one of three patterns. Vertical-slash: the keys and the distances
// that the last queries pay most; tiles read what any query of theirs would. Block-sparse: the blocks of highest mean
// score. A-shape: sinks and a window. Which heads have which is given; the published files come from a search on one text.
struct MInference final : Mechanism {
  Choice pattern;
  Range streams, blocks;
  int64_t columns, slashes, sinks, local;
  int last, block, topk;

  static std::vector<ParamInfo> params() {
    using M = MInference;
    const char* numbers = "query heads by number, layer · h + head; none if empty";
    return {
        param(&M::pattern, "pattern", {"vertical-slash", "block-sparse", "a-shape"}, 0, "of all heads not named below"),
        param(&M::streams, "streams", "range", "", "0-3, 2-, [0,4-7], last", numbers),
        param(&M::blocks, "blocks", "range", "", "0-3, 2-, [0,4-7], last", numbers),
        param<M, int64_t>(&M::columns, "columns", 1000, 30, 1000000000, "vertical-slash: keys, the first 30 among them"),
        param<M, int64_t>(&M::slashes, "slashes", 6096, 50, 1000000000,
                          "vertical-slash: distances, the nearest 100 among them"),
        param(&M::last, "last", 64, 1, 1 << 20, "vertical-slash: queries that are looked at"),
        param<M, int64_t>(&M::sinks, "sinks", 100, 0, 1 << 30, "a-shape: first keys"),
        param<M, int64_t>(&M::local, "local", 800, 1, 1 << 30, "a-shape: latest keys"),
        param(&M::topk, "topk", 100, 1, 1 << 20, "block-sparse: blocks of a row, the query's own among them"),
        param(&M::block, "block", 64, 1, 4096, "queries and keys of a block, queries of a tile"),
    };
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = true;
    return n;
  }

  enum Kind : int { VerticalSlash, BlockSparse, AShape };
  std::vector<int32_t> patterns(const ModelInfo& model, int layer) const {
    std::vector<int32_t> out;
    for (int i = layer * model.h; i < (layer + 1) * model.h; ++i) {
      const auto named = [&](const Range& r) { return !r.all() && r.holds(i, model.layers * model.h); };
      out.push_back(named(blocks) ? BlockSparse : named(streams) ? AShape : pattern.value);
    }
    return out;
  }

  Plan plan(LayerView& at) const override {
    causal_only(at, "minference");
    if (at.mods.window > 0) return dense_plan(block, block);  // a sliding window already bounds what is read
    const std::vector<int32_t> of = patterns(at.model, at.layer);
    const auto has = [&](Kind kind) { return std::find(of.begin(), of.end(), kind) != of.end(); };
    if (!has(VerticalSlash) && !has(AShape))
      return chosen_blocks(
          at, Plan::Scope::QueryHead, block, block, [&](const Slice& s) { return best_blocks(at, s); }, Slices::Either);
    Queue& queue = at.queue;
    const int64_t heads = at.q.segments(), longest = longest_keys(at);
    const Tensor kinds = queue.upload(of);
    const auto is = [&](Kind kind, const Num& head) { return load(kinds, head) == int(kind); };
    const Num own = mod(index(), at.q.heads);
    KeySets read;
    read.tile = read.block = block;
    if (has(AShape)) {
      read.sinks = compute(queue, Dtype::I32, {heads}, pick(is(AShape, own), sinks, 0));
      read.local = compute(queue, Dtype::I32, {heads}, pick(is(AShape, own), local, 0));
    }
    Lists keys, distances, best;
    if (has(VerticalSlash))
      keys = lists(queue, heads, std::min(columns, longest)), distances = lists(queue, heads, std::min(slashes, longest));
    if (has(BlockSparse))
      best = lists(queue, plan_rows(at, block), std::min<int64_t>(topk, (longest + block - 1) / block));
    const auto look = [&](const Slice& s) {
      const int64_t first = s.sequence * at.q.heads + s.kv_head * s.q.heads, end = first + s.q.heads;
      if (has(BlockSparse)) {
        const BlockChoice blocks = best_blocks(at, s);
        const Lists chosen = best.part(s.row, s.row + blocks.rows.segments());
        choose(queue, blocks.rows, blocks.how, chosen);
        const Num head = s.kv_head * s.q.heads + floor_div(index(), s.tiles);
        compute(queue, pick(is(BlockSparse, head), load(chosen.count, index()), 0), chosen.count);
      }
      if (!has(VerticalSlash)) return;
      const LastRows pay = last_rows_pay(at, s, last);
      Select most;
      most.k = columns;
      choose(queue, force(queue, pay.columns.cells, 30, 0), most, keys.part(first, end));
      most.k = slashes;
      choose(queue, force(queue, pay.diagonals.cells, 100, 0), most, distances.part(first, end));
    };
    each_slice(at, block, look, Slices::Either);
    // Of heads with other patterns nothing of it is read.
    if (has(VerticalSlash)) {
      for (const Tensor& count : {keys.count, distances.count})
        compute(queue, pick(is(VerticalSlash, own), load(count, index()), 0), count);
      read.keys = keys, read.distances = distances;
    }
    if (has(BlockSparse)) read.blocks = best;
    return united_keys(at, read, std::max(columns + slashes, int64_t(topk)) + 2);
  }

  /// The query's own block is among them: as released it competes, and a query may be left without a key.
  BlockChoice best_blocks(LayerView& at, const Slice& s) const {
    Proxy plain;
    plain.scale = 1;
    const Ragged rows = rows_of(at.queue, mean_map(at, s, block, block, plain), visible_blocks(at, s, block, block));
    compute(at.queue, rows, pick(own_block(s, block, block), kInfinity, load(rows.values, index())), rows.values);
    Select best;
    best.k = topk;
    return {rows, best};
  }
};

}  // namespace

Entry minference() {
  Entry e = entry<MInference>(
      "minference", "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
      "Jiang et al., 2024, arXiv 2407.02490", 2024, uint8_t(Role::Plan));
  e.equation =
      "vertical-slash: j ∈ top-nV of Σ_i P_ij or i − j ∈ top-nS of Σ_{i−j=o} P_ij over the last 64 rows; "
      "block-sparse: top-k of mean q · mean k; a-shape: j < sinks or i − j < local";
  e.needs = "the whole prompt, and which heads have which pattern";
  e.identity = "minference(columns=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
