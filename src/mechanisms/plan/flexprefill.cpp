#include <algorithm>

#include "attention/maps.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// FlexPrefill (Lai et al., 2025): the last block of queries shows what kind of head it is. Where mean queries and keys
// foretell its block masses the whole block map is planned from means ("query-aware"); elsewhere the columns and diagonals
// that the last queries look at stand for all ("vertical-slash"). Both keep what holds `gamma` of the mass.
struct FlexPrefill final : Mechanism {
  int block;
  double gamma, tau;
  int64_t min_budget, max_budget;

  static std::vector<ParamInfo> params() {
    using M = FlexPrefill;
    return {
        param(&M::gamma, "gamma", 0.9, 0, 1, "share of the attention mass to keep"),
        param(&M::tau, "tau", 0.1, 0, 1, "heads whose estimate is nearer than this are query-aware"),
        param(&M::block, "block", 128, 8, 4096, "queries and keys of a block"),
        param(&M::min_budget, "min_budget", 1024, 0, 1000000000,
              "tokens of columns, and of diagonals, that a head reads at least"),
        param(&M::max_budget, "max_budget", 0, 0, 1000000000, "and at most; 0: no bound"),
    };
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = true;
    return n;
  }

  Plan plan(LayerView& at) const override {
    causal_only(at, "flexprefill");
    const int64_t least = std::max<int64_t>(2 * block, (min_budget + block - 1) / block * block);
    const int64_t shortest = *std::min_element(at.rows.begin(), at.rows.end());
    // Short prompts and parts of one read everything; so do layers whose sliding window already bounds what is read.
    if (gamma >= 1 || shortest <= least || at.mods.window > 0) return dense_plan(block, block);
    return chosen_blocks(
        at, Plan::Scope::QueryHead, block, block, [&](const Slice& s) { return plan_slice(at, s); }, Slices::Either);
  }

 private:
  /// Masses that the last `block` queries of one head pay: by key, by key block, by distance.
  struct Last {
    Grids columns, blocks, diagonals;
    Ragged slashes;  // diagonals in groups of `block`, the farthest first and whole, the nearest last
  };

  BlockChoice plan_slice(LayerView& at, const Slice& s) const {
    Queue& queue = at.queue;
    const int64_t heads = s.q.heads, k_blocks = (s.m + block - 1) / block, q_blocks = s.tiles;
    const Last last = observe_last(at, s);
    const Tensor distance = distances(at, estimate_last(at, s), last.blocks);
    Proxy mean;
    mean.softmax = true;
    const Grids map = mean_map(at, s, block, block, mean);

    auto query_aware = [&](const Num& head) { return load(distance, head) < tau; };
    const int64_t fewest = (min_budget + block - 1) / block, low = std::max<int64_t>(1, fewest);
    const int64_t high = max_budget > 0 ? std::max(low, max_budget / block) : std::max(low, k_blocks);
    // ⌊(count + 1) / 128⌋ + 1 blocks, count the elements whose descending running sum stays within gamma. The divisor is
    // 128 whatever the block, as released.
    auto blocks_of = [&](const Ragged& mass) {
      const Num holding = floor_div(load(holding_gamma(queue, mass, s.m).count, index()) + 1, 128) + 1;
      return compute(queue, Dtype::I32, {heads},
                     min(clamp(pick(query_aware(index()), fewest, holding), low, high), k_blocks));
    };
    const Lists verticals = best(queue, force(queue, last.blocks.cells, 1, 0), blocks_of(last.columns.cells), k_blocks);
    const Lists slashes = best(queue, force(queue, last.slashes, 0, 1), blocks_of(last.diagonals.cells), k_blocks);
    const Lists cells = holding_gamma(queue, map.cells, q_blocks * k_blocks);

    // A cell (tile, block) is read for its column, its diagonal or, in a query-aware head, for itself. Queries behind an
    // earlier text may straddle two blocks of keys, `first` and `end`.
    const Grids chosen = grids(queue, heads, q_blocks, k_blocks);
    const Num t = floor_div(place(), k_blocks), j = mod(place(), k_blocks);
    const Num first = floor_div(s.m - s.n + t * block, block),
              end = floor_div(s.m - s.n + min((t + 1) * block, s.n) - 1, block);
    auto on_diagonal = [&](const Num& row) { return slashes.has(segment(), k_blocks - 1 - row + j); };
    auto add = [&](const Num& also) {
      compute(queue, chosen.cells, max(load(chosen.cells.values, index()), also), chosen.cells.values);
    };
    compute(queue, chosen.cells, j <= end && verticals.has(segment(), j), chosen.cells.values);
    add(on_diagonal(first)), add(on_diagonal(end));
    add(query_aware(segment()) && cells.has(segment(), place()));
    const std::vector<int64_t> all(static_cast<size_t>(q_blocks), k_blocks);
    return {rows_of(queue, chosen, all), flagged()};
  }

