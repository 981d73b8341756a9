#include <algorithm>
#include <limits>

#include "attention/mechanism.h"

namespace heed {

Ragged LayerView::last_queries(int64_t rows) const {
  Ragged out = q;
  const int64_t segments = q.segments();
  out.offsets = queue.scratch.take(Dtype::I64, {segments + 1});
  out.ends = queue.scratch.take(Dtype::I64, {segments});
  for (int64_t s = 0; s < segments; ++s) {
    out.offsets.at<int64_t>(s) = std::max(q.begin(s), q.end(s) - rows);
    out.ends.at<int64_t>(s) = q.end(s);
  }
  out.offsets.at<int64_t>(segments) = segments ? q.end(segments - 1) : 0;
  return out;
}

Keys LayerView::keys() const {
  if (decoding()) return {.panel = nullptr, .pages = &store->pages(), .read = &read};
  return {.panel = &k, .pages = nullptr, .read = nullptr};
}

Tensor LayerView::input(const std::string& name, const std::string& shape) const {
  if (inputs)
    if (auto found = inputs->find(name); found != inputs->end()) return found->second;
  throw Error(Code::Invalid, "--input", "'" + name + "' " + shape + " is needed", "give --input " + name + "=FILE.npy");
}

Ragged LayerView::per_entry(int64_t width) const {
  Ragged out;
  out.offsets = store->offsets();
  out.heads = store->shape().kv_heads;
  out.bound = store->entries();
  out.values = width == 1 ? queue.scratch.take(Dtype::F32, {out.bound}) : queue.scratch.take(Dtype::F32, {out.bound, width});
  return out;
}

Ragged LayerView::observe(const Ragged& rows, const Observe& how, const Plan* plan) const {
  Ragged columns = per_entry(how.heads == Observe::Heads::Each ? model.group() : 1);
  Plan all;
  all.causal = this->plan.causal;
  run().observe(queue, rows, keys(), plan ? plan : &all, mods, how, columns);
  return columns;
}

namespace {
int column_number(const Store* stores, const std::string& name) {
  const int number = stores ? stores->column(name) : -1;
  if (number < 0) throw Error(Code::Internal, "column", "'" + name + "' is not among the store's columns");
  return number;
}
}  // namespace

Ragged LayerView::column(const std::string& name) const {
  const int number = column_number(stores, name);
  Ragged values = per_entry(stores->options().columns[size_t(number)].width);
  run().column_read(queue, store->pages(), number, values);
  return values;
}

void LayerView::set_column(const std::string& name, const Ragged& values) const {
  run().column_write(queue, store->pages(), column_number(stores, name), values);
}

Tensor Mechanism::allocate(const Allocation& a) const {
  const int64_t layers = int64_t(a.scores.size()), segments = a.scores[0].segments(), g = a.scores[0].heads;
  Tensor counts = a.queue.scratch.take(Dtype::I32, {layers, segments});
  for (int64_t l = 0; l < layers; ++l)
    for (int64_t s = 0; s < segments; ++s)
      counts.at<int32_t>(l, s) = int32_t(a.budget.entries(a.prompt[size_t(s / g)]));
  return counts;
}

Ragged force(Queue&, Ragged scores, int64_t sinks, int64_t recent) {
  constexpr float always = std::numeric_limits<float>::infinity();
  float* x = scores.values.as<float>();
  for (int64_t s = 0; s < scores.segments(); ++s) {
    const int64_t begin = scores.begin(s), end = scores.end(s);
    std::fill(x + begin, x + std::min(begin + sinks, end), always);
    std::fill(x + std::max(begin, end - recent), x + end, always);
  }
  return scores;
}

void evict(LayerView& at, const Ragged& scores, Tensor counts, const Range& heads) {
  const int64_t segments = scores.segments(), capacity = std::max<int64_t>(1, at.store->longest());
  bool cut = false;
  for (int64_t s = 0; s < segments; ++s) {
    int32_t& count = counts.at<int32_t>(s);
    const int32_t length = int32_t(at.store->length(s));
    if (!heads.holds(int(s % scores.heads), int(scores.heads))) count = length;
    count = std::clamp(count, 0, length);
    cut |= count < length;
  }
  if (!cut) return;
  Tensor index = at.queue.scratch.take(Dtype::I32, {segments * capacity});
  Tensor chosen = at.queue.scratch.take(Dtype::I32, {segments});
  at.run().select(at.queue, scores, {.by = Select::By::TopK, .count = counts}, capacity, index, chosen);
  at.store->compact(at.queue, index, chosen, capacity);
}

}  // namespace heed
