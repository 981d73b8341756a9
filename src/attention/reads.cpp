#include "attention/reads.h"

#include <algorithm>

#include "attention/plans.h"
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