  static Lists best(Queue& queue, const Ragged& scores, const Tensor& count, int64_t capacity) {
    Select most;
    most.count = count;
    return chosen(queue, scores, most, capacity);
  }

  /// Those, largest first, whose running sum stays within gamma of the whole.
  Lists holding_gamma(Queue& queue, const Ragged& mass, int64_t capacity) const {
    Select most;
    most.by = Select::By::TopP, most.p = float(gamma), most.crossing = false;
    return chosen(queue, mass, most, capacity);
  }

  Last observe_last(LayerView& at, const Slice& s) const {
    const int64_t heads = s.q.heads, k_blocks = (s.m + block - 1) / block;
    const LastRows pay = last_rows_pay(at, s, block);
    Last out{pay.columns, grids(at.queue, heads, 1, k_blocks), pay.diagonals, {}};
    Reduce by;
    by.col_block = block;
    at.run().reduce(at.queue, out.columns, by, out.blocks);
    // Distance o is stored at t = m − 1 − o and grouped from t = 0, so the group of the nearest may be short: the others
    // are whole blocks behind it.
    const int64_t nearest = s.m - (k_blocks - 1) * block;
    Ragged near = out.diagonals.cells, far = out.diagonals.cells;
    near.ends = compute(at.queue, Dtype::I64, {heads}, index() * s.m + nearest);
    far.offsets = compute(at.queue, Dtype::I64, {heads + 1}, pick(index() < heads, index() * s.m + nearest, heads * s.m));
    far.ends = compute(at.queue, Dtype::I64, {heads}, (index() + 1) * s.m);
    const std::vector<int64_t> one(static_cast<size_t>(heads), 1), rest(static_cast<size_t>(heads), k_blocks - 1);
    const Ragged first = numbers(at.queue, one, heads), others = numbers(at.queue, rest, heads);
    at.run().pool(at.queue, near, PoolKind::Sum, block, first);
    at.run().pool(at.queue, far, PoolKind::Sum, block, others);
    const std::vector<int64_t> groups(static_cast<size_t>(heads), k_blocks);
    out.slashes = numbers(at.queue, groups, heads);
    const Num last = k_blocks - 1, group = place();
    compute(at.queue, out.slashes,
            pick(group == last, load(first.values, segment()), load(others.values, segment() * last + last - 1 - group)),
            out.slashes.values);
    return out;
  }

  Grids estimate_last(LayerView& at, const Slice& s) const {
    const Ragged q = pooled(at.queue, last_rows(at.queue, s.q, block), block, PoolKind::Mean, block),
                 k = pooled(at.queue, s.k, s.m, PoolKind::Mean, block);
    const Grids out = grids(at.queue, s.q.heads, 1, (s.m + block - 1) / block);
    Proxy mean;
    mean.scale = at.mods.scale, mean.softmax = true, mean.causal = false;
    at.run().proxy(at.queue, q, k, mean, out);
    return out;
  }

  /// Square root of the Jensen-Shannon divergence of each head, natural logarithm; a zero on either side makes it infinite,
  /// as the released code's NaN does.
  static Tensor distances(LayerView& at, const Grids& guess, const Grids& truth) {
    const int64_t heads = guess.rows.size[0], cols = guess.cells.bound / heads;
    const Grids terms = grids(at.queue, heads, 1, cols), sums = grids(at.queue, heads, 1, 1);
    const Num a = load(guess.cells.values, index()), b = load(truth.cells.values, index()), mean = 0.5 * (a + b);
    const Num term = 0.5 * (a * log(a / mean) + b * log(b / mean));
    compute(at.queue, terms.cells, pick(a <= 0 || b <= 0, kInfinity, term), terms.cells.values);
    Reduce sum;
    sum.to = Reduce::To::Rows;
    at.run().reduce(at.queue, terms, sum, sums);
    return compute(at.queue, Dtype::F32, {heads}, sqrt(max(0, load(sums.cells.values, index()))));
  }
};

}  // namespace

Entry flexprefill() {
  Entry e = entry<FlexPrefill>(
      "flexprefill", "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference",
      "Lai et al., 2025, arXiv 2502.20766", 2025, uint8_t(Role::Plan));
  e.equation =
      "√JS(mean estimate, last block's masses) < τ: blocks of mean maps that hold γ; else columns and diagonals "
      "that hold γ";
  e.needs = "the whole prompt";
  e.identity = "flexprefill(gamma=1)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
