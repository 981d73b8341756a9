#include <algorithm>
#include <cmath>
#include <set>

#include "attention/select.h"
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
        param(&M::min_budget, "min_budget", 1024, 0, 1000000000, "tokens of columns, and of diagonals, that a head reads at least"),
        param(&M::max_budget, "max_budget", 0, 0, 1000000000, "and at most; 0: no bound"),
    };
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = true;
    return n;
  }

  Plan plan(LayerView& at) const override {
    if (!at.plan.causal) throw Error(Code::Unsupported, "flexprefill", "plans for causal attention only", "leave out --no-causal");
    const int64_t least = std::max<int64_t>(2 * block, (min_budget + block - 1) / block * block);
    int64_t shortest = longest_keys(at);
    for (int64_t s = 0; s < at.q.segments(); ++s) shortest = std::min(shortest, at.q.length(s));
    // Short prompts and parts of one read everything; so do layers whose sliding window already bounds what is read.
    if (gamma >= 1 || shortest <= least || at.mods.window > 0) return dense_plan(block, block);
    std::vector<std::vector<int32_t>> rows(static_cast<size_t>(plan_rows(at, block)));
    each_slice(at, block, [&](const Slice& s) { plan_slice(at, s, rows); });
    return listed_blocks(at.queue, block, block, rows);
  }

 private:
  /// Masses that the last `block` queries of one head pay: by key, by key block, by distance.
  struct Last {
    Grids columns, blocks, diagonals;
    Ragged slashes;  // diagonals in groups of `block`, the farthest first and whole, the nearest last
  };

  void plan_slice(LayerView& at, const Slice& s, std::vector<std::vector<int32_t>>& rows) const {
    const int64_t heads = s.q.heads, k_blocks = (s.m + block - 1) / block, q_blocks = s.tiles;
    const std::vector<int64_t> whole_blocks(static_cast<size_t>(heads), q_blocks);
    const int64_t d = s.k.values.size[1];
    const Ragged k_means = numbers(at.queue, std::span(&k_blocks, 1), 1, d), q_means = numbers(at.queue, whole_blocks, heads, d);
    at.run().pool(at.queue, s.k, PoolKind::Mean, block, k_means);
    at.run().pool(at.queue, s.q, PoolKind::Mean, block, q_means);

    const Ragged tail = tail_of(at.queue, s.q, block);
    const Last last = observe_last(at, s, tail);
    const Grids estimate = estimate_last(at, s, tail, k_means);
    const Grids map = grids(at.queue, heads, q_blocks, k_blocks);
    Proxy mean;
    mean.scale = at.mods.scale, mean.softmax = true, mean.q_tile = mean.k_tile = block, mean.offset = s.m - s.n;
    at.run().proxy(at.queue, q_means, k_means, mean, map);

    for (int64_t head = 0; head < heads; ++head) {
      const float* guess = estimate.cells.values.as<float>() + estimate.cells.begin(head);
      const float* truth = last.blocks.cells.values.as<float>() + last.blocks.cells.begin(head);
      const bool query_aware = distance(guess, truth, k_blocks) < tau;
      const int64_t fewest = (min_budget + block - 1) / block;
      const int64_t columns = query_aware ? fewest : blocks_holding(at.queue, segments(last.columns.cells, head, head + 1, 1));
      const int64_t slashes = query_aware ? fewest : blocks_holding(at.queue, segments(last.diagonals.cells, head, head + 1, 1));
      const std::vector<int32_t> verticals = best(truth, k_blocks, clamp(columns, k_blocks), 0);
      const std::vector<int32_t> groups = best(last.slashes.values.as<float>() + last.slashes.begin(head), k_blocks, clamp(slashes, k_blocks), k_blocks - 1);
      std::vector<std::set<int32_t>> chosen(static_cast<size_t>(q_blocks));
      for (int64_t t = 0; t < q_blocks; ++t) {
        // Queries behind an earlier text may straddle two blocks of keys.
        const int64_t first = (s.m - s.n + t * block) / block, end = (s.m - s.n + std::min((t + 1) * block, s.n) - 1) / block;
        for (int64_t row = first; row <= end; ++row) {
          for (int32_t j : verticals)
            if (j <= row) chosen[size_t(t)].insert(j);
          for (int32_t group : groups)
            if (const int64_t j = row - (k_blocks - 1 - group); j >= 0) chosen[size_t(t)].insert(int32_t(j));
        }
      }
      if (query_aware) add_map(at.queue, segments(map.cells, head, head + 1, 1), k_blocks, chosen);
      for (int64_t t = 0; t < q_blocks; ++t)
        rows[size_t(s.row + head * s.tiles + t)].assign(chosen[size_t(t)].begin(), chosen[size_t(t)].end());
    }
  }

  int64_t clamp(int64_t blocks, int64_t all) const {
    const int64_t low = std::max<int64_t>(1, (min_budget + block - 1) / block), high = max_budget > 0 ? std::max(low, max_budget / block) : all;
    return std::min(std::clamp(blocks, low, std::max(low, high)), all);
  }

  static Ragged tail_of(Queue& queue, const Ragged& q, int64_t rows) {
    Ragged out = q;
    const int64_t all = q.segments();
    out.offsets = queue.scratch.take(Dtype::I64, {all + 1});
    out.ends = queue.scratch.take(Dtype::I64, {all});
    for (int64_t s = 0; s < all; ++s) {
      out.ends.at<int64_t>(s) = q.end(s);
      out.offsets.at<int64_t>(s) = std::max(q.begin(s), q.end(s) - rows);
    }
    out.offsets.at<int64_t>(all) = q.end(all - 1);
    return out;
  }

  Last observe_last(LayerView& at, const Slice& s, const Ragged& tail) const {
    const int64_t heads = tail.heads, k_blocks = (s.m + block - 1) / block;
    const Grids weights = grids(at.queue, heads, block, s.m);
    Proxy exact;
    exact.scale = at.mods.scale, exact.softcap = at.mods.softcap, exact.softmax = true, exact.offset = s.m - block;
    at.run().proxy(at.queue, tail, s.k, exact, weights);
    Last out{grids(at.queue, heads, 1, s.m), grids(at.queue, heads, 1, k_blocks), grids(at.queue, heads, 1, s.m), {}};
    Reduce by;
    by.kind = ReduceKind::Mean, by.to = Reduce::To::Columns;
    at.run().reduce(at.queue, weights, by, out.columns);
    by.kind = ReduceKind::Sum, by.to = Reduce::To::Diagonals;
    at.run().reduce(at.queue, weights, by, out.diagonals);
    by.to = Reduce::To::Blocks, by.col_block = block;
    at.run().reduce(at.queue, out.columns, by, out.blocks);
    // Distance o is stored at t = m − 1 − o and grouped from t = 0, so the group of the nearest may be short: the others
    // are whole blocks behind it.
    const int64_t nearest = s.m - (k_blocks - 1) * block;
    Ragged near = out.diagonals.cells, far = out.diagonals.cells;
    near.ends = at.queue.scratch.take(Dtype::I64, {heads});
    far.offsets = at.queue.scratch.take(Dtype::I64, {heads + 1});
    far.ends = at.queue.scratch.take(Dtype::I64, {heads});
    for (int64_t head = 0; head < heads; ++head) {
      near.ends.at<int64_t>(head) = far.offsets.at<int64_t>(head) = near.begin(head) + nearest;
      far.ends.at<int64_t>(head) = near.begin(head) + s.m;
    }
    far.offsets.at<int64_t>(heads) = heads * s.m;
    const std::vector<int64_t> one(static_cast<size_t>(heads), 1), rest(static_cast<size_t>(heads), k_blocks - 1);
    const Ragged first = numbers(at.queue, one, heads), others = numbers(at.queue, rest, heads);
    at.run().pool(at.queue, near, PoolKind::Sum, block, first);
    at.run().pool(at.queue, far, PoolKind::Sum, block, others);
    const std::vector<int64_t> groups(static_cast<size_t>(heads), k_blocks);
    out.slashes = numbers(at.queue, groups, heads);
    for (int64_t head = 0; head < heads; ++head) {
      float* group = out.slashes.values.as<float>() + out.slashes.begin(head);
      const float* mass = others.values.as<float>() + others.begin(head);
      std::reverse_copy(mass, mass + k_blocks - 1, group);
      group[k_blocks - 1] = first.values.at<float>(head);
    }
    return out;
  }

  Grids estimate_last(LayerView& at, const Slice& s, const Ragged& tail, const Ragged& k_means) const {
    const int64_t heads = tail.heads, k_blocks = (s.m + block - 1) / block;
    const std::vector<int64_t> one(static_cast<size_t>(heads), 1);
    const Ragged q = numbers(at.queue, one, heads, s.k.values.size[1]);
    at.run().pool(at.queue, tail, PoolKind::Mean, block, q);
    const Grids out = grids(at.queue, heads, 1, k_blocks);
    Proxy mean;
    mean.scale = at.mods.scale, mean.softmax = true, mean.causal = false;
    at.run().proxy(at.queue, q, k_means, mean, out);
    return out;
  }

  /// Square root of the Jensen-Shannon divergence, natural logarithm; a zero on either side makes it infinite, as the
  /// released code's NaN does.
  static double distance(const float* a, const float* b, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double mean = 0.5 * (double(a[i]) + double(b[i]));
      if (a[i] <= 0 || b[i] <= 0) return INFINITY;
      sum += 0.5 * (a[i] * std::log(a[i] / mean) + b[i] * std::log(b[i] / mean));
    }
    return std::sqrt(std::max(0.0, sum));
  }

  /// ⌊(count + 1) / 128⌋ + 1 blocks, count the elements whose descending running sum stays within gamma. The divisor is 128
  /// whatever the block, as released.
  int64_t blocks_holding(Queue& queue, const Ragged& mass) const {
    const Scratch scratch(queue.scratch);
    const int64_t capacity = mass.length(0);
    const Tensor index = queue.scratch.take(Dtype::I32, {capacity}), count = queue.scratch.take(Dtype::I32, {1});
    Select most;
    most.by = Select::By::TopP, most.p = float(gamma), most.crossing = false;
    queue.run->select(queue, mass, most, capacity, index, count);
    return (count.at<int32_t>(0) + 1) / 128 + 1;
  }

  /// The `take` largest of count masses, `always` among them; of ties the lower number.
  static std::vector<int32_t> best(const float* mass, int64_t count, int64_t take, int64_t always) {
    std::vector<int32_t> order(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) order[size_t(i)] = int32_t(i);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      if ((a == always) != (b == always)) return a == always;
      return mass[a] > mass[b];
    });
    order.resize(size_t(std::min(take, count)));
    return order;
  }

  /// Blocks of the flattened map that hold gamma of all rows' mass together.
  void add_map(Queue& queue, const Ragged& map, int64_t cols, std::vector<std::set<int32_t>>& chosen) const {
    const Scratch scratch(queue.scratch);
    const int64_t capacity = map.length(0);
    const Tensor index = queue.scratch.take(Dtype::I32, {capacity}), count = queue.scratch.take(Dtype::I32, {1});
    Select most;
    most.by = Select::By::TopP, most.p = float(gamma), most.crossing = false;
    queue.run->select(queue, map, most, capacity, index, count);
    for (int32_t i = 0; i < count.at<int32_t>(0); ++i) {
      const int64_t cell = index.at<int32_t>(i);
      chosen[size_t(cell / cols)].insert(int32_t(cell % cols));
    }
  }
};

}  // namespace

Entry flexprefill() {
  Entry e = entry<FlexPrefill>("flexprefill", "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference", "Lai et al., 2025, arXiv 2502.20766", 2025, uint8_t(Role::Plan));
  e.equation = "√JS(mean estimate, last block's masses) < τ: blocks of mean maps that hold γ; else columns and diagonals that hold γ";
  e.needs = "the whole prompt";
  e.identity = "flexprefill(gamma=1)";
  e.verified = {"identity", "formula", "model"};
  return e;
}

}  // namespace heed::mechanisms
