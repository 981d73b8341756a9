#include "attention/maps.h"

#include <algorithm>

#include "attention/plans.h"
#include "attention/scores.h"

namespace heed {

void causal_only(const LayerView& at, const char* mechanism) {
  if (!at.plan.causal)
    throw Error(Code::Unsupported, mechanism, "plans for causal attention only", "leave out --no-causal");
}

Ragged pooled(Queue& queue, const Ragged& x, int64_t length, PoolKind kind, int block) {
  const std::vector<int64_t> blocks(size_t(x.segments()), (length + block - 1) / block);
  const Ragged out = numbers(queue, blocks, x.heads, x.values.size[1]);
  queue.run->pool(queue, x, kind, block, out);
  return out;
}

Ragged last_rows(Queue& queue, const Ragged& x, int64_t rows) {
  Ragged out = x;
  const int64_t all = x.segments();
  out.offsets = compute(queue, Dtype::I64, {all + 1},
                        pick(index() < all, max(begin_of(x, index()), end_of(x, index()) - rows), end_of(x, all - 1)));
  out.ends = compute(queue, Dtype::I64, {all}, end_of(x, index()));
  return out;
}

LastRows last_rows_pay(LayerView& at, const Slice& s, int64_t rows) {
  Queue& queue = at.queue;
  rows = std::min(rows, s.n);
  LastRows out{rows, grids(queue, s.q.heads, 1, s.m), grids(queue, s.q.heads, 1, s.m)};
  const Scratch scratch(queue.scratch);
  const Grids weights = grids(queue, s.q.heads, rows, s.m);
  Proxy exact;
  exact.scale = at.mods.scale, exact.softcap = at.mods.softcap, exact.softmax = true, exact.offset = s.m - rows;
  queue.run->proxy(queue, last_rows(queue, s.q, rows), s.k, exact, weights);
  Reduce by;
  by.kind = ReduceKind::Mean, by.to = Reduce::To::Columns;
  queue.run->reduce(queue, weights, by, out.columns);
  by.kind = ReduceKind::Sum, by.to = Reduce::To::Diagonals;
  queue.run->reduce(queue, weights, by, out.diagonals);
  return out;
}

Grids mean_map(LayerView& at, const Slice& s, int q_block, int k_block, Proxy how) {
  const Ragged q = pooled(at.queue, s.q, s.n, PoolKind::Mean, q_block),
               k = pooled(at.queue, s.k, s.m, PoolKind::Mean, k_block);
  const Grids map = grids(at.queue, s.q.heads, s.tiles, (s.m + k_block - 1) / k_block);
  if (how.scale == 0) how.scale = at.mods.scale;
  how.causal = at.plan.causal, how.q_tile = q_block, how.k_tile = k_block, how.offset = s.m - s.n;
  at.run().proxy(at.queue, q, k, how, map);
  return map;
}

std::vector<int64_t> visible_blocks(const LayerView& at, const Slice& s, int q_block, int k_block) {
  std::vector<int64_t> out;
  for (int64_t t = 0; t < s.tiles; ++t)
    out.push_back(((at.plan.causal ? s.m - s.n + std::min((t + 1) * q_block, s.n) : s.m) - 1) / k_block + 1);
  return out;
}

namespace {
/// Key numbers of the first and the last query of row segment().
Num first_query(const Slice& s, int tile) { return s.m - s.n + mod(segment(), s.tiles) * tile; }
Num last_query(const Slice& s, int tile) { return min(first_query(s, tile) + tile, s.m) - 1; }
}  // namespace

Num own_block(const Slice& s, int q_block, int k_block) {
  return place() >= floor_div(first_query(s, q_block), k_block) && place() <= floor_div(last_query(s, q_block), k_block);
}

Grids sum_of_heads(Queue& queue, const Grids& each) {
  Ragged cells = each.cells;
  cells.heads = cells.segments();
  Grids out{spread(queue, cells, {.of = Spread::Of::Sum, .over = Spread::Over::Heads}), each.rows.slice(0, 0, 1),
            each.cols.slice(0, 0, 1)};
  out.cells = segments(out.cells, 0, 1, 1);
  out.cells.bound /= cells.heads;
  return out;
}

BlockChoice united(Queue& queue, const Ragged& rows, const Select& how, int64_t capacity, const Num& also) {
  const Lists picked = chosen(queue, rows, how, capacity);
  Ragged flags = rows;
  flags.values = queue.scratch.take(Dtype::F32, {rows.values.numel()});
  compute(queue, flags, picked.has(segment(), place()) || also, flags.values);
  Select flagged;
  flagged.by = Select::By::Threshold, flagged.p = 0.5f;
  return {flags, flagged};
}

namespace {
/// Visits whole sequences that have queries.
void each_sequence(LayerView& at, int q_tile, const std::function<void(const Slice&)>& visit) {
  const int64_t h = at.q.heads, g = at.k.heads;
  int64_t row = 0;
  for (int64_t s = 0; s < at.sequences(); ++s) {
    const int64_t n = at.rows[size_t(s)], tiles = (n + q_tile - 1) / q_tile;
    if (n > 0) {
      const Scratch scratch(at.queue.scratch);
      visit({segments(at.q, s * h, (s + 1) * h, h), segments(at.k, s * g, (s + 1) * g, g), n,
             at.key_rows[size_t(s * g)], s, 0, row, tiles});
    }
    row += h * tiles;
  }
}
}  // namespace

Plan chosen_blocks(LayerView& at, Plan::Scope scope, int q_block, int k_block,
                   const std::function<BlockChoice(const Slice&)>& choose) {
  const int64_t h = at.q.heads, sharing = h / scope_heads(scope, h, at.k.heads);
  const Lists all = lists(at.queue, plan_rows(at, q_block) / sharing, (longest_keys(at) + k_block - 1) / k_block);
  auto visit = [&](const Slice& s) {
    const BlockChoice choice = choose(s);
    const int64_t first = s.row / sharing;
    heed::choose(at.queue, choice.rows, choice.how, all.part(first, first + choice.rows.segments()));
  };
  if (scope == Plan::Scope::Layer) each_sequence(at, q_block, visit);
  else each_slice(at, q_block, visit);
  return blocks_plan(at.queue, scope, q_block, k_block, all.index, all.count, all.capacity);
}

Plan marked_keys(LayerView& at, int tile, int64_t runs, const std::function<void(const Slice&, const Ragged& flags)>& mark) {
  Queue& queue = at.queue;
  const int64_t all = plan_rows(at, tile), capacity = std::max<int64_t>(1, std::min(runs, (longest_keys(at) + 1) / 2));
  const Lists first = lists(queue, all, capacity), last = lists(queue, all, capacity);
  each_slice(at, tile, [&](const Slice& s) {
    const Ragged flags = rows_of(queue, grids(queue, s.q.heads, s.tiles, s.m), visible_blocks(at, s, tile, 1));
    compute(queue, flags, 0, flags.values);
    mark(s, flags);
    Ragged edges = flags;
    edges.values = queue.scratch.take(Dtype::F32, {flags.values.numel()});
    Select edge;
    edge.by = Select::By::Threshold, edge.p = 0.5f;
    const int64_t end = s.row + s.q.heads * s.tiles;
    const Num here = load(flags.values, index());
    compute(queue, edges, here - pick(place() == 0, 0, load(flags.values, index() - 1)), edges.values);
    choose(queue, edges, edge, first.part(s.row, end));
    compute(queue, edges, here - pick(place() == length() - 1, 0, load(flags.values, index() + 1)), edges.values);
    choose(queue, edges, edge, last.part(s.row, end));
  });
  const Tensor ranges = queue.scratch.take(Dtype::I32, {all * capacity, 2});
  compute(queue, pick(channel() == 0, load(first.index, place()), load(last.index, place()) + 1), ranges);
  Plan plan = tokens_plan(queue, Plan::Scope::QueryHead, tile, first.index, first.count, capacity);
  plan.form = Plan::Form::Interval, plan.index = ranges;
  return plan;
}

void mark(Queue& queue, const Ragged& flags, const Num& where, const Num& reads) {
  compute(queue, flags, max(load(flags.values, index()), where && reads), flags.values);
}

Num in_band(const Slice& s, int tile, int64_t sinks, int64_t local) {
  return place() < sinks || (place() > first_query(s, tile) - local && place() <= last_query(s, tile));
}

void mark_slashes(Queue& queue, const Slice& s, const Ragged& flags, int tile, const Num& where, const Lists& slashes) {
  const Scratch scratch(queue.scratch);
  // The first distance that some query of the tile does not fall short of; the last one must not fall short of it either.
  const Num begin = head_of_tile(s) * slashes.capacity, end = begin + load(slashes.count, head_of_tile(s));
  const Tensor nearest = queue.scratch.take(Dtype::I32, {flags.values.numel()});
  compute(queue, flags, find(slashes.index, begin, end, first_query(s, tile) - place()), nearest);
  const Num at = load(nearest, index());
  mark(queue, flags, where, at < end && load(slashes.index, at) <= last_query(s, tile) - place());
}

}  // namespace heed
