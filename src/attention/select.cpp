#include "attention/select.h"

#include <algorithm>
#include <limits>

namespace heed {

Ragged segments(const Ragged& x, int64_t first, int64_t last, int64_t heads) {
  Ragged out = x;
  out.offsets = x.offsets.slice(0, first, last + 1);
  if (x.ends) out.ends = x.ends.slice(0, first, last);
  out.heads = heads;
  return out;
}

Ragged without_last(Queue& queue, const Ragged& x, std::span<const int64_t> counts) {
  Ragged out = x;
  const int64_t all = x.segments();
  out.ends = queue.scratch.take(Dtype::I64, {all});
  for (int64_t s = 0; s < all; ++s)
    out.ends.at<int64_t>(s) = std::max(x.begin(s), x.end(s) - counts[size_t(s / x.heads)]);
  return out;
}

Ragged force_last(Ragged scores, std::span<const int64_t> counts) {
  float* x = scores.values.as<float>();
  for (int64_t s = 0; s < scores.segments(); ++s) {
    const int64_t end = scores.end(s), begin = std::max(scores.begin(s), end - counts[size_t(s / scores.heads)]);
    std::fill(x + begin, x + end, std::numeric_limits<float>::infinity());
  }
  return scores;
}

Ragged numbers(Queue& queue, std::span<const int64_t> lengths, int64_t heads, int64_t width) {
  Ragged out;
  const int64_t count = int64_t(lengths.size());
  out.heads = heads;
  out.offsets = queue.scratch.take(Dtype::I64, {count + 1});
  out.offsets.at<int64_t>(0) = 0;
  for (int64_t s = 0; s < count; ++s) out.offsets.at<int64_t>(s + 1) = out.offsets.at<int64_t>(s) + lengths[size_t(s)];
  out.bound = out.offsets.at<int64_t>(count);
  out.values = width == 1 ? queue.scratch.take(Dtype::F32, {out.bound}) : queue.scratch.take(Dtype::F32, {out.bound, width});
  return out;
}

Grids grids(Queue& queue, int64_t heads, int64_t rows, int64_t cols) {
  Grids out;
  const std::vector<int64_t> cells(static_cast<size_t>(heads), rows * cols);
  out.cells = numbers(queue, cells, heads);
  out.rows = queue.scratch.take(Dtype::I64, {heads});
  out.cols = queue.scratch.take(Dtype::I64, {heads});
  std::fill_n(out.rows.as<int64_t>(), heads, rows);
  std::fill_n(out.cols.as<int64_t>(), heads, cols);
  return out;
}

Ragged rows_of(Queue& queue, const Grids& grid, std::span<const int64_t> visible) {
  const int64_t heads = grid.rows.size[0], rows = int64_t(visible.size()), cols = heads ? grid.cols.at<int64_t>(0) : 0;
  Ragged out = grid.cells;
  out.heads = rows;
  out.offsets = queue.scratch.take(Dtype::I64, {heads * rows + 1});
  out.ends = queue.scratch.take(Dtype::I64, {heads * rows});
  const int64_t base = heads ? grid.cells.begin(0) : 0;
  for (int64_t r = 0; r < heads * rows; ++r) {
    out.offsets.at<int64_t>(r) = base + r * cols;
    out.ends.at<int64_t>(r) = base + r * cols + visible[size_t(r % rows)];
  }
  out.offsets.at<int64_t>(heads * rows) = base + heads * rows * cols;
  return out;
}

Ragged with_queries(Queue& queue, const Ragged& scores, const Ragged& q) {
  Ragged out = scores;
  int64_t rows = 0;
  for (int64_t s = 0; s < q.segments(); ++s) rows += q.length(s) > 0;
  out.offsets = queue.scratch.take(Dtype::I64, {rows + 1});
  out.ends = queue.scratch.take(Dtype::I64, {rows});
  int64_t row = 0;
  for (int64_t s = 0; s < q.segments(); ++s) {
    if (q.length(s) == 0) continue;
    out.offsets.at<int64_t>(row) = scores.begin(s);
    out.ends.at<int64_t>(row++) = scores.end(s);
  }
  out.offsets.at<int64_t>(rows) = scores.bound;
  return out;
}

std::vector<int64_t> affordable(const LayerView& at, const Budget& budget, int64_t most) {
  std::vector<int64_t> out;
  for (int64_t length : at.prompt) out.push_back(std::min(most, budget.entries(length)));
  return out;
}

std::string too_small(const Budget& budget, int64_t forced, const std::string& names) {
  if (budget.fraction || int64_t(budget.amount) >= forced) return {};
  return "budget=" + detail::number_text(budget.amount) + " is less than the " + std::to_string(forced) + " entries that " + names +
         " always keeps: raise budget or lower " + names;
}

Tensor divide(const Allocation& a, std::span<const Ragged> scores, Tensor counts, Pool pool) {
  const int64_t layers = int64_t(scores.size()), all = scores[0].segments(), heads = scores[0].heads, sequences = all / heads;
  const int64_t together = pool == Pool::All ? layers : 1;
  Tensor out = a.queue.scratch.take(Dtype::I32, {layers, all});
  const Scratch scratch(a.queue.scratch);
  for (int64_t first = 0; first < layers; first += together)
    for (int64_t s = 0; s < sequences; ++s) {
      const Scratch inner(a.queue.scratch);
      // The pool's scores, end to end, and what its members were granted.
      std::vector<int64_t> ends;
      int64_t total = 0, granted = 0;
      for (int64_t l = first; l < first + together; ++l)
        for (int64_t i = s * heads; i < (s + 1) * heads; ++i) {
          const int64_t length = scores[size_t(l)].length(i);
          ends.push_back(total += length);
          granted += std::min<int64_t>(counts.at<int32_t>(l, i), length);
        }
      const Ragged joined = numbers(a.queue, std::span(&total, 1), 1);
      size_t member = 0;
      for (int64_t l = first; l < first + together; ++l)
        for (int64_t i = s * heads; i < (s + 1) * heads; ++i, ++member)
          copy(scores[size_t(l)].segment(i), joined.values.slice(0, member ? ends[member - 1] : 0, ends[member]));
      const int64_t capacity = std::max<int64_t>(1, granted);
      const Tensor index = a.queue.scratch.take(Dtype::I32, {capacity}), count = a.queue.scratch.take(Dtype::I32, {1});
      Select best;
      best.k = granted;
      a.queue.run->select(a.queue, joined, best, capacity, index, count);
      const int32_t* chosen = index.as<int32_t>();
      const int32_t* last = chosen + count.at<int32_t>(0);
      member = 0;
      for (int64_t l = first; l < first + together; ++l)
        for (int64_t i = s * heads; i < (s + 1) * heads; ++i, ++member) {
          const int32_t* next = std::lower_bound(chosen, last, int32_t(ends[member]));
          out.at<int32_t>(l, i) = int32_t(next - chosen);
          chosen = next;
        }
    }
  return out;
}

void each_slice(LayerView& at, int q_tile, const std::function<void(const Slice&)>& visit) {
  const int64_t h = at.q.heads, g = at.k.heads, group = h / g;
  int64_t row = 0;
  for (int64_t s = 0; s < at.q.sequences(); ++s)
    for (int64_t head = 0; head < g; ++head) {
      const int64_t query = s * h + head * group, key = s * g + head;
      Slice slice{segments(at.q, query, query + group, group), segments(at.k, key, key + 1, 1), at.q.length(query), at.k.length(key),
                  s, head, row, (at.q.length(query) + q_tile - 1) / q_tile};
      row += group * slice.tiles;
      if (slice.n == 0) continue;
      const Scratch scratch(at.queue.scratch);
      visit(slice);
    }
}

int64_t plan_rows(const LayerView& at, int q_tile) {
  int64_t rows = 0;
  for (int64_t i = 0; i < at.q.segments(); ++i) rows += (at.q.length(i) + q_tile - 1) / q_tile;
  return rows;
}

int64_t longest_keys(const LayerView& at) {
  int64_t most = 0;
  for (int64_t i = 0; i < at.k.segments(); ++i) most = std::max(most, at.k.length(i));
  return most;
}

Plan listed_blocks(Queue& queue, int q_tile, int k_tile, std::span<const std::vector<int32_t>> rows) {
  Plan plan;
  plan.form = Plan::Form::Blocks;
  plan.q_tile = q_tile, plan.k_tile = k_tile;
  const int64_t count = int64_t(rows.size());
  plan.rowptr = queue.scratch.take(Dtype::I64, {count + 1});
  plan.rowptr.at<int64_t>(0) = 0;
  for (int64_t r = 0; r < count; ++r) plan.rowptr.at<int64_t>(r + 1) = plan.rowptr.at<int64_t>(r) + int64_t(rows[size_t(r)].size());
  plan.nnz_bound = plan.rowptr.at<int64_t>(count);
  plan.index = queue.scratch.take(Dtype::I32, {plan.nnz_bound});
  for (int64_t r = 0; r < count; ++r) std::copy(rows[size_t(r)].begin(), rows[size_t(r)].end(), plan.index.as<int32_t>() + plan.begin(r));
  return plan;
}

Plan dense_plan(int q_tile, int k_tile) {
  Plan plan;
  plan.q_tile = q_tile, plan.k_tile = k_tile;
  return plan;
}

}  // namespace heed
