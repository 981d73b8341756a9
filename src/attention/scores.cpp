#include "attention/scores.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/plans.h"
#include "attention/rotation.h"
#include "attention/select.h"

namespace heed {
namespace {

int64_t width(const Ragged& x) { return x.values.rank > 1 ? x.values.size[1] : 1; }

Ragged like(Queue& queue, const Ragged& x, int64_t width = 0) {
  Ragged out = x;
  const int64_t rows = x.values.size[0];
  out.values = width > 0 ? queue.scratch.take(Dtype::F32, {rows, width}) : queue.scratch.take(Dtype::F32, {rows});
  return out;
}
Ragged as(Queue& queue, const Ragged& x) { return like(queue, x, x.values.rank > 1 ? width(x) : 0); }

Ragged read_keys(const LayerView& at, const Read* read) {
  Ragged keys = at.per_entry(at.store->shape().d);
  keys.values = keys.values.reshape({keys.bound, at.store->shape().d});
  at.run().page_read(at.queue, at.store->pages(), read, keys, {}, {});
  return keys;
}

/// True positions of all entries, I32 [entries].
Tensor entry_positions(const LayerView& at) {
  Ragged places = at.per_entry();  // where each segment's numbers lie; keys and values themselves are not wanted
  const Tensor positions = at.queue.scratch.take(Dtype::I32, {places.bound});
  places.values = {};
  at.run().page_read(at.queue, at.store->pages(), nullptr, places, {}, positions);
  return positions;
}

}  // namespace

Ragged stored_keys(const LayerView& at) {
  const bool turn = at.store->pages().plain_keys && at.read.rope;
  return read_keys(at, turn ? &at.read : nullptr);
}

Ragged plain_keys(const LayerView& at) {
  const Rope* rope = at.model.rope(at.layer);
  Ragged keys = read_keys(at, nullptr);
  if (!rope || at.store->pages().plain_keys) return keys;
  const bool elsewhere = at.basis && at.basis->k;
  if (elsewhere) change_basis(at.queue, keys, at.basis->k_back, keys);
  keys = turned(at.queue, keys, backwards(at.queue, *rope), entry_positions(at));
  if (elsewhere) change_basis(at.queue, keys, at.basis->k, keys);
  return keys;
}

Ragged kept_keys(const LayerView& at) { return read_keys(at, nullptr); }

Ragged stored_values(const LayerView& at) {
  Ragged values = at.per_entry(at.store->shape().d_v);
  values.values = values.values.reshape({values.bound, at.store->shape().d_v});
  at.run().page_read(at.queue, at.store->pages(), nullptr, {}, values, {});
  return values;
}

void set_values(const LayerView& at, const Ragged& values) {
  at.store->rewrite(at.queue, compute(at.queue, Dtype::I32, {values.segments()}, 0), kept_keys(at), values,
                    entry_positions(at));
}

Ragged stored_positions(const LayerView& at) {
  const Ragged out = at.per_entry();
  compute(at.queue, out, load(entry_positions(at), index()), out.values);
  return out;
}

Ragged combine(Queue& queue, const Ragged& x, Combine how, float factor) {
  const Ragged out = as(queue, x);
  queue.run->combine(queue, x.values, {}, how, factor, out.values);
  return out;
}

Ragged combine(Queue& queue, const Ragged& x, const Ragged& y, Combine how, float factor) {
  const Ragged out = as(queue, x);
  queue.run->combine(queue, x.values, y.values, how, factor, out.values);
  return out;
}

Ragged spread(Queue& queue, const Ragged& x, const Spread& how) {
  const Ragged out = as(queue, x);
  queue.run->spread(queue, x, how, out.values);
  return out;
}

Ragged softmax(Queue& queue, const Ragged& x, Spread group) {
  group.of = Spread::Of::Max;
  return shares(queue, combine(queue, combine(queue, x, spread(queue, x, group), Combine::Add, -1), Combine::Exp), group);
}

Ragged shares(Queue& queue, const Ragged& x, Spread group) {
  group.of = Spread::Of::Sum;
  return combine(queue, x, spread(queue, x, group), Combine::Divide);
}

Ragged z_scores(Queue& queue, const Ragged& x, Spread group) {
  group.of = Spread::Of::Mean;
  const Ragged centred = combine(queue, x, spread(queue, x, group), Combine::Add, -1);
  group.of = Spread::Of::Deviation;
  const Ragged floor = combine(queue, combine(queue, x, Combine::Power, 0), Combine::Multiply, 1e-6f);
  return combine(queue, centred, combine(queue, spread(queue, x, group), floor, Combine::Max), Combine::Divide);
}

Ragged one_segment(Queue& queue, const Tensor& x) {
  return {
      .values = x, .offsets = compute(queue, Dtype::I64, {2}, index() * x.size[0]), .ends = {}, .heads = 1, .bound = x.size[0]};
}

Ragged row_dots(Queue& queue, const Ragged& x, const Ragged& y, float factor) {
  // A row that sees itself alone has its one logit as lse.
  const Ragged out = like(queue, x);
  Mods itself;
  itself.scale = factor;
  itself.window = 1;
  RowStats stats;
  stats.lse = out.values;
  queue.run->observe_rows(queue, x, {.panel = &y, .pages = nullptr, .read = nullptr}, nullptr, itself, stats);
  return out;
}

Ragged row_norms(Queue& queue, const Ragged& x) {
  // x/rms(x) · x/√d = ‖x‖: nothing is squared that could overflow.
  return row_dots(queue, unit_rows(queue, x), x, 1 / std::sqrt(float(width(x))));
}

Ragged dots(Queue& queue, const Ragged& rows, const Ragged& keys, float factor) {
  const Ragged out = like(queue, keys);
  Mods mods;
  mods.scale = factor;
  Observe how;
  how.rows = Observe::Rows::Sum, how.logits = true;
  queue.run->observe(queue, rows, {.panel = &keys, .pages = nullptr, .read = nullptr}, nullptr, mods, how, out);
  return out;
}

Ragged mean_rows(Queue& queue, const Ragged& x) {
  const std::vector<int64_t> one(size_t(x.segments()), 1);
  Ragged out = numbers(queue, one, x.heads, width(x));
  out.values = ones(queue, x.segments(), width(x));
  queue.run->combine(queue, out.values, {}, Combine::Multiply, 0, out.values);
  queue.run->pool(queue, x, PoolKind::Mean, std::numeric_limits<int>::max(), out);
  return out;
}

Ragged unit_rows(Queue& queue, const Ragged& x) {
  const Ragged out = as(queue, x);
  queue.run->rms_norm(queue, x.values, {}, 1e-30f, out.values);
  return out;
}

Tensor ones(Queue& queue, int64_t rows, int64_t width) {
  return width > 0 ? compute(queue, Dtype::F32, {rows, width}, 1) : compute(queue, Dtype::F32, {rows}, 1);
}

Ragged queries_behind(const LayerView& at) {
  Ragged rows = at.q, keys = at.per_entry(), out = keys;
  rows.values = ones(at.queue, at.q.values.size[0], 1);
  keys.values = ones(at.queue, keys.bound, 1);
  Plan all;
  all.causal = at.plan.causal;
  Mods one;
  one.scale = 1;
  Observe how;
  how.rows = Observe::Rows::Sum, how.logits = true;
  at.run().observe(at.queue, rows, {.panel = &keys, .pages = nullptr, .read = nullptr}, &all, one, how, out);
  return out;
}

Ragged last_logits(LayerView& at, const Ragged& q, bool weights) {
  Queue& queue = at.queue;
  const int64_t group = at.model.group(), all = at.q.segments();
  if (at.decoding() && queue.run->observe_runs) {
    const Tensor held = at.store->offsets(queue);
    const Num kv = floor_div(index(), group), begin = load(held, kv);
    Ragged runs;
    runs.heads = at.q.heads, runs.bound = at.store->entries() * group;
    runs.values = queue.scratch.take(Dtype::F32, {runs.bound});
    runs.offsets = compute(queue, Dtype::I64, {all + 1}, begin * group + mod(index(), group) * (load(held, kv + 1) - begin));
    if (queue.run->observe_runs(queue, q, at.keys(), at.mods, !weights, runs)) return runs;
  }
  Observe how;
  how.rows = Observe::Rows::Last, how.heads = Observe::Heads::Each, how.logits = !weights;
  return by_query_head(queue, at.observe(q, how), group);
}

Ragged row_weights(const LayerView& at, int64_t rows) {
  const int64_t all = at.q.segments(), group = at.model.group();
  Plan dense;
  dense.causal = at.plan.causal;
  Tensor lse = at.lse;
  if (at.decoding() || at.plan.form != Plan::Form::Dense || at.plan.parts > 1 || at.mods.gain) {
    RowStats stats;
    stats.lse = lse = at.queue.scratch.take(Dtype::F32, {at.q.values.size[0]});
    at.run().observe_rows(at.queue, at.last_queries(rows), at.keys(), &dense, at.mods, stats);
  }
  // Every row as a query head of its own, which as the last query sees all keys: its logits.
  auto row_of = [&](const Num& run) { return end_of(at.q, floor_div(run, rows)) - rows + mod(run, rows); };
  auto first_of = [&](const Num& run) { return begin_of(at.q, floor_div(run, rows)); };
  Ragged each = at.q;
  each.heads = at.q.heads * rows;
  each.offsets = compute(at.queue, Dtype::I64, {all * rows + 1},
                         pick(index() < all * rows, max(first_of(index()), row_of(index())), load(at.q.offsets, all)));
  each.ends = compute(at.queue, Dtype::I64, {all * rows}, max(first_of(index()), row_of(index()) + 1));
  Observe how;
  how.rows = Observe::Rows::Last, how.heads = Observe::Heads::Each, how.logits = true;
  const Ragged columns = at.per_entry(group * rows);
  at.run().observe(at.queue, each, at.keys(), &dense, at.mods, how, columns);
  const Ragged runs = by_query_head(at.queue, columns, group * rows);
  const Num row = row_of(segment());
  Num hidden = row < first_of(segment());
  if (at.plan.causal) hidden = hidden || place() > length() - rows + mod(segment(), rows);
  compute(at.queue, runs, pick(hidden, 0, exp(load(runs.values, index()) - load(lse, row))), runs.values);
  return runs;
}

Ragged over_runs(const LayerView& at, const Ragged& runs, Spread::Of of) {
  Ragged grouped = runs;  // the runs of a KV head as the heads of a sequence
  grouped.heads = runs.segments() / at.store->segments();
  const Ragged all = spread(at.queue, grouped, {.of = of, .over = Spread::Over::Heads}), out = at.per_entry();
  compute(at.queue, out, load(all.values, begin_of(all, segment() * grouped.heads) + place()), out.values);
  return out;
}

namespace {

/// The output matrix in F32, [hidden, h·d_v].
Tensor plain_output(const LayerView& at) {
  const Tensor weights = at.output();
  const int64_t h = at.model.h, d = at.store->shape().d_v;
  require(weights.rank == 2 && weights.size[1] == h * d, "output",
          "the output matrix is " + weights.shape() + ", and attention gives " + std::to_string(h) + " heads of " +
              std::to_string(d));
  const Tensor flat = at.queue.scratch.take(Dtype::F32, {weights.size[0], h * d});
  at.run().dequantise(at.queue, weights, flat);
  return flat;
}

}  // namespace

Ragged output_lengths(const LayerView& at) {
  Queue& queue = at.queue;
  const int64_t h = at.model.h, g = at.store->shape().kv_heads, group = h / g, d = at.store->shape().d_v,
                all = at.store->segments();
  const Ragged out = at.per_entry(group);
  const Scratch scratch(queue.scratch);
  const Tensor flat = plain_output(at);
  const int64_t hidden = flat.size[0];
  // ‖W v‖² = v·(WᵀW v): a product as wide as a head, not as the model.
  const Tensor columns = queue.scratch.take(Dtype::F32, {h * d, hidden}),
               grams = queue.scratch.take(Dtype::F32, {h * d, d});
  compute(queue, load(flat, channel() * (h * d) + place()), columns);
  for (int64_t head = 0; head < h; ++head) {
    const Tensor own = columns.slice(0, head * d, (head + 1) * d);
    queue.run->matmul(queue, own, own, {}, false, grams.slice(0, head * d, (head + 1) * d));
  }
  const Ragged values = stored_values(at);
  for (int64_t member = 0; member < group; ++member) {
    const Scratch products(queue.scratch);
    const Tensor own = queue.scratch.take(Dtype::F32, {all * d, d});
    const Num head = mod(floor_div(place(), d), g) * group + member;
    compute(queue, load(grams, (head * d + mod(place(), d)) * d + channel()), own);
    const Ragged squares = row_dots(queue, values, transformed(queue, values, own.reshape({all, d, d})));
    const Tensor column = out.values.reshape({out.values.size[0], group}).slice(1, member, member + 1);
    compute(queue, sqrt(max(0, load(squares.values, index()))), column);
  }
  return out;
}

Ragged output_norms(const LayerView& at) {
  Queue& queue = at.queue;
  const int64_t h = at.model.h, g = at.store->shape().kv_heads, group = h / g, d = at.store->shape().d_v,
                all = at.store->segments();
  const Ragged out = at.per_entry();
  compute(queue, out, 0, out.values);
  const Scratch scratch(queue.scratch);
  const Ragged values = stored_values(at);
  // The columns of each head as rows of their own: [h · hidden, d_v].
  const Tensor flat = plain_output(at);
  const int64_t hidden = flat.size[0];
  Ragged heads;
  heads.heads = h, heads.bound = h * hidden;
  heads.values = queue.scratch.take(Dtype::F32, {h * hidden, d});
  heads.offsets = compute(queue, Dtype::I64, {h + 1}, index() * hidden);
  const Heads split{.x = flat.reshape({hidden, h, d}), .out = heads};
  queue.run->split_heads(queue, compute(queue, Dtype::I64, {2}, index() * hidden), 0, {&split, 1});
  constexpr int64_t part = 128;  // outputs at a time: bounds what a long text's products take
  for (int64_t member = 0; member < group; ++member)
    for (int64_t begin = 0; begin < hidden; begin += part) {
      const Scratch products(queue.scratch);
      const int64_t cols = std::min(part, hidden - begin);
      const Num first = (mod(index(), g) * group + member) * hidden + begin;
      Ragged rows = heads;
      rows.heads = g;
      rows.offsets = compute(queue, Dtype::I64, {all + 1}, first);
      rows.ends = compute(queue, Dtype::I64, {all}, first + cols);
      Grids y, sums;
      y.rows = sums.rows = compute(queue, Dtype::I64, {all}, length_of(values, index()));
      y.cols = compute(queue, Dtype::I64, {all}, cols), sums.cols = compute(queue, Dtype::I64, {all}, 1);
      y.cells.heads = g, y.cells.bound = values.bound * cols;
      y.cells.values = queue.scratch.take(Dtype::F32, {y.cells.bound});
      y.cells.offsets = compute(queue, Dtype::I64, {all + 1}, load(values.offsets, index()) * cols);
      sums.cells = like(queue, out);
      Proxy product;
      product.scale = 1, product.causal = false;
      queue.run->proxy(queue, values, rows, product, y);
      queue.run->combine(queue, y.cells.values, y.cells.values, Combine::Max, -1, y.cells.values);  // |y|
      queue.run->reduce(queue, y, {.to = Reduce::To::Rows}, sums);
      queue.run->combine(queue, out.values, sums.cells.values, Combine::Add, 1 / float(group), out.values);
    }
  return out;
}

Ragged sums_by(Queue& queue, const Ragged& x, const Tensor& to, const Ragged& like) {
  // The gradient of picked rows: each picks one value with weight 1, e^(0 − 0).
  const int64_t rows = x.values.size[0], places = like.values.size[0], w = width(x);
  const auto zeros = [&](int64_t n, int64_t columns) { return compute(queue, Dtype::F32, {n, columns}, 0); };
  Ragged q = x, k = like, v = like, out = like;
  q.heads = k.heads = v.heads = 1;  // segments of a sequence may be unequally long
  q.values = zeros(rows, 1), k.values = zeros(places, 1), v.values = zeros(places, w);
  Plan picks = tokens_plan(queue, Plan::Scope::QueryHead, 1, to,
                           compute(queue, Dtype::I32, {rows}, load(to, index()) >= 0), 1);
  picks.causal = false;
  out.values = queue.scratch.take(Dtype::F32, {places, w});
  const Tensor d_q = queue.scratch.take(Dtype::F32, {rows, 1}), d_k = queue.scratch.take(Dtype::F32, {places, 1});
  queue.run->attend_backward(queue, q, k, v, picks, {}, zeros(rows, w), compute(queue, Dtype::F32, {rows}, 0),
                             x.values.reshape({rows, w}), d_q, d_k, out.values, {}, {});
  if (x.values.rank == 1) out.values = out.values.reshape({places});
  return out;
}

Ragged range_means(Queue& queue, const Ragged& like, const Ragged& x, const Num& first, const Num& last) {
  // Attention that weighs all it sees alike.
  const int64_t rows = like.values.size[0], count = x.values.size[0], w = width(x);
  Ragged q = like, k = x, v = x, out = like;
  q.heads = k.heads = v.heads = 1;
  q.values = compute(queue, Dtype::F32, {rows, 1}, 0), k.values = compute(queue, Dtype::F32, {count, 1}, 0);
  v.values = x.values.reshape({count, w});
  const Tensor begins = queue.scratch.take(Dtype::I32, {rows}), ends = queue.scratch.take(Dtype::I32, {rows});
  compute(queue, q, first, begins), compute(queue, q, last, ends);
  Plan ranges = ranges_plan(queue, Plan::Scope::QueryHead, 1, rows, {load(begins, index()), load(ends, index())});
  ranges.causal = false;
  out.values = queue.scratch.take(Dtype::F32, {rows, w});
  queue.run->attend(queue, q, k, v, ranges, {}, out.values, {});
  if (x.values.rank == 1) out.values = out.values.reshape({rows});
  return out;
}

Ragged without_first(Queue& queue, const Ragged& x, int64_t rows) {
  Ragged out = x;
  const int64_t all = x.segments();
  const Num s = index();
  const Tensor starts = compute(queue, Dtype::I64, {all + 1},
                                pick(s < all, min(begin_of(x, s) + rows, end_of(x, min(s, all - 1))), load(x.offsets, s)));
  out.ends = compute(queue, Dtype::I64, {all}, end_of(x, s));
  out.offsets = starts;
  return out;
}

Ragged members(Queue& queue, const Ragged& q, int64_t group, int64_t member) {
  Ragged out = q;
  const int64_t all = q.segments() / group;
  out.heads = q.heads / group;
  const Num of = index() * group + member;
  out.offsets = compute(queue, Dtype::I64, {all + 1}, pick(index() < all, begin_of(q, of), load(q.offsets, q.segments())));
  out.ends = compute(queue, Dtype::I64, {all}, end_of(q, of));
  return out;
}

Tensor passing(const Allocation& a, float least) {
  const int64_t layers = int64_t(a.scores.size()), all = a.scores[0].segments();
  const Tensor counts = a.queue.scratch.take(Dtype::I32, {layers, all});
  const Scratch scratch(a.queue.scratch);
  for (int64_t l = 0; l < layers; ++l) {
    const Ragged& scores = a.scores[size_t(l)];
    const int64_t capacity = std::max<int64_t>(1, scores.bound);
    Select best;
    best.by = Select::By::Threshold, best.p = least;
    const Tensor index = a.queue.scratch.take(Dtype::I32, {all * capacity});
    a.queue.run->select(a.queue, scores, best, capacity, index, counts.select(0, l));
  }
  return counts;
}

Ragged newest_seen(const LayerView& at) {
  const Ragged age = at.per_entry();
  compute(at.queue, age, pick(place() < length() - at.model.window(at.layer), -kInfinity, place()), age.values);
  return age;
}

Ragged by_age(const LayerView& at, int64_t sinks) { return force(at.queue, stored_positions(at), sinks, 0); }

}  // namespace heed
