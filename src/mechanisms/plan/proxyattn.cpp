#include <algorithm>
#include <cmath>

#include "attention/maps.h"
#include "attention/scores.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// ProxyAttn (Wang et al., 2025): one map of attention, made from the mean of many heads and every few tokens, orders the
// blocks for all these heads; how many of them a head reads, its own last queries say. The largest weight stands for a
// block, so that a single key is not averaged away. First and own block are read in any case.
struct ProxyAttn final : Mechanism {
  double gamma;
  int proxies, stride, block;
  int64_t min_budget;

  static std::vector<ParamInfo> params() {
    using M = ProxyAttn;
    return {
        param(&M::gamma, "gamma", 0.95, 0, 1, "share of its last queries' mass for which a head is granted blocks"),
        param(&M::proxies, "proxies", 1, 1, 4096, "groups of heads with a map of their own; divides the KV heads"),
        param(&M::stride, "stride", 4, 1, 128, "every so many queries and keys are looked at; divides block"),
        param(&M::block, "block", 128, 1, 1 << 16, "queries and keys of a block"),
        param<M, int64_t>(&M::min_budget, "min_budget", 2048, 0, 1000000000, "tokens that a tile reads at least"),
    };
  }
  std::string check() const override {
    return block % stride ? "stride=" + std::to_string(stride) + " does not divide block=" + std::to_string(block) : "";
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = n.same_entries = true;
    return n;
  }

  Plan plan(LayerView& at) const override {
    causal_only(at, "proxyattn");
    const int64_t g = at.k.heads;
    if (g % proxies != 0)
      throw Error(Code::Invalid, "proxyattn",
                  "proxies=" + std::to_string(proxies) + " does not divide " + std::to_string(g) + " KV heads");
    // A sliding window already bounds what is read.
    if (at.mods.window > 0 || gamma >= 1) return dense_plan(block, block);
    std::vector<Grids> maps;  // sequence by sequence, proxy by proxy
    for (int64_t s = 0; s < at.sequences(); ++s)
      for (int64_t p = 0; p < proxies; ++p) maps.push_back(proxy_map(at, s, p));
    const auto choose = [&](const Slice& s) -> BlockChoice {
      const Grids& map = maps[size_t(s.sequence * proxies + s.kv_head * proxies / g)];
      const Grids each = grids(at.queue, s.q.heads, s.tiles, (s.m + block - 1) / block);
      compute(at.queue, each.cells, load(map.cells.values, place()), each.cells.values);
      const Ragged rows = rows_of(at.queue, each, visible_blocks(at, s, block, block));
      const Num stays = place() == 0 || own_block(s, block, block);
      compute(at.queue, rows, pick(stays, kInfinity, load(rows.values, index())), rows.values);
      Select best;
      best.count = counts(at, s, rows);
      return {rows, best};
    };
    return chosen_blocks(at, Plan::Scope::QueryHead, block, block, choose, proxies == 1 ? Slices::Either : Slices::KvHead);
  }

  /// For each tile, ⌈b N⌉ of its N blocks: b the share of all blocks that hold gamma of what the head's last block of
  /// queries pays.
  Tensor counts(LayerView& at, const Slice& s, const Ragged& rows) const {
    const int64_t blocks = (s.m + block - 1) / block;
    const Grids mass = grids(at.queue, s.q.heads, 1, blocks);
    Reduce sum;
    sum.col_block = block;
    at.run().reduce(at.queue, last_rows_pay(at, s, block).columns, sum, mass);
    Select most;
    most.by = Select::By::TopP, most.p = float(gamma), most.at_least = 1;
    const Tensor held = chosen(at.queue, mass.cells, most, blocks).count;
    const Num share = load(held, floor_div(index(), s.tiles)) * length_of(rows, index());
    return compute(at.queue, Dtype::I32, {rows.segments()}, max(ceil_div(share, blocks), ceil_div(min_budget, block)));
  }

  /// The largest weight in each block of the proxy's map, softmax of every stride-th query over every stride-th key.
  Grids proxy_map(LayerView& at, int64_t s, int64_t p) const {
    Queue& queue = at.queue;
    const int64_t h = at.q.heads, g = at.k.heads, n = at.rows[size_t(s)], m = at.key_rows[size_t(s * g)];
    const auto groups = [&](int64_t length, int64_t size) { return (length + size - 1) / size; };
    const Grids out = grids(queue, 1, groups(n, block), groups(m, block));
    if (n == 0) return out;
    const Scratch scratch(queue.scratch);
    auto mean = [&](const Ragged& x, int64_t heads, int64_t length) {
      const int64_t count = heads / proxies, first = s * heads + p * count;
      const Ragged sampled = pooled(queue, segments(x, first, first + count, count), length, PoolKind::First, stride);
      return segments(spread(queue, sampled, {.of = Spread::Of::Mean, .over = Spread::Over::Heads}), 0, 1, 1);
    };
    const Grids weights = grids(queue, 1, groups(n, stride), groups(m, stride));
    Proxy exact;
    exact.scale = at.mods.scale, exact.softmax = true, exact.q_tile = exact.k_tile = stride;
    exact.offset = m - n - (stride - 1);  // a sampled query is the first of its tile
    queue.run->proxy(queue, mean(at.q, h, n), mean(at.k, g, m), exact, weights);
    Reduce most;
    most.kind = ReduceKind::Max, most.row_block = most.col_block = block / stride;
    queue.run->reduce(queue, weights, most, out);
    return out;
  }
};

}  // namespace

Entry proxyattn() {
  Entry e = entry<ProxyAttn>("proxyattn", "ProxyAttn: Guided Sparse Attention via Representative Heads",
                             "Wang et al., 2025, arXiv 2509.24745", 2025, uint8_t(Role::Plan));
  e.equation =
      "A[I, J] = max of softmax(mean_h q · mean_h k s) over every 4th token; a head reads its top ⌈b N⌉, b the "
      "share of blocks that hold γ of its last queries' mass";
  e.needs = "the whole prompt, the same entries in all heads";
  e.identity = "proxyattn(gamma=1)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
