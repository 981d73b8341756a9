#include "attention/select.h"

#include <algorithm>
#include <cmath>

namespace heed {

Ragged segments(const Ragged& x, int64_t first, int64_t last, int64_t heads) {
  Ragged out = x;
  out.offsets = x.offsets.slice(0, first, last + 1);
  if (x.ends) out.ends = x.ends.slice(0, first, last);
  out.heads = heads;
  return out;
}

Num of_sequence(Queue& queue, std::span<const int64_t> numbers, const Num& s, int64_t heads) {
  if (std::equal(numbers.begin() + 1, numbers.end(), numbers.begin())) return numbers[0];
  return load(queue.upload(numbers), floor_div(s, heads));
}

Ragged without_last(Queue& queue, const Ragged& x, std::span<const int64_t> counts) {
  Ragged out = x;
  const Num s = index();
  out.ends = compute(queue, Dtype::I64, {x.segments()},
                     max(begin_of(x, s), end_of(x, s) - of_sequence(queue, counts, s, x.heads)));
  return out;
}

Ragged force_last(Queue& queue, Ragged scores, std::span<const int64_t> counts) {
  const Num latest = place() >= length() - of_sequence(queue, counts, segment(), scores.heads);
  compute(queue, scores, pick(latest, kInfinity, load(scores.values, index())), scores.values);
  return scores;
}

Ragged numbers(Queue& queue, std::span<const int64_t> lengths, int64_t heads, int64_t width) {
  Ragged out;
  out.heads = heads;
  std::vector<int64_t> offsets{0};
  for (int64_t length : lengths) offsets.push_back(offsets.back() + length);
  out.offsets = queue.upload(offsets);
  out.bound = offsets.back();
  out.values = width == 1 ? queue.scratch.take(Dtype::F32, {out.bound})
                          : queue.scratch.take(Dtype::F32, {out.bound, width});
  return out;
}

Ragged numbers(Queue& queue, int64_t segments, const Num& lengths, int64_t heads, int64_t bound) {
  Ragged out;
  out.heads = heads, out.bound = bound;
  out.offsets = offsets_of(queue, segments, lengths);
  out.values = queue.scratch.take(Dtype::F32, {bound});
  return out;
}

Ragged by_query_head(Queue& queue, const Ragged& columns, int64_t group) {
  const int64_t segments = columns.segments() * group;
  const Ragged out = numbers(queue, segments, length_of(columns, floor_div(index(), group)), columns.heads * group,
                             columns.bound * group);
  const Num entry = begin_of(columns, floor_div(segment(), group)) + place();
  compute(queue, out, load(columns.values, entry * group + mod(segment(), group)), out.values);
  return out;
}

Ragged of_blocks(Queue& queue, const Ragged& x, int64_t block) {
  const Ragged out = numbers(queue, x.segments(), ceil_div(length_of(x, index()), block), x.heads,
                             x.bound / block + x.segments());
  compute(queue, out, load(x.values, begin_of(x, segment()) + place() * block), out.values);
  return out;
}

Grids grids(Queue& queue, int64_t heads, int64_t rows, int64_t cols) {
  Grids out;
  out.cells.heads = heads, out.cells.bound = heads * rows * cols;
  out.cells.offsets = compute(queue, Dtype::I64, {heads + 1}, index() * (rows * cols));
  out.cells.values = queue.scratch.take(Dtype::F32, {out.cells.bound});
  out.rows = compute(queue, Dtype::I64, {heads}, rows);
  out.cols = compute(queue, Dtype::I64, {heads}, cols);
  return out;
}

Ragged rows_of(Queue& queue, const Grids& grid, std::span<const int64_t> visible) {
  const int64_t heads = grid.rows.size[0], rows = int64_t(visible.size()), all = heads * rows,
                cols = all ? grid.cells.bound / all : 0;
  Ragged out = grid.cells;
  out.heads = rows;
  out.offsets = compute(queue, Dtype::I64, {all + 1}, index() * cols);
  out.ends = compute(queue, Dtype::I64, {all}, index() * cols + load(queue.upload(visible), mod(index(), rows)));
  return out;
}

namespace {
/// Sequences that have queries.
std::vector<int64_t> asking(const LayerView& at) {
  std::vector<int64_t> out;
  for (int64_t s = 0; s < at.sequences(); ++s)
    if (at.rows[size_t(s)] > 0) out.push_back(s);
  return out;
}
}  // namespace

Num query_segment(LayerView& at, const Num& row, int64_t heads) {
  const std::vector<int64_t> with = asking(at);
  if (int(with.size()) == at.sequences()) return row;
  return load(at.queue.upload(with), floor_div(row, heads)) * heads + mod(row, heads);
}

Num granted(const Budget& budget, const Num& length) {
  return min(length, budget.fraction ? max(1, floor(length * budget.amount + 1e-9)) : floor(Num(budget.amount)));
}

Num Lists::has(const Num& s, const Num& number) const {
  return holds(index, s * capacity, s * capacity + load(count, s), number);
}

Lists Lists::part(int64_t first, int64_t last) const {
  return {index.slice(0, first * capacity, last * capacity), count.slice(0, first, last), capacity};
}

Lists lists(Queue& queue, int64_t segments, int64_t capacity) {
  return {queue.scratch.take(Dtype::I32, {segments * capacity}), queue.scratch.take(Dtype::I32, {segments}), capacity};
}

void choose(Queue& queue, const Ragged& scores, const Select& how, const Lists& into) {
  queue.run->select(queue, scores, how, into.capacity, into.index, into.count);
}

Lists chosen(Queue& queue, const Ragged& scores, const Select& how, int64_t capacity) {
  const Lists out = lists(queue, scores.segments(), capacity);
  choose(queue, scores, how, out);
  return out;
}

Num among(Queue& queue, const Range& heads, int64_t count, const Num& head) {
  std::vector<uint8_t> named;
  for (int64_t i = 0; i < count; ++i) named.push_back(heads.holds(int(i), int(count)));
  return load(queue.upload(named), head);
}

Ragged with_queries(LayerView& at, const Ragged& scores) {
  const int64_t rows = int64_t(asking(at).size()) * scores.heads;
  if (rows == scores.segments()) return scores;
  Ragged out = scores;
  const Num s = query_segment(at, index(), scores.heads);
  out.offsets = compute(at.queue, Dtype::I64, {rows + 1}, pick(index() < rows, begin_of(scores, s), scores.bound));
  out.ends = compute(at.queue, Dtype::I64, {rows}, end_of(scores, s));
  return out;
}

std::vector<int64_t> affordable(const LayerView& at, const Budget& budget, int64_t most) {
  std::vector<int64_t> out;
  for (int64_t length : at.prompt) out.push_back(std::min(most, budget.entries(length)));
  return out;
}

std::string uneven(int size, const char* name) {
  if (kPage % size == 0) return {};
  return std::string(name) + "=" + std::to_string(size) + " does not divide " + std::to_string(kPage);
}

std::string too_small(const Budget& budget, int64_t forced, const std::string& names) {
  if (budget.fraction || int64_t(budget.amount) >= forced) return {};
  return "budget=" + detail::number_text(budget.amount) + " is less than the " + std::to_string(forced) +
         " entries that " + names + " always keeps: raise budget or lower " + names;
}

Tensor divide(const Allocation& a, std::span<const Ragged> scores, Tensor counts, Pool pool) {
  Queue& queue = a.queue;
  const int64_t layers = int64_t(scores.size()), all = scores[0].segments(), heads = scores[0].heads, sequences = all / heads;
  const int64_t together = pool == Pool::All ? layers : 1, members = together * heads, pools = layers / together * sequences;
  Tensor out = queue.scratch.take(Dtype::I32, {layers, all});
  const Scratch scratch(queue.scratch);
  // Members lie pool by pool: (layers of the pool, sequence, layer in it, head). A layer's members, as [sequences, heads]:
  const Tensor lengths = queue.scratch.take(Dtype::I64, {layers * all}),
               granted = queue.scratch.take(Dtype::I64, {layers * all});
  auto first_member = [&](int64_t l) { return l / together * sequences * members + l % together * heads; };
  auto members_of = [&](Tensor t, int64_t l) {
    t.data = t.as<int64_t>() + first_member(l);
    t.rank = 2, t.size = {sequences, heads}, t.stride = {members, 1};
    return t;
  };
  int64_t entries = 0, most = 1;
  for (int64_t l = 0; l < layers; ++l) {
    compute(queue, length_of(scores[size_t(l)], index()), members_of(lengths, l));
    // Not bounded by what a member has: a pool that was divided before lends what one cannot take to the others.
    compute(queue, load(counts.select(0, l), index()), members_of(granted, l));
    entries += scores[size_t(l)].bound;
    most = std::max(most, scores[size_t(l)].bound);
  }
  const Tensor starts = queue.scratch.take(Dtype::I64, {layers * all + 1}),
               grants = queue.scratch.take(Dtype::I64, {layers * all + 1});
  queue.run->offsets(queue, lengths, starts), queue.run->offsets(queue, granted, grants);
  // The scores of each pool, end to end.
  const Tensor joined = queue.scratch.take(Dtype::F32, {entries});
  for (int64_t l = 0; l < layers; ++l) {
    const Num member = floor_div(index(), heads) * members + mod(index(), heads) + first_member(l);
    Ragged to;
    to.heads = heads, to.bound = scores[size_t(l)].bound;
    to.offsets = compute(queue, Dtype::I64, {all + 1}, load(starts, member));
    to.ends = compute(queue, Dtype::I64, {all}, load(starts, member + 1));
    compute(queue, to, load(scores[size_t(l)].values, begin_of(scores[size_t(l)], segment()) + place()), joined);
  }
  Ragged pooled;
  pooled.values = joined, pooled.bound = entries;
  pooled.offsets = compute(queue, Dtype::I64, {pools + 1}, load(starts, index() * members));
  const int64_t capacity = std::max<int64_t>(1, pool == Pool::All ? entries : most);
  const Tensor chosen = queue.scratch.take(Dtype::I32, {pools * capacity}), count = queue.scratch.take(Dtype::I32, {pools});
  Select best;
  const auto of_pool = [&](const Tensor& begins) {
    return load(begins, (index() + 1) * members) - load(begins, index() * members);
  };
  best.count = compute(queue, Dtype::I32, {pools}, min(of_pool(grants), of_pool(starts)));
  queue.run->select(queue, pooled, best, capacity, chosen, count);
  // How many of the chosen lie before the end of each member.
  const Num in = floor_div(index(), members);
  const Num end = load(starts, index() + 1) - load(starts, in * members);
  const Tensor before = compute(queue, Dtype::I64, {layers * all},
                                find(chosen, in * capacity, in * capacity + load(count, in), end) - in * capacity);
  for (int64_t l = 0; l < layers; ++l) {
    const Num member = floor_div(index(), heads) * members + mod(index(), heads) + first_member(l);
    const Num others = l % together == 0 ? pick(mod(index(), heads) == 0, 0, load(before, member - 1))
                                         : load(before, member - 1);
    compute(queue, load(before, member) - others, out.select(0, l));
  }
  return out;
}

Tensor without_windows(const Allocation& a, const Tensor& even,
                       const std::function<Tensor(std::span<const Ragged>, const Tensor&)>& share) {
  std::vector<Ragged> scores;
  std::vector<int64_t> which;
  for (int64_t l = 0; l < even.size[0]; ++l)
    if (a.model.window(a.first_layer + int(l)) == 0) scores.push_back(a.scores[size_t(l)]), which.push_back(l);
  if (which.empty()) return even;
  const Tensor granted = a.queue.scratch.take(Dtype::I32, {int64_t(which.size()), even.size[1]});
  for (size_t i = 0; i < which.size(); ++i) a.queue.move(even.select(0, which[i]), granted.select(0, int64_t(i)));
  const Tensor won = share(scores, granted);
  for (size_t i = 0; i < which.size(); ++i) a.queue.move(won.select(0, int64_t(i)), even.select(0, which[i]));
  return even;
}

void each_slice(LayerView& at, int q_tile, const std::function<void(const Slice&)>& visit, Slices of) {
  const int64_t h = at.q.heads, g = at.k.heads;
  int64_t row = 0;
  for (int64_t s = 0; s < at.sequences(); ++s) {
    const auto keys = at.key_rows.begin() + s * g;
    const bool whole = of == Slices::Sequence ||
                       (of == Slices::Either && at.run().plan_sequences && std::equal(keys + 1, keys + g, keys));
    const int64_t each = whole ? g : 1, group = each * (h / g), n = at.rows[size_t(s)], tiles = (n + q_tile - 1) / q_tile;
    for (int64_t head = 0; head < g; head += each, row += group * tiles) {
      if (n == 0) continue;
      const int64_t query = s * h + head * (h / g), key = s * g + head;
      const Scratch scratch(at.queue.scratch);
      visit({segments(at.q, query, query + group, group), segments(at.k, key, key + each, each), n,
             at.key_rows[size_t(key)], s, head, row, tiles});
    }
  }
}

int64_t plan_rows(const LayerView& at, int q_tile) {
  int64_t rows = 0;
  for (int64_t n : at.rows) rows += at.q.heads * ((n + q_tile - 1) / q_tile);
  return rows;
}

int64_t longest_keys(const LayerView& at) { return *std::max_element(at.key_rows.begin(), at.key_rows.end()); }

int64_t longest_queries(const LayerView& at) {
  return std::max<int64_t>(1, *std::max_element(at.rows.begin(), at.rows.end()));
}

Plan listed_blocks(Queue& queue, int q_tile, int k_tile, std::span<const std::vector<int32_t>> rows) {
  Plan plan;
  plan.form = Plan::Form::Blocks;
  plan.q_tile = q_tile, plan.k_tile = k_tile;
  std::vector<int64_t> rowptr{0};
  std::vector<int32_t> blocks;
  for (const auto& row : rows) {
    blocks.insert(blocks.end(), row.begin(), row.end());
    rowptr.push_back(int64_t(blocks.size()));
  }
  plan.rowptr = queue.upload(rowptr), plan.index = queue.upload(blocks);
  plan.nnz_bound = int64_t(blocks.size());
  return plan;
}

Plan tiled_blocks(LayerView& at, int block, Tensor index_of, Tensor count, int64_t capacity, int64_t blocks) {
  Queue& queue = at.queue;
  const int64_t tile = queue.run->plan_rows;
  int split = (block + 63) / 64;  // a block becomes parts of at most 64 keys, all of one size
  while (block % split) ++split;
  const int64_t h = at.q.heads, tiles = plan_rows(at, int(tile)), most = std::min(blocks, tile * capacity) * split;
  std::vector<int64_t> first{0};
  for (int64_t n : at.rows)
    for (int64_t head = 0; head < h; ++head)
      for (int64_t i = 0; i < n; i += tile) first.push_back(first.back() + std::min(tile, n - i));
  Plan plan;
  plan.form = Plan::Form::Blocks, plan.q_tile = int(tile), plan.k_tile = block / split;
  plan.rowptr = compute(queue, Dtype::I64, {tiles + 1}, index() * most);
  plan.count = queue.scratch.take(Dtype::I32, {tiles});
  plan.nnz_bound = tiles * most;
  plan.index = queue.scratch.take(Dtype::I32, {plan.nnz_bound}),
  plan.mask = queue.scratch.take(Dtype::I32, {plan.nnz_bound});
  plan.bits = queue.scratch.take(Dtype::U64, {plan.nnz_bound / split, tile, 1});
  queue.run->tile_blocks(queue, index_of, count, capacity, queue.upload(first), split, plan);
  return plan;
}

Plan dense_plan(int q_tile, int k_tile) {
  Plan plan;
  plan.q_tile = q_tile, plan.k_tile = k_tile;
  return plan;
}

}  // namespace heed
