#include <algorithm>

#include "attention/maps.h"
#include "attention/reads.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// HiP (Lee et al., 2024): a tile finds its keys as a tree search does. Blocks before its window are divided into as many
// chunks as it may keep blocks; each chunk is halved, one block of every half is scored, and the best halves go on until they
// are single blocks. Sinks and the window are read besides. A half is scored by the block at its centre, as in the
// released kernels of version 1.1 (the CPU reference takes the first); as in that reference chunks begin where an even
// division has them, without those kernels' rounding. A prompt only: the released decoding reuses a mask for some steps.
struct Hip final : Mechanism {
  int64_t topk, sinks, window;
  int q_block, k_block, q_stride, dense;
  Choice representative;

  static std::vector<ParamInfo> params() {
    using M = Hip;
    return {
        param<M, int64_t>(&M::topk, "topk", 512, 1, 1000000000, "keys found for a tile; a multiple of k_block"),
        param<M, int64_t>(&M::sinks, "sinks", 16, 0, 1 << 30, "first keys, which are always read"),
        param<M, int64_t>(&M::window, "window", 256, 1, 1 << 30, "latest keys of a query, which are always read"),
        param(&M::q_block, "q_block", 64, 1, 4096, "queries of a tile"),
        param(&M::k_block, "k_block", 2, 1, 4096, "keys of a block"),
        param(&M::q_stride, "q_stride", 2, 1, 4096, "every so many queries of a tile score"),
        param(&M::representative, "representative", {"center", "first"}, 0, "the block that stands for a half"),
        dense_layers_param<M>(&M::dense, 3),
    };
  }
  std::string check() const override {
    return topk % k_block ? "topk=" + std::to_string(topk) + " is no multiple of k_block=" + std::to_string(k_block) : "";
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = true;
    return n;
  }

  Plan plan(LayerView& at) const override {
    causal_only(at, "hip");
    if (reads_all(at, dense) || topk >= longest_keys(at)) return dense_plan(q_block, k_block);
    return chosen_blocks(at, Plan::Scope::QueryHead, q_block, k_block, [&](const Slice& s) -> BlockChoice {
      const Ragged rows = rows_of(at.queue, grids(at.queue, s.q.heads, s.tiles, (s.m + k_block - 1) / k_block),
                                  visible_blocks(at, s, q_block, k_block));
      const Lists found = search(at, s);
      const Num stays = place() < skipped() || place() >= skipped() + candidates(s, segment());
      compute(at.queue, rows, stays || found.has(segment(), place() - skipped()), rows.values);
      return {rows, flagged()};
    });
  }

  int64_t skipped() const { return (sinks + k_block - 1) / k_block; }
  /// Blocks behind the sinks that lie wholly before the windows of a tile's queries.
  Num candidates(const Slice& s, const Num& row) const {
    const Num first = s.m - s.n + mod(row, s.tiles) * q_block;
    return max(0, floor_div(first + 1 - window, k_block) - skipped());
  }

  /// For each tile of each head, up to topk / k_block of its candidates, ascending.
  Lists search(LayerView& at, const Slice& s) const {
    Queue& queue = at.queue;
    const int64_t rows = s.q.heads * s.tiles, chunks = topk / k_block,
                  most = std::max<int64_t>(1, (s.m - window) / k_block - skipped());
    const Ragged queries = sampled(queue, s);
    const Tensor start = queue.scratch.take(Dtype::I32, {rows, chunks}),
                 size = queue.scratch.take(Dtype::I32, {rows, chunks});
    const auto edge = [&](const Num& j) { return floor_div(j * candidates(s, place()), chunks); };
    compute(queue, edge(channel()), start);
    compute(queue, edge(channel() + 1) - edge(channel()), size);
    const Lists halves = lists(queue, rows, chunks);
    int64_t longest = (most + chunks - 1) / chunks;
    do {
      const Scratch scratch(queue.scratch);
      const Tensor begin = queue.scratch.take(Dtype::I32, {rows, 2 * chunks}),
                   width = queue.scratch.take(Dtype::I32, {rows, 2 * chunks});
      const Num chunk = floor_div(index(), 2), left = floor_div(load(size, chunk), 2), right = mod(channel(), 2);
      compute(queue, load(start, chunk) + right * left, begin);
      compute(queue, pick(right, load(size, chunk) - left, left), width);
      choose(queue, scored(queue, s, queries, begin, width), best(chunks), halves);
      const Num taken = place() * (2 * chunks) + load(halves.index, index());
      compute(queue, load(begin, taken), start);
      compute(queue, pick(channel() < load(halves.count, place()), load(width, taken), 0), size);
      longest = (longest + 1) / 2;
    } while (longest > 1);
    return {start.reshape({rows * chunks}), halves.count, chunks};
  }

  /// Queries of a tile that score.
  int64_t scoring() const { return (q_block + q_stride - 1) / q_stride; }
  /// `length` rows for each tile of each head.
  static Ragged each_tile(Queue& queue, const Slice& s, int64_t length) {
    return numbers(queue, std::vector<int64_t>(size_t(s.q.heads * s.tiles), length), s.q.heads * s.tiles);
  }
  static Select best(int64_t count) {
    Select out;
    out.k = count;
    return out;
  }

  Ragged sampled(Queue& queue, const Slice& s) const {
    const Num tile = mod(segment(), s.tiles) * q_block;
    const Num query = min(min(tile + place() * q_stride + q_stride - 1, tile + q_block - 1), s.n - 1);
    return picked_rows(queue, s.q, begin_of(s.q, floor_div(segment(), s.tiles)) + query, each_tile(queue, s, scoring()));
  }

  /// The largest product of a tile's sampled queries with the keys of the block that stands for each half; −∞ for none.
  Ragged scored(Queue& queue, const Slice& s, const Ragged& queries, const Tensor& begin, const Tensor& width) const {
    const int64_t rows = begin.size[0], halves = begin.size[1];
    const Num half = segment() * halves + floor_div(place(), k_block);
    const Num centre = representative.value ? Num(0) : floor_div(load(width, half), 2);
    const Num key = (skipped() + load(begin, half) + centre) * k_block + mod(place(), k_block);
    const Ragged keys = picked_rows(queue, s.k, begin_of(s.k, 0) + min(key, s.m - 1), each_tile(queue, s, halves * k_block));
    const Grids products = grids(queue, rows, scoring(), halves * k_block), most = grids(queue, rows, 1, halves);
    Proxy dot;
    dot.scale = 1, dot.causal = false;
    queue.run->proxy(queue, queries, keys, dot, products);
    Reduce by;
    by.kind = ReduceKind::Max, by.row_block = int(scoring()), by.col_block = k_block;
    queue.run->reduce(queue, products, by, most);
    compute(queue, pick(load(width, index()) > 0, load(most.cells.values, index()), -kInfinity), most.cells.values);
    return most.cells;
  }
};

}  // namespace

Entry hip() {
  Entry e = entry<Hip>(
      "hip",
      "A Training-Free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned Attention",
      "Lee et al., 2024, arXiv 2406.09827", 2024, uint8_t(Role::Plan));
  e.equation =
      "halve each of k / b chunks of blocks, keep the k / b halves of largest max q·k(centre block), until they are "
      "single blocks; sinks and window besides";
  e.needs = "the whole prompt";
  e.identity = "hip(topk=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
