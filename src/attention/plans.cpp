#include "attention/plans.h"

#include <algorithm>

#include "attention/numbers.h"
#include "attention/select.h"
#include "kernels/plan_spans.h"

namespace heed {

Plan ranges_plan(Queue& queue, Plan::Scope scope, int q_tile, int64_t rows, const KeyRange& first, const KeyRange& second) {
  const auto kept = [&](const Num& what) { return compute(queue, Dtype::I32, {rows}, what); };
  const Tensor begin = kept(first.begin), end = kept(first.end), next = kept(second.begin), last = kept(second.end);
  const auto there = [&](const Num& row) { return load(begin, row) < load(end, row); };
  const Num row = floor_div(place(), 2);
  Plan plan;
  plan.form = Plan::Form::Interval, plan.scope = scope, plan.q_tile = q_tile, plan.nnz_bound = 2 * rows;
  plan.rowptr = compute(queue, Dtype::I64, {rows + 1}, 2 * index());
  plan.count = kept(there(index()) + (load(next, index()) < load(last, index())));
  plan.index = compute(queue, Dtype::I32, {2 * rows, 2},
                       pick(mod(place(), 2) == 0 && there(row), pick(channel() == 0, load(begin, row), load(end, row)),
                            pick(channel() == 0, load(next, row), load(last, row))));
  return plan;
}

void see_until(LayerView& at, const Range& heads, const Num& last) {
  const Num inside = among(at.queue, heads, at.k.heads, mod(segment(), at.k.heads));
  at.mods.until = at.queue.scratch.take(Dtype::I32, {at.k.values.size[0]});
  compute(at.queue, at.k, pick(inside, min(last, kAlways), kAlways), at.mods.until);
}

void each_interval(const Plan& plan, const Ragged& q, const Ragged& k, const Mods& mods, int64_t s, int64_t head_number,
                   const std::function<void(int64_t, int64_t, int64_t)>& visit) {
  const PlanRows rows(plan, q, k.heads);
  const PlanHead head(plan, rows, q, k, s, head_number);
  const int64_t tile = plan.form == Plan::Form::Dense ? std::max<int64_t>(1, head.n) : plan.q_tile;
  for (int64_t first = 0; first < head.n; first += tile) {
    const int64_t row = head.plan_row + (plan.form == Plan::Form::Dense ? 0 : first / tile);
    const Spans spans = named_keys(plan, row, head.m);
    for (int64_t i = first; i < std::min(first + tile, head.n); ++i) {
      const auto [low, high] = visible_keys(head, plan, mods, i);
      auto emit = [&](int64_t begin, int64_t end) {
        begin = std::max(begin, low), end = std::min(end, high);
        if (begin >= end) return;
        if (!mods.until) return visit(i, begin, end);
        const int64_t position = mods.q_pos ? mods.q_pos.at<int32_t>(head.q_row + i) : head.m - head.n + i;
        for (int64_t j = begin; j < end; ++j)
          if (mods.until.at<int32_t>(head.k_row + j) >= position) visit(i, j, j + 1);
      };
      if (!masked(plan)) {
        for (const auto& [begin, end] : spans) emit(begin, end);
        continue;
      }
      const int64_t words = (plan.k_tile + 63) / 64;
      for (int64_t e = plan.begin(row); e < plan.end(row); ++e) {
        const int64_t at = int64_t(plan.index.at<int32_t>(e)) * plan.k_tile;
        const int32_t mask = plan.mask.at<int32_t>(e);
        if (mask < 0) {
          emit(at, std::min(at + plan.k_tile, head.m));
          continue;
        }
        for (int64_t j = 0; j < plan.k_tile && at + j < head.m; ++j) {
          const uint64_t* bits = plan.bits.as<uint64_t>() + (int64_t(mask) * plan.q_tile + (i - first)) * words;
          if (bits[j / 64] >> (j % 64) & 1) emit(at + j, at + j + 1);
        }
      }
    }
  }
}

std::vector<double> density(Queue& queue, const Plan& plan, const Ragged& q, const Keys& keys, const Mods& mods) {
  std::vector<double> out(size_t(q.heads), 1.0);
  if (plan.form == Plan::Form::Dense && !mods.until) return out;
  Scratch scope(queue.scratch);
  const Tensor pairs = queue.scratch.take(Dtype::F64, {2, q.heads});
  count_density(queue, plan, q, keys, mods, pairs);
  const Buffer counted = queue.read_back(pairs);
  for (int64_t head = 0; head < q.heads; ++head)
    if (const double possible = counted->at<double>(1, head); possible > 0)
      out[size_t(head)] = counted->at<double>(0, head) / possible;
  return out;
}

void count_density(Queue& queue, const Plan& plan, const Ragged& q, const Keys& keys, const Mods& mods, const Tensor& pairs) {
  Plan all;
  all.causal = plan.causal;
  Mods plain = mods;
  plain.until = {};
  queue.fill(pairs, 0);
  queue.run->count_pairs(queue, plan, q, keys, mods, pairs.select(0, 0));
  queue.run->count_pairs(queue, all, q, keys, plain, pairs.select(0, 1));
}

Cost cost(const Plan& plan, const Ragged& q, const Ragged& k, const Mods& mods, int64_t d_v) {
  const PlanRows rows(plan, q, k.heads);
  const int64_t d = k.values.rank > 1 ? k.values.size[1] : 1;
  const double entry = double(d + d_v) * double(info(k.values.type).bytes);
  Cost out;
  Queue queue;
  Buffer computed = Buffer::zeros(Dtype::F64, {q.heads});
  reference_kernels().count_pairs(queue, plan, q, {.panel = &k, .pages = nullptr, .read = nullptr}, mods, computed);
  for (double pairs : computed->span<double>()) out.pairs += pairs;
  for (int64_t s = 0; s < q.sequences(); ++s)
    for (int64_t number = 0; number < q.heads; ++number) {
      if (number % (q.heads / k.heads) != 0) continue;  // a group reads its keys once
      const PlanHead head(plan, rows, q, k, s, number);
      const bool dense = plan.form == Plan::Form::Dense;
      const int64_t tiles = dense ? 1 : (head.n + plan.q_tile - 1) / plan.q_tile;
      for (int64_t t = 0; t < tiles; ++t)
        for (const auto& [begin, end] : named_keys(plan, head.plan_row + t, head.m))
          out.bytes += double(end - begin) * entry;
    }
  out.flops = 2 * out.pairs * double(d + d_v);
  return out;
}

namespace {
Plan listed(Queue& queue, Plan::Scope scope, int q_tile, int k_tile, Tensor index, Tensor count, int64_t capacity) {
  Plan plan;
  plan.scope = scope, plan.q_tile = q_tile, plan.k_tile = k_tile;
  plan.index = index, plan.count = count;
  const int64_t rows = count.size[0];
  plan.rowptr = compute(queue, Dtype::I64, {rows + 1}, heed::index() * capacity);
  plan.nnz_bound = rows * capacity;
  return plan;
}
}  // namespace

Plan blocks_plan(Queue& queue, Plan::Scope scope, int q_tile, int k_tile, Tensor index, Tensor count, int64_t capacity) {
  Plan plan = listed(queue, scope, q_tile, k_tile, index, count, capacity);
  plan.form = Plan::Form::Blocks;
  return plan;
}

Plan tokens_plan(Queue& queue, Plan::Scope scope, int q_tile, Tensor index, Tensor count, int64_t capacity) {
  Plan plan = listed(queue, scope, q_tile, 1, index, count, capacity);
  plan.form = Plan::Form::Tokens;
  return plan;
}

Plan limit_heads(LayerView& at, const Plan& plan, const Ragged& keys, int64_t key_bound, const Range& heads) {
  if (heads.all() || plan.form == Plan::Form::Dense) return plan;
  // A scope wider than a query head is split, so that some heads of it can differ.
  Queue& queue = at.queue;
  const int64_t h = at.q.heads, g = keys.heads, shared = scope_heads(plan.scope, h, g);
  const bool interval = plan.form == Plan::Form::Interval;
  std::vector<int64_t> source, segment_of;  // of each new row: the old row, −1 for a dense one; the segment of its keys
  int64_t start = 0, dense = 0;
  for (int64_t s = 0; s < at.sequences(); ++s) {
    const int64_t tiles = (at.rows[size_t(s)] + plan.q_tile - 1) / plan.q_tile;
    for (int64_t head = 0; head < h; ++head)
      for (int64_t t = 0; t < tiles; ++t) {
        const bool inside = heads.holds(int(head), int(h));
        source.push_back(inside ? start + head * shared / h * tiles + t : -1);
        segment_of.push_back(s * g + head * g / h);
        dense += !inside;
      }
    start += shared * tiles;
  }
  const int64_t rows = int64_t(source.size()), listing = interval ? 1 : (key_bound + plan.k_tile - 1) / plan.k_tile;
  const Tensor from = queue.upload(source), of = queue.upload(segment_of);
  auto inside = [&](const Num& r) { return load(from, r) >= 0; };
  auto begin = [&](const Num& r) { return load(plan.rowptr, load(from, r)); };
  const Num row = index(), m = length_of(keys, load(of, row));
  const Num entries = plan.count ? load(plan.count, load(from, row)) : load(plan.rowptr, load(from, row) + 1) - begin(row);
  Plan out = plan;
  out.scope = Plan::Scope::QueryHead;
  out.count = {};
  out.nnz_bound = plan.nnz_bound * (h / shared) + dense * listing;
  out.rowptr = offsets_of(queue, rows, pick(inside(row), entries, interval ? Num(1) : ceil_div(m, plan.k_tile)));
  Ragged listed;
  listed.offsets = out.rowptr, listed.bound = out.nnz_bound;
  const Num chosen = inside(segment()), entry = begin(segment()) + place();
  auto make = [&](const Tensor& old, const Num& otherwise) {
    const Tensor made = queue.scratch.take(Dtype::I32, {out.nnz_bound});
    compute(queue, listed, pick(chosen, load(old, entry), otherwise), made);
    return made;
  };
  if (interval) {
    out.index = queue.scratch.take(Dtype::I32, {out.nnz_bound, 2});
    const Num all = pick(channel() == 0, 0, length_of(keys, load(of, segment())));
    compute(queue, listed, pick(chosen, load(plan.index, entry * 2 + channel()), all), out.index);
  } else {
    out.index = make(plan.index, place());
  }
  if (plan.mask) out.mask = make(plan.mask, -1);
  if (plan.part) out.part = make(plan.part, 0);
  return out;
}

}  // namespace heed
