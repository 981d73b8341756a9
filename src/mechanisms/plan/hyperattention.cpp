#include <algorithm>
#include <cmath>
#include <numeric>

#include "attention/inputs.h"
#include "attention/maps.h"
#include "attention/patterns.h"
#include "base/random.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// HyperAttention (Han et al., 2023): queries and keys are sorted by which sides of a few random planes they lie on, each block
// of queries reads the block of keys at its place in that order, and a uniform sample stands for all others. A causal text is
// halved until its parts are short and exact; what the later half pays the earlier one is estimated so. Codes are in Gray
// order, so that neighbours differ in one plane (the released code has the map the wrong way round), samples are drawn
// without repetition, one inside the own block is masked, and nothing is padded.
struct HyperAttention final : Mechanism {
  int64_t min_len, block, sample, seed;
  int planes;

  static std::vector<ParamInfo> params() {
    using M = HyperAttention;
    return {
        param<M, int64_t>(&M::min_len, "min_len", 4096, 1, 1000000000,
                          "parts of the text no longer than this are exact"),
        param<M, int64_t>(&M::block, "block", 256, 1, 1000000000, "keys of a block in sorted order"),
        param<M, int64_t>(&M::sample, "sample", 256, 1, 1000000000, "keys that stand for those outside the block"),
        param(&M::planes, "planes", 7, 1, 12, "random planes that sort"),
        param<M, int64_t>(&M::seed, "seed", 0, 0, 1000000000, "of planes and samples"),
    };
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = true;
    return n;
  }

  /// Queries and keys between which weights are estimated, by key numbers.
  struct Pair {
    int64_t q_begin, q_end, k_begin, k_end;
  };
  /// For each depth of halving, the pairs of a text of m tokens.
  void halve(int64_t begin, int64_t end, size_t depth, std::vector<std::vector<Pair>>& pairs) const {
    if (end - begin <= min_len) return;
    const int64_t middle = begin + (end - begin + 1) / 2;
    if (pairs.size() <= depth) pairs.resize(depth + 1);
    pairs[depth].push_back({middle, end, begin, middle});
    halve(begin, middle, depth + 1, pairs), halve(middle, end, depth + 1, pairs);
  }
  std::vector<std::vector<Pair>> pairs_of(int64_t m, bool causal) const {
    std::vector<std::vector<Pair>> pairs;
    if (causal) halve(0, m, 0, pairs);
    else pairs = {{{0, m, 0, m}}};
    return pairs;
  }
  bool estimates(const LayerView& at) const {
    // A sliding window already bounds what is read.
    return at.mods.window == 0 && longest_keys(at) >= min_len + at.plan.causal;
  }

  /// The exact parts: of a causal text its last halves, of others nothing.
  Plan plan(LayerView& at) const override {
    if (!estimates(at)) return dense_plan(64, 64);
    if (!at.plan.causal) return replaced(at, heads, 64, 64);
    return pattern_plan(at, [this](int64_t i, int64_t m, const AddKeys& add) {
      int64_t begin = 0, end = m;
      while (end - begin > min_len) {
        const int64_t middle = begin + (end - begin + 1) / 2;
        (i < middle ? end : begin) = middle;
      }
      add(begin, i + 1);
    });
  }

  Tensor edit(LayerView& at) const override {
    if (at.decoding() || at.phase == Phase::Replay || !estimates(at)) return at.out;
    Queue& queue = at.queue;
    const int64_t rows = at.out.size[0], width = at.out.size[1], d = at.q.values.size[1];
    Random random(uint64_t(seed) * 1000003u + uint64_t(at.layer));
    std::vector<float> normals;
    for (int64_t i = 0; i < planes * d; ++i) normals.push_back(float(random.normal()));
    const Ragged normal = heads_of(queue, queue.upload(normals).reshape({planes, d}), 1, planes);
    // What is known so far, the blocks' part, the samples' part.
    const Tensor outs = queue.scratch.take(Dtype::F32, {3, rows, width}),
                 weights = queue.scratch.take(Dtype::F32, {3, rows}),
                 out = queue.scratch.take(Dtype::F32, {rows, width}), lse = queue.scratch.take(Dtype::F32, {rows});
    queue.move(at.out, out), queue.move(at.lse, lse);
    const size_t depths = pairs_of(longest_keys(at), at.plan.causal).size();
    for (size_t depth = 0; depth < depths; ++depth) {
      compute(queue, -kInfinity, weights);
      queue.move(out, outs.select(0, 0)), queue.move(lse, weights.select(0, 0));
      each_slice(at, 1, [&](const Slice& s) {
        const auto pairs = pairs_of(s.m, at.plan.causal);
        if (depth >= pairs.size()) return;
        for (const Pair& pair : pairs[depth])
          estimate(at, s, pair, normal, outs.slice(0, 1, 3), weights.slice(0, 1, 3));
      });
      queue.run->merge(queue, outs, weights, out, lse);
    }
    return out;
  }

