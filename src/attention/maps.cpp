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

Ragged rows_between(Queue& queue, const Ragged& x, int64_t first, int64_t last) {
  Ragged out = x;
  const int64_t all = x.segments();
  out.offsets = compute(queue, Dtype::I64, {all + 1}, pick(index() < all, begin_of(x, index()) + first, end_of(x, all - 1)));
  out.ends = compute(queue, Dtype::I64, {all}, begin_of(x, index()) + last);
  return out;
}

Ragged picked_rows(Queue& queue, const Ragged& x, const Num& row, Ragged like) {
  const Tensor numbers = compute(queue, Dtype::I32, {like.bound}, 0);  // also where no segment lies
  compute(queue, like, row, numbers);
  like.values = queue.scratch.take(Dtype::F32, {like.bound, x.values.size[1]});
  queue.run->embed(queue, x.values, numbers, 1, like.values);
  return like;
}

Ragged in_f32(Queue& queue, const Ragged& x) {
  Ragged out = x;
  out.values = queue.scratch.take(Dtype::F32, {x.values.size[0], x.values.size[1]});
  queue.run->dequantise(queue, x.values, out.values);
  return out;
}

Ragged centred(Queue& queue, const Ragged& x) {
  const Ragged out = in_f32(queue, x);
  const int64_t d = x.values.size[1];
  const Ragged mean = mean_rows(queue, out);
  compute(queue, out, load(out.values, index()) - load(mean.values, segment() * d + channel()), out.values);
  return out;
}

