#include "mechanisms/keep/recent_queries.h"

#include "attention/select.h"

namespace heed::mechanisms {

void RecentQueries::take(const LayerView& at) {
  Queue& queue = at.queue;
  Layer& held = layers_[size_t(at.layer)];
  const int64_t all = at.q.segments(), d = at.q.values.size[1];
  auto made = [&](Dtype type, std::initializer_list<int64_t> sizes) {
    return std::make_shared<Buffer>(type, sizes, *queue.memory);
  };
  const auto q = made(Dtype::F32, {all * rows_, d}), position = made(Dtype::I32, {all * rows_}),
             count = made(Dtype::I32, {all});
  // Row r from the end is the new one there, or the one that stood so many rows nearer to the end.
  const Num s = floor_div(place(), rows_), row = end_of(at.q, s) - rows_ + mod(place(), rows_),
            is_new = row >= begin_of(at.q, s), old = place() + length_of(at.q, s);
  compute(queue,
          pick(is_new, load(at.q.values, row * d + channel()), held.q ? load(*held.q, old * d + channel()) : Num(0)), *q);
  compute(queue, pick(is_new, load(at.q_pos, row), held.position ? load(*held.position, old) : Num(0)), *position);
  compute(queue, min(rows_, length_of(at.q, index()) + (held.count ? load(*held.count, index()) : Num(0))), *count);
  held = {q, position, count};
}

Ragged RecentQueries::rows(const LayerView& at) const {
  Queue& queue = at.queue;
  const Layer& held = layers_[size_t(at.layer)];
  const int64_t all = at.q.segments();
  Ragged out;
  out.values = *held.q, out.heads = at.q.heads, out.bound = all * rows_;
  const Num s = index();
  out.offsets = compute(queue, Dtype::I64, {all + 1}, (s + 1) * rows_ - pick(s < all, load(*held.count, s), rows_));
  out.ends = compute(queue, Dtype::I64, {all}, (s + 1) * rows_);
  return out;
}

Ragged RecentQueries::logits(const LayerView& at) const {
  Queue& queue = at.queue;
  const Layer& held = layers_[size_t(at.layer)];
  const int64_t group = at.model.group(), runs = at.store->segments() * rows_ * group;
  const Num kv = floor_div(index(), rows_ * group), back = mod(floor_div(index(), group), rows_),
            head = kv * group + mod(index(), group), row = head * rows_ + back;
  Ragged each;
  each.values = *held.q, each.heads = at.q.heads * rows_, each.bound = (*held.q)->size[0];
  each.offsets = compute(queue, Dtype::I64, {runs + 1}, min(row, each.bound));
  each.ends = compute(queue, Dtype::I64, {runs}, row + (back >= rows_ - load(*held.count, head)));
  Observe how;
  how.rows = Observe::Rows::Last, how.heads = Observe::Heads::Each, how.logits = true;
  Mods mods = at.mods;
  mods.q_pos = *held.position;
  // What a plan or a read gave to this step's rows is not known of earlier ones.
  mods.gain = mods.temperature = mods.row_factor = mods.key_factor = {};
  Plan all;
  all.causal = at.plan.causal;
  const Ragged columns = at.per_entry(group * rows_);
  at.run().observe(queue, each, at.keys(), &all, mods, how, columns);
  return by_query_head(queue, columns, group * rows_);
}

}  // namespace heed::mechanisms
