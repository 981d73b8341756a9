#include "attention/scores.h"

#include <algorithm>
#include <cmath>
#include <limits>

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

}  // namespace

Ragged stored_keys(const LayerView& at) {
  Ragged keys = at.per_entry(at.store->shape().d);
  keys.values = keys.values.reshape({keys.bound, at.store->shape().d});
  at.run().page_read(at.queue, at.store->pages(), nullptr, keys, {}, {});
  return keys;
}

Ragged stored_values(const LayerView& at) {
  Ragged values = at.per_entry(at.store->shape().d_v);
  values.values = values.values.reshape({values.bound, at.store->shape().d_v});
  at.run().page_read(at.queue, at.store->pages(), nullptr, {}, values, {});
  return values;
}

Ragged stored_positions(const LayerView& at) {
  Ragged out = at.per_entry();
  const Tensor positions = at.queue.scratch.take(Dtype::I32, {out.bound});
  Ragged places = out;  // where each segment's numbers lie; keys and values themselves are not wanted
  places.values = {};
  at.run().page_read(at.queue, at.store->pages(), nullptr, places, {}, positions);
  compute(at.queue, out, load(positions, index()), out.values);
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
  const Tensor out = width > 0 ? queue.scratch.take(Dtype::F32, {rows, width}) : queue.scratch.take(Dtype::F32, {rows});
  queue.run->combine(queue, out, {}, Combine::Power, 0, out);  // whatever lies there: x⁰ = 1, of NaN too
  return out;
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

Ragged by_age(const LayerView& at, int64_t sinks) { return force(at.queue, stored_positions(at), sinks, 0); }

}  // namespace heed