 private:
  /// Attention of a pair in two parts, own blocks and samples, and the log of their weights.
  void estimate(LayerView& at, const Slice& s, const Pair& pair, const Ragged& normal, const Tensor& outs,
                const Tensor& weights) const {
    Queue& queue = at.queue;
    const int64_t key = s.sequence * at.k.heads + s.kv_head, before = s.m - s.n, heads_here = s.q.heads,
                  first = std::max<int64_t>(0, pair.q_begin - before), last = pair.q_end - before, nq = last - first,
                  nk = pair.k_end - pair.k_begin;
    if (nq <= 0) return;
    const Scratch scratch(queue.scratch);
    const Ragged q = rows_between(queue, s.q, first, last), k = rows_between(queue, s.k, pair.k_begin, pair.k_end),
                 v = rows_between(queue, segments(at.v, key, key + 1, 1), pair.k_begin, pair.k_end);
    Mods mods = at.mods;
    mods.gain = {};
    Plan plan = dense_plan(64, 64);
    plan.causal = false;
    int64_t drawn = nk;
    if (nk < min_len) {
      at.run().attend(queue, q, k, v, plan, mods, outs.select(0, 0), weights.select(0, 0));
    } else {
      // A list for each block of keys: its own and the samples. Queries point to that of their place.
      drawn = std::min(sample, nk);
      const int64_t blocks = (nk + block - 1) / block, q_block = (nq + blocks - 1) / blocks,
                    capacity = std::min(nk, block + drawn);
      const Ragged k_place = places(queue, k, nk, normal), q_place = places(queue, q, nq, normal);
      const Tensor samples = queue.upload(draw(at.layer, key, pair.k_begin, nk, drawn));
      const auto in_block = [&](const Num& j, const Num& b) { return floor_div(load(k_place.values, j), block) == b; };
      const Grids reads = grids(queue, 1, blocks, nk);
      const Num j = mod(place(), nk);
      compute(queue, reads.cells, in_block(j, floor_div(place(), nk)) || holds(samples, 0, drawn, j), reads.cells.values);
      const Lists read = chosen(queue, rows_of(queue, reads, std::vector<int64_t>(size_t(blocks), nk)), flagged(), capacity);
      const Num own = floor_div(load(q_place.values, min(index(), heads_here * nq - 1)), q_block);
      plan.form = Plan::Form::Tokens, plan.q_tile = 1, plan.parts = 2, plan.nnz_bound = blocks * capacity;
      plan.index = read.index;
      plan.part = compute(queue, Dtype::I32, {plan.nnz_bound},
                          1 - in_block(load(read.index, index()), floor_div(index(), capacity)));
      plan.rowptr = compute(queue, Dtype::I64, {heads_here * nq + 1}, own * capacity);
      plan.count = compute(queue, Dtype::I32, {heads_here * nq}, load(read.count, own));
      at.run().attend(queue, q, k, v, plan, mods, outs, weights);
    }
    const Num here = among(at, heads, s.kv_head * heads_here + segment());
    const auto weigh = [&](const Tensor& lse, double by) {
      compute(queue, q, pick(here, load(lse, begin_of(q, segment()) + place()) + by, -kInfinity), lse);
    };
    weigh(weights.select(0, 0), 0), weigh(weights.select(0, 1), std::log(double(nk) / double(drawn)));
  }

  /// The place of every row in its segment when rows are sorted by their codes, those of a code as they come.
  Ragged places(Queue& queue, const Ragged& x, int64_t length, const Ragged& normal) const {
    const int64_t all = x.segments(), codes = int64_t(1) << planes;
    const std::vector<int64_t> lengths(size_t(all), length);
    const Grids sides = grids(queue, all, length, planes);
    Proxy dot;
    dot.scale = 1, dot.causal = false;
    queue.run->proxy(queue, x, normal, dot, sides);
    // The number of a Gray code: each bit is the sum of those from the highest down to it.
    const Ragged bit = numbers(queue, lengths, all), code = numbers(queue, lengths, all), out = numbers(queue, lengths, all);
    compute(queue, 0, bit.values), compute(queue, 0, code.values);
    for (int64_t plane = planes - 1; plane >= 0; --plane) {
      const Num side = load(sides.cells.values, index() * planes + plane) > 0;
      compute(queue, mod(load(bit.values, index()) + side, 2), bit.values);
      compute(queue, 2 * load(code.values, index()) + load(bit.values, index()), code.values);
    }
    const Grids in = grids(queue, all, codes, length);
    compute(queue, in.cells, load(code.values, segment() * length + mod(place(), length)) == floor_div(place(), length),
            in.cells.values);
    const Lists with = chosen(queue, rows_of(queue, in, std::vector<int64_t>(size_t(codes), length)), flagged(), length);
    const Tensor begin = offsets_of(queue, all * codes, load(with.count, index()));
    const Num list = segment() * codes + load(code.values, index()), from = list * length;
    const Num rank = find(with.index, from, from + load(with.count, list), place()) - from;
    compute(queue, out, load(begin, list) - segment() * length + rank, out.values);
    return out;
  }

  /// `count` of `all` numbers, ascending (a part of Fisher–Yates).
  std::vector<int32_t> draw(int layer, int64_t key, int64_t first, int64_t all, int64_t count) const {
    Random random(((uint64_t(seed) * 1000003u + uint64_t(layer)) * 1000003u + uint64_t(key)) * 1000003u + uint64_t(first));
    std::vector<int32_t> order(static_cast<size_t>(all));
    std::iota(order.begin(), order.end(), 0);
    for (int64_t i = 0; i < count; ++i) std::swap(order[size_t(i)], order[size_t(i + random.below(all - i))]);
    order.resize(size_t(count));
    std::sort(order.begin(), order.end());
    return order;
  }
};

}  // namespace

Entry hyperattention() {
  Entry e = entry<HyperAttention>("hyperattention", "HyperAttention: Long-context Attention in Near-Linear Time",
                                  "Han et al., 2023, arXiv 2310.05869", 2023, Role::Plan | Role::Edit);
  e.equation =
      "Σ e^(q·k s) ≈ Σ over the block of like codes + n / |S| Σ over samples outside it, for each half of the text "
      "before the query's; exact in parts of min_len";
  e.needs = "the whole prompt";
  e.identity = "hyperattention(min_len=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
