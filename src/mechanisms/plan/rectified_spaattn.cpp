#include <algorithm>

#include "attention/maps.h"
#include "attention/scores.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Rectified SpaAttn (Liu et al., 2025): pooled weights, in which a block counts as often as it has tokens and text tokens
// stand for themselves, say which blocks a tile reads and what the rest would have weighed. What is read is scaled to its
// share, and blocks whose pooled products are worth more than their error pay in by their mean values. Text comes
// first here (the released code has it last, which bidirectional attention does not notice), so that with causality the first
// tokens of a language model can take its place; tiles then read their own block too: our extension.
struct RectifiedSpaAttn final : Mechanism {
  double remain;
  int block, topk, local;
  int64_t text;

  static std::vector<ParamInfo> params() {
    using M = RectifiedSpaAttn;
    return {
        param(&M::remain, "remain", 0.5, 0, 1,
              "share of a tile's pooled weight that is read, the crossing block included"),
        param(&M::topk, "topk", 1, 1, 1 << 20, "blocks that a tile reads at least, by weight"),
        param(&M::local, "local", 0, 0, 1 << 20,
              "blocks on either side of a tile's own that are read, its own among them"),
        param<M, int64_t>(&M::text, "text", 0, 0, 1 << 30,
                          "first tokens, which see all and are seen by all; whole blocks"),
        param(&M::block, "block", 128, 1, 4096, "queries and keys of a block"),
    };
  }
  std::string check() const override {
    return text % block ? "text=" + std::to_string(text) + " is no multiple of block=" + std::to_string(block) : "";
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = true;
    return n;
  }
  bool sparse(const LayerView& at) const { return at.mods.window == 0 && remain < 1; }

  Plan plan(LayerView& at) const override {
    // A sliding window already bounds what is read.
    if (!sparse(at)) return dense_plan(block, block);
    return chosen_blocks(at, Plan::Scope::QueryHead, block, block,
                         [&](const Slice& s) { return critical(at, s, weights(at, s)); });
  }

  Tensor edit(LayerView& at) const override {
    if (!sparse(at) || at.decoding() || at.phase == Phase::Replay) return at.out;
    Queue& queue = at.queue;
    const int64_t width = at.out.size[1];
    const Tensor out = queue.scratch.take(Dtype::F32, {at.out.size[0], width});
    queue.move(at.out, out);
    const Ragged q_spread = deviations(queue, at.q), k_spread = deviations(queue, at.k);
    each_slice(at, block, [&](const Slice& s) {
      const int64_t key = s.sequence * at.k.heads + s.kv_head, query = key * s.q.heads, blocks = (s.m + block - 1) / block;
      const Ragged q = pooled(queue, s.q, s.n, PoolKind::Mean, block), k = pooled(queue, s.k, s.m, PoolKind::Mean, block),
                   v = pooled(queue, segments(at.v, key, key + 1, 1), s.m, PoolKind::Mean, block),
                   q_off = pooled(queue, segments(q_spread, query, query + s.q.heads, s.q.heads), s.n, PoolKind::Mean, block),
                   k_off = pooled(queue, segments(k_spread, key, key + 1, 1), s.m, PoolKind::Mean, block);
      const auto products = [&](const Ragged& x, const Ragged& y) {
        const Grids each = grids(queue, s.q.heads, s.tiles, blocks);
        Proxy dot;
        dot.scale = 1, dot.causal = false;
        at.run().proxy(queue, x, y, dot, each);
        return abs(load(each.cells.values, index()));
      };
      // What is neither read nor lost: 1 where the block's mean pays in.
      const Ragged weight = weights(at, s), unread = critical(at, s, weight).rows;
      const Num reading = among(at, heads, floor_div(segment(), s.tiles) + s.kv_head * s.q.heads);
      const Num gained = products(q, k) > products(q_off, k) + products(q, k_off);
      compute(queue, unread, reading && load(unread.values, index()) == 0 && gained, unread.values);
      const Ragged mass = spread(queue, combine(queue, weight, unread, Combine::Multiply), {.of = Spread::Of::Sum});
      const Lists paying = chosen(queue, unread, flagged(), blocks);
      Plan plan = tokens_plan(queue, Plan::Scope::QueryHead, 1, paying.index, paying.count, blocks);
      plan.causal = false;
      Mods mods;
      mods.scale = at.mods.scale;
      mods.key_bias = compute(queue, Dtype::F32, {blocks}, log(tokens(s, place())));
      const Tensor means = queue.scratch.take(Dtype::F32, {s.q.heads * s.tiles, width});
      at.run().attend(queue, q, k, v, plan, mods, means, {});
      const Num all = load(mass.values, begin_of(mass, index()));
      const Tensor paid = compute(queue, Dtype::F32, {s.q.heads * s.tiles}, pick(load(paying.count, index()) > 0, all, 0));
      const Num tile = segment() * s.tiles + floor_div(place(), block), share = load(paid, tile);
      compute(queue, s.q, load(out, index()) + share * (load(means, tile * width + channel()) - load(out, index())), out);
    });
    return out;
  }

