#include "attention/reads.h"

#include <algorithm>

#include "attention/maps.h"
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

int seeing_all(const ModelInfo& model, int layer) {
  while (layer < model.layers && model.window(layer) > 0) ++layer;
  return layer;
}

Num held_entries(LayerView& at, const Num& segment, int64_t heads) {
  return load(at.store->pages().length, floor_div(segment * at.store->shape().kv_heads, heads));
}

Num decoded_entries(LayerView& at, const Num& segment, int64_t heads) {
  return max(1, held_entries(at, segment, heads) - of_sequence(at.queue, at.prompt, segment, heads));
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

Read best_pages(LayerView& at, const std::string& low, const std::string& high, const Budget& budget, PageChoice how) {
  how.low = at.stores->column(low), how.high = at.stores->column(high);
  how.share = budget.fraction ? budget.amount : 0, how.number = budget.fraction ? 1 : int64_t(budget.amount);
  const bool each = how.of == PageChoice::Of::Each;
  const int64_t block = int64_t(at.stores->options().columns[size_t(how.low)].block) * how.split,
                longest = at.store->longest();
  const auto blocks = [&](int64_t entries) { return (entries + block - 1) / block; };
  const int64_t most = std::max(
      {how.least, blocks(std::min(budget.entries(longest), longest)), blocks(how.sinks) + blocks(how.recent) + 1});
  const int64_t capacity = std::clamp<int64_t>(most, 1, std::max<int64_t>(1, blocks(longest))),
                asking = at.sequences() - std::count(at.rows.begin(), at.rows.end(), 0),
                rows = asking * (each ? at.q.heads : at.store->shape().kv_heads);
  Read read;
  Plan& plan = read.plan;
  plan.form = Plan::Form::Blocks, plan.scope = each ? Plan::Scope::QueryHead : Plan::Scope::KvHead;
  plan.k_tile = int(block), plan.nnz_bound = rows * capacity;
  plan.index = at.queue.scratch.take(Dtype::I32, {plan.nnz_bound});
  plan.count = at.queue.scratch.take(Dtype::I32, {rows});
  plan.rowptr = at.queue.scratch.take(Dtype::I64, {rows + 1});
  at.run().page_choose(at.queue, at.q, at.store->pages(), how, capacity, plan.index, plan.count, plan.rowptr);
  return read;
}

Read named_entries(LayerView& at, Plan::Scope scope, const Ragged& entries, const Num& named) {
  Ragged flags = entries;
  flags.values = at.queue.scratch.take(Dtype::F32, {entries.values.size[0]});
  compute(at.queue, flags, pick(named, 1, 0), flags.values);
  const Lists tokens = chosen(at.queue, with_queries(at, flags), flagged(), std::max<int64_t>(1, at.store->longest()));
  Read read;
  read.plan = tokens_plan(at.queue, scope, 1, tokens.index, tokens.count, tokens.capacity);
  return read;
}

void left_to_edit(LayerView& at, const Range& heads) {
  at.mods.gain = at.queue.scratch.take(Dtype::F32, {at.q.values.size[0]});
  compute(at.queue, at.q, 1 - among(at, heads, mod(segment(), at.q.heads)), at.mods.gain);
}

Tensor biased_output(LayerView& at, const Range& heads, const Ragged& keys, const Tensor& bias) {
  Queue& queue = at.queue;
  const int64_t group = at.model.group(), rows = at.out.size[0], width = at.out.size[1];
  const Tensor out = queue.scratch.take(Dtype::F32, {rows, width}), lse = queue.scratch.take(Dtype::F32, {rows});
  const Ragged values = stored_values(at);
  const Num other = at.stores->options().bias ? load(at.bias().values, index()) : Num(0);
  Mods mods = at.mods;
  mods.gain = {}, mods.key_bias = queue.scratch.take(Dtype::F32, {keys.bound});
  for (int64_t member = 0; member < group; ++member) {
    compute(queue, keys, other + load(bias, index() * group + member), mods.key_bias);
    at.run().attend(queue, members(queue, at.q, group, member), keys, values, {}, mods, out, lse);
  }
  const Num inside = among(at, heads, mod(segment(), at.q.heads));
  compute(queue, at.q, pick(inside, load(lse, index()), load(at.lse, index())), at.lse);
  compute(queue, at.q, pick(inside, load(out, index()), load(at.out, index())), out);
  return out;
}

std::string whole_groups(const Range& heads) {
  return heads.all() ? "" : "heads=" + heads.text + ": keys are moved for all heads of a layer; name layers instead";
}

Num query_position(LayerView& at) {
  return load(at.q_pos, begin_of(at.q, floor_div(segment(), at.store->shape().kv_heads) * at.q.heads));
}

Ragged entry_places(LayerView& at, const Num& place) {
  Ragged out;
  out.offsets = at.store->offsets(at.queue), out.heads = at.store->shape().kv_heads, out.bound = at.store->entries();
  out.values = at.queue.scratch.take(Dtype::I32, {out.bound});
  compute(at.queue, out, place, out.values);
  return out;
}

Ragged gathered_places(LayerView& at, const Plan& read) {
  const int64_t g = at.store->shape().kv_heads, shared = scope_heads(read.scope, at.q.heads, g);
  require(shared <= g, "gathered places", "query heads of one KV head read keys at different places");
  std::vector<int64_t> first;  // row of the plan for each sequence; one without a new token has none
  for (int64_t next = 0; int64_t rows : at.rows) first.push_back(next), next += rows > 0 ? shared : 0;
  const Num row = of_sequence(at.queue, first, index(), g) + floor_div(mod(index(), g) * shared, g);
  const int64_t all = at.store->segments(), block = read.k_tile;
  const Tensor begins = compute(at.queue, Dtype::I64, {all}, load(read.rowptr, row)),
               counts = compute(at.queue, Dtype::I32, {all}, load(read.count, row));
  const Num begin = load(begins, segment()), count = load(counts, segment());
  const Num before = find(read.index, begin, begin + count, floor_div(place(), block)) - begin;
  const Num own = before * block + mod(place(), block), last = (count - 1) * block + mod(length() - 1, block);
  return entry_places(at, query_position(at) - last + own);
}

void HeldRead::hold(Queue& queue, const Read& read) {
  rows_ = read.plan.count.numel(), capacity_ = rows_ > 0 ? read.plan.index.numel() / rows_ : 0, scope_ = read.plan.scope;
  const int64_t need = rows_ * (capacity_ + 1);
  if (lists_.empty() || lists_.back()->numel() < need)
    lists_.emplace_back(Dtype::I32, std::initializer_list<int64_t>{need + need / 4}, *queue.memory);
  queue.move(read.plan.count, lists_.back()->slice(0, 0, rows_));
  queue.move(read.plan.index, lists_.back()->slice(0, rows_, need));
}

Read HeldRead::read(Queue& queue) const {
  Read out;
  if (rows_ == 0) return out;
  out.plan = tokens_plan(queue, scope_, 1, lists_.back()->slice(0, rows_, rows_ * (capacity_ + 1)),
                         lists_.back()->slice(0, 0, rows_), capacity_);
  return out;
}

}  // namespace heed