Ragged coded(Queue& queue, const Ragged& x, int levels) {
  Ragged out = x;
  const int64_t rows = x.values.size[0], d = x.values.size[1];
  out.values = queue.scratch.take(Dtype::F32, {rows, d});
  const Grids top = grids(queue, 1, rows, 1);
  {
    const Scratch scratch(queue.scratch);
    const Grids sizes = grids(queue, 1, rows, d);  // all rows of all segments
    compute(queue, abs(load(x.values, index())), sizes.cells.values);
    Reduce most;
    most.to = Reduce::To::Rows, most.kind = ReduceKind::Max;
    queue.run->reduce(queue, sizes, most, top);
  }
  const Num scale = load(top.cells.values, begin_of(x, segment()) + place()) / levels;
  compute(queue, x, pick(scale > 0, round(load(x.values, index()) / scale) * scale, 0), out.values);
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

Ragged window_means(Queue& queue, const Ragged& x, int64_t length, int stride) {
  const int64_t d = x.values.size[1], windows = std::max<int64_t>(1, length / stride - 1);
  const Ragged halves = pooled(queue, x, length, PoolKind::Mean, stride),
               out = numbers(queue, std::vector<int64_t>(size_t(x.segments()), windows), x.heads, d);
  const Num half = (begin_of(halves, segment()) + place()) * d + channel();
  compute(queue, out, 0.5 * (load(halves.values, half) + load(halves.values, half + d)), out.values);
  return out;
}

Grids window_weights(LayerView& at, const Slice& s, const Ragged& windows, int64_t count, int stride) {
  const Grids weights = grids(at.queue, s.q.heads, s.n, count);
  Proxy exact;
  exact.scale = at.mods.scale, exact.softmax = true, exact.k_tile = stride;
  exact.offset = s.m - s.n - (2 * stride - 1);  // a window is seen by the query at its end
  at.run().proxy(at.queue, s.q, windows, exact, weights);
  return sum_of_heads(at.queue, weights);
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

Ragged up_to_each(Queue& queue, const Ragged& x, int64_t length, int64_t n, int64_t behind) {
  Ragged out = x;
  const int64_t rows = x.segments() * n;
  out.heads = x.heads * n, out.bound = rows * length;
  const Num begin = begin_of(x, floor_div(index(), n));
  out.offsets = compute(queue, Dtype::I64, {rows + 1}, pick(index() < rows, begin, end_of(x, x.segments() - 1)));
  out.ends = compute(queue, Dtype::I64, {rows}, begin + max(0, length - n + mod(index(), n) + 1 - behind));
  return out;
}

Num among(LayerView& at, const Range& heads, const Num& head) {
  return heads.all() ? Num(1) : among(at.queue, heads, at.q.heads, head);
}

Plan replaced(LayerView& at, const Range& heads, int q_block, int k_block) {
  at.mods.gain = at.queue.scratch.take(Dtype::F32, {at.q.values.size[0]});
  compute(at.queue, at.q, 1 - among(at, heads, mod(segment(), at.q.heads)), at.mods.gain);
  return dense_plan(q_block, k_block);
}

void each_part(Queue& queue, int64_t n, int block, const std::function<void(int64_t, int64_t)>& visit) {
  constexpr int64_t rows = 512;
  const int64_t part = std::max<int64_t>(1, rows / block) * block;
  for (int64_t first = 0; first < n; first += part) {
    const Scratch scratch(queue.scratch);
    visit(first, std::min(n, first + part));
  }
}

Grids block_map(Queue& queue, const Ragged& q, int64_t n, const Ragged& k, int64_t m, const Proxy& how, ReduceKind kind,
                int q_block, int k_block, const ScoreFormula& make) {
  const int64_t heads = q.segments(), tiles = (n + q_block - 1) / q_block, blocks = (m + k_block - 1) / k_block;
  const Grids out = grids(queue, heads, tiles, blocks);
  Reduce by;
  by.kind = kind, by.row_block = q_block, by.col_block = k_block;
  if (!make && queue.run->proxy_reduce && queue.run->proxy_reduce(queue, q, k, how, by, out)) return out;
  each_part(queue, n, q_block, [&](int64_t first, int64_t last) {
    const Grids scores = grids(queue, heads, last - first, m);
    Proxy here = how;
    here.offset += first * how.q_tile;
    queue.run->proxy(queue, rows_between(queue, q, first, last), k, here, scores);
    const Tensor& cells = scores.cells.values;
    if (make)
      compute(queue, scores.cells, make(load(cells, index()), first + floor_div(place(), m), mod(place(), m)), cells);
    Grids here_out = out;
    here_out.rows = compute(queue, Dtype::I64, {heads}, (last - first + q_block - 1) / q_block);
    const Num begin = index() * (tiles * blocks);
    here_out.cells.offsets = compute(queue, Dtype::I64, {heads + 1},
                                     pick(index() < heads, begin + first / q_block * blocks, begin));
    queue.run->reduce(queue, scores, by, here_out);
  });
  return out;
}

void sum_columns(Queue& queue, const Ragged& q, int64_t n, const Ragged& k, int64_t m, const Proxy& how, const Grids& out) {
  const int64_t heads = q.segments();
  Reduce by;
  by.to = Reduce::To::Columns;
  if (queue.run->proxy_reduce && queue.run->proxy_reduce(queue, q, k, how, by, out)) return;
  each_part(queue, n, 1, [&](int64_t first, int64_t last) {
    const Grids scores = grids(queue, heads, last - first, m), sums = first == 0 ? out : grids(queue, heads, 1, m);
    Proxy here = how;
    here.offset += first * how.q_tile;
    queue.run->proxy(queue, rows_between(queue, q, first, last), k, here, scores);
    queue.run->reduce(queue, scores, by, sums);
    if (first > 0) queue.run->combine(queue, out.cells.values, sums.cells.values, Combine::Add, 1, out.cells.values);
  });
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
  return {flags, flagged()};
}

Plan chosen_blocks(LayerView& at, Plan::Scope scope, int q_block, int k_block,
                   const std::function<BlockChoice(const Slice&)>& choose, Slices of) {
  const int64_t h = at.q.heads, sharing = h / scope_heads(scope, h, at.k.heads);
  const Lists all = lists(at.queue, plan_rows(at, q_block) / sharing, (longest_keys(at) + k_block - 1) / k_block);
  auto visit = [&](const Slice& s) {
    const BlockChoice choice = choose(s);
    const int64_t first = s.row / sharing;
    heed::choose(at.queue, choice.rows, choice.how, all.part(first, first + choice.rows.segments()));
  };
  each_slice(at, q_block, visit, scope == Plan::Scope::Layer ? Slices::Sequence : of);
  return blocks_plan(at.queue, scope, q_block, k_block, all.index, all.count, all.capacity);
}

Plan united_keys(LayerView& at, const KeySets& sets, int64_t runs) {
  Queue& queue = at.queue;
  const int64_t rows = plan_rows(at, sets.tile),
                capacity = std::max<int64_t>(1, std::min(runs, (longest_keys(at) + 1) / 2));
  const Tensor count = queue.scratch.take(Dtype::I32, {rows}),
               ranges = queue.scratch.take(Dtype::I32, {rows * capacity, 2});
  Plan plan = tokens_plan(queue, Plan::Scope::QueryHead, sets.tile, ranges, count, capacity);
  plan.form = Plan::Form::Interval;
  queue.run->unite(queue, at.q, at.k, sets, plan);
  return plan;
}

}  // namespace heed
