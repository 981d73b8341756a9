#include "attention/reads.h"

#include <algorithm>

#include "attention/plans.h"
#include "attention/scores.h"
#include "attention/select.h"

namespace heed {

Read best_entries(LayerView& at, Plan::Scope scope, const Ragged& scores, std::span<const int64_t> counts) {
  const Ragged rows = with_queries(at, scores);
  const int64_t all = rows.segments();
  const int64_t capacity = std::max<int64_t>(
      1, std::min(*std::max_element(counts.begin(), counts.end()), at.store->longest()));
  Select best;
  const Num segment = query_segment(at, index(), scores.heads);
  best.count = compute(at.queue, Dtype::I32, {all},
                       min(of_sequence(at.queue, counts, segment, scores.heads), length_of(rows, index())));
  const Tensor chosen = at.queue.scratch.take(Dtype::I32, {all * capacity}),
               count = at.queue.scratch.take(Dtype::I32, {all});
  at.run().select(at.queue, rows, best, capacity, chosen, count);
  Read read;
  read.plan = tokens_plan(at.queue, scope, 1, chosen, count, capacity);
  return read;
}

bool reads_all(const LayerView& at, int dense) {
  return (at.layer < dense && at.model.layers > dense) || at.mods.window > 0;
}

Num held_entries(LayerView& at, const Num& segment, int64_t heads) {
  return load(at.store->pages().length, floor_div(segment, heads / at.store->shape().kv_heads));
}

Ragged block_scores(LayerView& at, const Ragged& q, const std::string& low, const std::string& high, int block) {
  const int64_t h = q.heads, all = q.segments(), most = (at.store->longest() + block - 1) / block;
  const Ragged scores = numbers(at.queue, all, ceil_div(held_entries(at, index(), h), block), h, all * most);
  at.run().page_score(at.queue, q, at.store->pages(), at.stores->column(low), at.stores->column(high), scores);
  return scores;
}

Ragged over_group(LayerView& at, const Ragged& scores, Spread::Of of) {
  const int64_t group = at.model.group(), heads = scores.heads / group;
  Ragged groups = scores;
  groups.heads = group;
  Ragged out = members(at.queue, spread(at.queue, groups, {.of = of, .over = Spread::Over::Heads}), group, 0);
  out.heads = heads;
  return out;
}

Read chosen_blocks(LayerView& at, Plan::Scope scope, const Ragged& scores, const Select& how, int block, int64_t capacity) {
  const Ragged rows = with_queries(at, scores);
  const int64_t all = rows.segments();
  const Tensor index = at.queue.scratch.take(Dtype::I32, {all * capacity}),
               count = at.queue.scratch.take(Dtype::I32, {all});
  at.run().select(at.queue, rows, how, capacity, index, count);
  Read read;
  read.plan = blocks_plan(at.queue, scope, 1, block, index, count, capacity);
  return read;
}

Read best_blocks(LayerView& at, Plan::Scope scope, const Ragged& scores, int block,
                 const std::function<Num(const Num& segment)>& count, int64_t capacity) {
  const Tensor counts = compute(at.queue, Dtype::I32, {scores.segments()}, count(index()));
  Select best;
  best.count = compute(at.queue, Dtype::I32, {with_queries(at, scores).segments()},
                       load(counts, query_segment(at, index(), scores.heads)));
  return chosen_blocks(at, scope, scores, best, block, capacity);
}

void HeldRead::hold(Queue& queue, const Read& read) {
  auto kept = [&](const Tensor& from) {
    auto out = std::make_shared<Buffer>(Dtype::I32, std::initializer_list<int64_t>{from.numel()}, *queue.memory);
    queue.move(from, *out);
    return out;
  };
  index_ = kept(read.plan.index), count_ = kept(read.plan.count);
  scope_ = read.plan.scope;
}

Read HeldRead::read(Queue& queue) const {
  Read out;
  if (index_) out.plan = tokens_plan(queue, scope_, 1, *index_, *count_, (*index_)->numel() / (*count_)->numel());
  return out;
}

std::unique_ptr<State> HeldRead::clone() const { return std::make_unique<HeldRead>(*this); }

}  // namespace heed