 private:
  Num tokens(const Slice& s, const Num& number) const { return min(block, s.m - number * block); }

  /// The pooled weights P of each tile, text as a whole in place 0.
  Ragged weights(LayerView& at, const Slice& s) const {
    Queue& queue = at.queue;
    const Ragged rows = rows_of(queue, mean_map(at, s, block, block, {}), visible_blocks(at, s, block, block));
    const int64_t first = std::min(text, s.m) / block;
    Num logit = load(rows.values, index()) + log(tokens(s, place()));
    if (first > 0) {
      const Ragged q = pooled(queue, s.q, s.n, PoolKind::Mean, block), keys = rows_between(queue, s.k, 0, first * block);
      Plan all;
      all.causal = false;
      Mods mods;
      mods.scale = at.mods.scale;
      RowStats stats;
      stats.lse = queue.scratch.take(Dtype::F32, {s.q.heads * s.tiles});
      at.run().observe_rows(queue, q, {.panel = &keys, .pages = nullptr, .read = nullptr}, &all, mods, stats);
      logit = pick(place() < first, pick(place() == 0, load(stats.lse, segment()), -kInfinity), logit);
    }
    compute(queue, rows, logit, rows.values);
    return softmax(queue, rows);
  }

  /// What each tile reads.
  BlockChoice critical(LayerView& at, const Slice& s, const Ragged& weight) const {
    Select most;
    most.by = Select::By::TopP, most.p = float(remain), most.at_least = topk;
    const int64_t first = s.m - s.n, rows = weight.segments(), texts = text / block;
    const Num tile = mod(index(), s.tiles) * block;
    const Tensor own = compute(at.queue, Dtype::I32, {rows}, floor_div(first + tile, block)),
                 last = compute(at.queue, Dtype::I32, {rows}, floor_div(first + min(tile + block, s.n) - 1, block));
    Num stays = place() < texts || load(own, segment()) < texts;
    if (at.plan.causal || local > 0)
      stays = stays || (place() >= load(own, segment()) - local && place() <= load(last, segment()) + local);
    return united(at.queue, weight, most, (s.m + block - 1) / block, stays);
  }

  /// |x − mean of its block| of every number.
  Ragged deviations(Queue& queue, const Ragged& x) const {
    const Ragged out = in_f32(queue, x);
    const Ragged mean = spread(queue, out, {.of = Spread::Of::Mean, .over = Spread::Over::Block, .block = block});
    compute(queue, out, abs(load(out.values, index()) - load(mean.values, index())), out.values);
    return out;
  }
};

}  // namespace

Entry rectified_spaattn() {
  Entry e = entry<RectifiedSpaAttn>("rectified_spaattn",
                                    "Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation",
                                    "Liu et al., 2025, arXiv 2511.19835", 2025, Role::Plan | Role::Edit);
  e.equation =
      "P ∝ |block| e^(mean q · mean k s); read the largest P until they hold `remain`; o = R o_read + Σ P_J "
      "mean(v_J) over unread J with |q·k| > |δq·k| + |q·δk|, R = 1 − Σ P_J";
  e.needs = "the whole prompt";
  e.identity = "rectified_spaattn(remain=1)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
