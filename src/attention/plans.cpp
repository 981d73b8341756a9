#include "attention/plans.h"

#include <algorithm>
#include <bit>
#include <limits>

namespace heed {
namespace {

using Spans = std::vector<std::pair<int64_t, int64_t>>;

// The query and key counts, positions and first plan row of one (sequence, query head).
struct Head {
  int64_t n, m, q_row, k_row, plan_row;
  Head(const Plan& plan, const PlanRows& rows, const Ragged& q, const Ragged& k, int64_t s, int64_t head)
      : n(q.length(s * q.heads + head)),
        m(k.length(s * k.heads + head * k.heads / q.heads)),
        q_row(q.begin(s * q.heads + head)),
        k_row(k.begin(s * k.heads + head * k.heads / q.heads)),
        plan_row(plan.form == Plan::Form::Dense ? 0 : rows.row(s, head, q.heads, 0, plan.q_tile)) {}
};

// Keys that a plan row names, as ascending disjoint spans; bit-masked blocks are left whole.
Spans named(const Plan& plan, int64_t row, int64_t m) {
  Spans out;
  if (plan.form == Plan::Form::Dense) return {{0, m}};
  auto add = [&](int64_t begin, int64_t end) {
    end = std::min(end, m);
    if (begin >= end) return;
    if (!out.empty() && out.back().second == begin) out.back().second = end;
    else out.emplace_back(begin, end);
  };
  for (int64_t e = plan.begin(row); e < plan.end(row); ++e) switch (plan.form) {
      case Plan::Form::Interval: add(plan.index.at<int32_t>(e, 0), plan.index.at<int32_t>(e, 1)); break;
      case Plan::Form::Blocks: {
        const int64_t block = plan.index.at<int32_t>(e);
        add(block * plan.k_tile, (block + 1) * plan.k_tile);
        break;
      }
      default: add(plan.index.at<int32_t>(e), plan.index.at<int32_t>(e) + 1);
    }
  return out;
}

// What causality and the window leave to query row i: [low, high).
std::pair<int64_t, int64_t> visible(const Head& head, const Plan& plan, const Mods& mods, int64_t i) {
  int64_t high = plan.causal ? std::min(head.m, head.m - head.n + i + 1) : head.m, low = 0;
  if (mods.window > 0) {
    const int64_t position = mods.q_pos ? mods.q_pos.at<int32_t>(head.q_row + i) : head.m - head.n + i;
    if (mods.k_pos) {
      const int32_t* keys = mods.k_pos.as<int32_t>() + head.k_row;
      low = std::upper_bound(keys, keys + head.m, position - mods.window) - keys;
    } else {
      low = std::max<int64_t>(0, position - mods.window + 1);
    }
  }
  return {low, std::max(low, high)};
}

bool masked(const Plan& plan) { return plan.form == Plan::Form::Blocks && bool(plan.mask); }

}  // namespace

void each_interval(const Plan& plan, const Ragged& q, const Ragged& k, const Mods& mods, int64_t s, int64_t head_number,
                   const std::function<void(int64_t, int64_t, int64_t)>& visit) {
  const PlanRows rows(plan, q, k.heads);
  const Head head(plan, rows, q, k, s, head_number);
  const int64_t tile = plan.form == Plan::Form::Dense ? std::max<int64_t>(1, head.n) : plan.q_tile;
  for (int64_t first = 0; first < head.n; first += tile) {
    const int64_t row = head.plan_row + (plan.form == Plan::Form::Dense ? 0 : first / tile);
    const Spans spans = named(plan, row, head.m);
    for (int64_t i = first; i < std::min(first + tile, head.n); ++i) {
      const auto [low, high] = visible(head, plan, mods, i);
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

namespace {

// Pairs that query head `head` of sequence s computes. Blocks that every row of a tile sees whole are counted at once.
double pairs(const Plan& plan, const PlanRows& rows, const Ragged& q, const Ragged& k, const Mods& mods, int64_t s, int64_t number) {
  double total = 0;
  if (masked(plan) || mods.until) {
    each_interval(plan, q, k, mods, s, number, [&](int64_t, int64_t begin, int64_t end) { total += double(end - begin); });
    return total;
  }
  const Head head(plan, rows, q, k, s, number);
  const bool dense = plan.form == Plan::Form::Dense;
  const int64_t tile = dense ? std::max<int64_t>(1, head.n) : plan.q_tile;
  for (int64_t first = 0; first < head.n; first += tile) {
    const int64_t last = std::min(first + tile, head.n);
    const Spans spans = named(plan, head.plan_row + (dense ? 0 : first / tile), head.m);
    int64_t low = 0, high = head.m;  // what every row of the tile sees
    std::vector<std::pair<int64_t, int64_t>> seen;
    for (int64_t i = first; i < last; ++i) {
      seen.push_back(visible(head, plan, mods, i));
      low = std::max(low, seen.back().first), high = std::min(high, seen.back().second);
    }
    for (const auto& [begin, end] : spans) {
      if (begin >= low && end <= high) {
        total += double(end - begin) * double(last - first);
        continue;
      }
      for (const auto& [from, to] : seen) total += double(std::max<int64_t>(0, std::min(end, to) - std::max(begin, from)));
    }
  }
  return total;
}

}  // namespace

std::vector<double> density(const Plan& plan, const Ragged& q, const Ragged& k, const Mods& mods) {
  std::vector<double> out(size_t(q.heads), 1.0);
  if (plan.form == Plan::Form::Dense && !mods.until) return out;
  Plan all;
  all.causal = plan.causal;
  Mods plain = mods;
  plain.until = {};
  const PlanRows rows(plan, q, k.heads), all_rows(all, q, k.heads);
  for (int64_t head = 0; head < q.heads; ++head) {
    double kept = 0, possible = 0;
    for (int64_t s = 0; s < q.sequences(); ++s) {
      kept += pairs(plan, rows, q, k, mods, s, head);
      possible += pairs(all, all_rows, q, k, plain, s, head);
    }
    out[size_t(head)] = possible > 0 ? kept / possible : 1.0;
  }
  return out;
}

Cost cost(const Plan& plan, const Ragged& q, const Ragged& k, const Mods& mods, int64_t d_v) {
  const PlanRows rows(plan, q, k.heads);
  const int64_t d = k.values.rank > 1 ? k.values.size[1] : 1;
  const double entry = double(d + d_v) * double(info(k.values.type).bytes);
  Cost out;
  for (int64_t s = 0; s < q.sequences(); ++s)
    for (int64_t number = 0; number < q.heads; ++number) {
      out.pairs += pairs(plan, rows, q, k, mods, s, number);
      if (number % (q.heads / k.heads) != 0) continue;  // a group reads its keys once
      const Head head(plan, rows, q, k, s, number);
      const bool dense = plan.form == Plan::Form::Dense;
      const int64_t tiles = dense ? 1 : (head.n + plan.q_tile - 1) / plan.q_tile;
      for (int64_t t = 0; t < tiles; ++t)
        for (const auto& [begin, end] : named(plan, head.plan_row + t, head.m)) out.bytes += double(end - begin) * entry;
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
  plan.rowptr = queue.scratch.take(Dtype::I64, {rows + 1});
  for (int64_t r = 0; r <= rows; ++r) plan.rowptr.at<int64_t>(r) = r * capacity;
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

Plan limit_heads(Queue& queue, const Plan& plan, const Ragged& q, const Ragged& k, const Range& heads) {
  if (heads.all() || plan.form == Plan::Form::Dense) return plan;
  // A scope wider than a query head is split, so that some heads of it can differ.
  Plan out = plan;
  out.scope = Plan::Scope::QueryHead;
  const PlanRows from(plan, q, k.heads), to(out, q, k.heads);
  const int64_t rows = to.starts.back();
  std::vector<int64_t> rowptr{0};
  std::vector<int32_t> index, mask, part;
  const int width = plan.form == Plan::Form::Interval ? 2 : 1;
  for (int64_t s = 0; s < q.sequences(); ++s)
    for (int64_t h = 0; h < q.heads; ++h) {
      const int64_t n = q.length(s * q.heads + h), m = k.length(s * k.heads + h * k.heads / q.heads);
      const bool inside = heads.holds(int(h), int(q.heads));
      for (int64_t i = 0; i < n; i += plan.q_tile) {
        const int64_t row = from.row(s, h, q.heads, i, plan.q_tile);
        if (inside) {
          for (int64_t e = plan.begin(row); e < plan.end(row); ++e) {
            for (int c = 0; c < width; ++c) index.push_back(plan.index.as<int32_t>()[e * width + c]);
            mask.push_back(plan.mask ? plan.mask.at<int32_t>(e) : -1);
            part.push_back(plan.part ? plan.part.at<int32_t>(e) : 0);
          }
        } else if (width == 2) {
          index.push_back(0), index.push_back(int32_t(m)), mask.push_back(-1), part.push_back(0);
        } else {
          for (int64_t b = 0; b * plan.k_tile < m; ++b) index.push_back(int32_t(b)), mask.push_back(-1), part.push_back(0);
        }
        rowptr.push_back(int64_t(mask.size()));
      }
    }
  auto keep = [&](Dtype type, const auto& values, bool pairs_of) {
    const int64_t count = int64_t(values.size());
    Tensor t = pairs_of ? queue.scratch.take(type, {count / 2, 2}) : queue.scratch.take(type, {count});
    std::copy(values.begin(), values.end(), t.as<std::decay_t<decltype(values[0])>>());
    return t;
  };
  require(int64_t(rowptr.size()) == rows + 1, "limit_heads", "the plan does not fit its queries");
  out.rowptr = keep(Dtype::I64, rowptr, false);
  out.index = keep(Dtype::I32, index, width == 2);
  if (plan.mask) out.mask = keep(Dtype::I32, mask, false);
  if (plan.part) out.part = keep(Dtype::I32, part, false);
  out.count = {};
  out.nnz_bound = int64_t(mask.size());
  return out;
}

}  // namespace heed
