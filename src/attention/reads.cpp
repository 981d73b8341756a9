#include "attention/reads.h"

#include <algorithm>

#include "attention/plans.h"
#include "attention/select.h"

namespace heed {

Ragged by_query_head(Queue& queue, const Ragged& columns, int64_t group) {
  std::vector<int64_t> lengths;
  for (int64_t s = 0; s < columns.segments() * group; ++s) lengths.push_back(columns.length(s / group));
  const Ragged out = numbers(queue, lengths, columns.heads * group);
  const Tensor entries = columns.values.reshape({columns.bound, group});
  for (int64_t s = 0; s < out.segments(); ++s)
    copy(entries.slice(0, columns.begin(s / group), columns.end(s / group)).select(1, s % group), out.segment(s));
  return out;
}

Read best_entries(LayerView& at, Plan::Scope scope, const Ragged& scores, std::span<const int64_t> counts) {
  Ragged rows = scores;
  Select best;
  std::vector<int64_t> with;  // segments whose sequence asks
  for (int64_t s = 0; s < scores.segments(); ++s)
    if (at.q.length(s / scores.heads * at.q.heads) > 0) with.push_back(s);
  const int64_t all = int64_t(with.size());
  rows.offsets = at.queue.scratch.take(Dtype::I64, {all + 1}), rows.ends = at.queue.scratch.take(Dtype::I64, {all});
  best.count = at.queue.scratch.take(Dtype::I32, {all});
  int64_t capacity = 1;
  for (int64_t r = 0; r < all; ++r) {
    const int64_t s = with[size_t(r)], count = std::min(counts[size_t(s / scores.heads)], scores.length(s));
    rows.offsets.at<int64_t>(r) = scores.begin(s), rows.ends.at<int64_t>(r) = scores.end(s);
    best.count.at<int32_t>(r) = int32_t(count);
    capacity = std::max(capacity, count);
  }
  rows.offsets.at<int64_t>(all) = scores.bound;
  rows.heads = 1;
  const Tensor index = at.queue.scratch.take(Dtype::I32, {all * capacity}),
               count = at.queue.scratch.take(Dtype::I32, {all});
  at.run().select(at.queue, rows, best, capacity, index, count);
  Read read;
  read.plan = tokens_plan(at.queue, scope, 1, index, count, capacity);
  return read;
}

void HeldRead::hold(const Read& read) {
  auto fit = [](Buffer& buffer, const Tensor& like) {
    if (!buffer || buffer->numel() != like.numel()) buffer = Buffer(Dtype::I32, {like.numel()});
  };
  fit(index_, read.plan.index), fit(count_, read.plan.count);
  copy(read.plan.index, index_), copy(read.plan.count, count_);
  scope_ = read.plan.scope;
}

Read HeldRead::read(Queue& queue) const {
  Read out;
  if (index_) out.plan = tokens_plan(queue, scope_, 1, index_, count_, index_->numel() / count_->numel());
  return out;
}

std::unique_ptr<State> HeldRead::clone() const {
  auto out = std::make_unique<HeldRead>();
  if (!index_) return out;
  out->index_ = Buffer(Dtype::I32, {index_->numel()}), out->count_ = Buffer(Dtype::I32, {count_->numel()});
  copy(index_, out->index_), copy(count_, out->count_);
  out->scope_ = scope_;
  return out;
}

}  // namespace heed
