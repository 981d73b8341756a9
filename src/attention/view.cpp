#include <algorithm>

#include "attention/mechanism.h"
#include "attention/select.h"

namespace heed {

Ragged LayerView::last_queries(int64_t count) const {
  Ragged out = q;
  const int64_t all = q.segments();
  out.offsets = compute(queue, Dtype::I64, {all + 1},
                        pick(index() < all, max(begin_of(q, index()), end_of(q, index()) - count), load(q.offsets, all)));
  out.ends = compute(queue, Dtype::I64, {all}, end_of(q, index()));
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

Tensor LayerView::output() const { return output_matrix ? output_matrix : input("output", "[hidden, h·d_v]"); }

Ragged LayerView::per_entry(int64_t width) const {
  Ragged out;
  out.offsets = store->offsets(queue);
  out.heads = store->shape().kv_heads;
  out.bound = store->entries();
  out.values = width == 1 ? queue.scratch.take(Dtype::F32, {out.bound})
                          : queue.scratch.take(Dtype::F32, {out.bound, width});
  return out;
}

Ragged LayerView::observe(const Ragged& rows, const Observe& how, const Plan* plan) const {
  Ragged columns = per_entry(how.heads == Observe::Heads::Each ? model.group() : 1);
  Plan all;
  all.causal = this->plan.causal;
  Observe with = how;
  // What attention itself has summed, when it read the same keys.
  const bool same = plan ? plan == &this->plan : this->plan.form == Plan::Form::Dense;
  if (!decoding() && same && this->plan.parts == 1 && !mods.gain) with.lse = lse;
  run().observe(queue, rows, keys(), plan ? plan : &all, mods, with, columns);
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
  store->write_column(queue, column_number(stores, name), values);
}

Ragged LayerView::bias() const {
  const Ragged values = per_entry();
  run().column_read(queue, store->pages(), kBiasColumn, values);
  return values;
}

void LayerView::set_bias(const Ragged& values) const { store->write_column(queue, kBiasColumn, values); }

Tensor KeepPolicy::allocate(const Allocation& a) const {
  const int64_t layers = int64_t(a.scores.size()), segments = a.scores[0].segments(), g = a.scores[0].heads;
  std::vector<int32_t> counts;
  for (int64_t l = 0; l < layers; ++l)
    for (int64_t s = 0; s < segments; ++s)
      counts.push_back(int32_t(entries(a.budget, a.model, a.first_layer + int(l), a.prompt[size_t(s / g)])));
  if (std::equal(counts.begin() + 1, counts.end(), counts.begin()))
    return compute(a.queue, Dtype::I32, {layers, segments}, counts[0]);
  return a.queue.upload(counts).reshape({layers, segments});
}

Ragged force(Queue& queue, Ragged scores, int64_t sinks, int64_t recent) {
  const Num forced = place() < sinks || place() >= length() - recent;
  compute(queue, scores, pick(forced, kInfinity, load(scores.values, index())), scores.values);
  return scores;
}

void evict(LayerView& at, const KeepPolicy& policy, const Ragged& scores, Tensor counts, std::span<const int64_t> most,
           int64_t together) {
  const Range& heads = policy.heads;
  const int64_t segments = scores.segments(), g = scores.heads, capacity = std::max<int64_t>(1, at.store->longest());
  const Num length = load(at.store->pages().length, index());
  Num many = clamp(load(counts, index()), 0, length);
  if (!heads.all()) many = pick(among(at.queue, heads, g, mod(index(), g)), many, length);
  Select best;
  best.count = compute(at.queue, Dtype::I32, {segments}, many);
  const Lists kept = chosen(at.queue, policy.rank(at, scores, best.count), best, capacity);
  policy.fold(at, kept);
  at.store->compact(at.queue, kept.index, kept.count, capacity, most, together);
}

}  // namespace heed
