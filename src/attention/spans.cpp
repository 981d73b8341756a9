#include "attention/spans.h"

#include "attention/scores.h"

namespace heed {
namespace {

/// Running sums over the rows of every segment, each times `keep` (as x's values, or empty: 1) before a row is added: scratch.
Tensor running_sums(Queue& queue, const Ragged& x, const Tensor& keep = {}) {
  const int64_t rows = x.values.size[0], width = x.values.rank > 1 ? x.values.size[1] : 0;
  const Tensor out = width > 0 ? queue.scratch.take(Dtype::F32, {rows, width}) : queue.scratch.take(Dtype::F32, {rows});
  queue.run->scan(queue, x, keep ? keep : ones(queue, rows, width), ScanKind::Linear, out);
  return out;
}

}  // namespace

Tensor paid_inside(LayerView& at, const Slice& s, int stretch) {
  Queue& queue = at.queue;
  const int64_t group = s.q.heads, parts = (s.n + stretch - 1) / stretch, all = parts * group;
  const Num part = floor_div(index(), group), length = min(stretch, s.n - part * stretch);
  // Stretches as sequences of their own.
  Ragged q = s.q, k = s.k;
  const Tensor from = compute(queue, Dtype::I64, {all + 1}, begin_of(s.q, mod(index(), group)) + part * stretch),
               to = compute(queue, Dtype::I64, {all}, load(from, index()) + length);
  q.offsets = from, q.ends = to;
  k.offsets = compute(queue, Dtype::I64, {parts + 1}, end_of(s.k, 0) - s.n + index() * stretch);
  k.ends = compute(queue, Dtype::I64, {parts}, load(k.offsets, index()) + min(stretch, s.n - index() * stretch));

  Grids map;
  map.cells.heads = group, map.cells.bound = all * stretch * stretch;
  map.cells.offsets = compute(queue, Dtype::I64, {all + 1}, index() * (int64_t(stretch) * stretch));
  map.cells.values = queue.scratch.take(Dtype::F32, {map.cells.bound});
  map.rows = map.cols = compute(queue, Dtype::I64, {all}, length);
  Proxy dot;
  dot.scale = at.mods.scale, dot.softcap = at.mods.softcap;
  at.run().proxy(queue, q, k, dot, map);

  const int64_t rows = parts * stretch;
  const Tensor out = compute(queue, Dtype::F32, {rows, stretch}, 0);
  for (int64_t member = 0; member < group; ++member) {
    const Scratch scratch(queue.scratch);
    const Num stretch_of = floor_div(index(), stretch) * group + member, i = mod(index(), stretch);
    const Tensor cells = compute(queue, Dtype::I64, {rows},
                                 load(map.cells.offsets, stretch_of) + i * load(map.cols, stretch_of)),
                 lse = compute(queue, Dtype::F32, {rows}, load(at.lse, load(from, stretch_of) + i));
    const Num row = floor_div(index(), stretch), j = channel();
    // A row that attention was told to skip has no lse.
    const Num paid = min(1, exp(load(map.cells.values, load(cells, row) + j) - load(lse, row)));
    compute(queue, load(out, index()) + pick(j <= mod(row, stretch) && row < s.n, paid / double(group), 0), out);
  }
  return out;
}

Ragged triangles(Queue& queue, const Tensor& maps, int64_t tokens, int stretch, int longest, double baseline) {
  const int64_t rows = maps.size[0], parts = rows / stretch;
  Ragged each;
  each.values = maps.reshape({rows * stretch});
  each.offsets = compute(queue, Dtype::I64, {rows + 1}, index() * stretch), each.bound = rows * stretch;
  each.values = running_sums(queue, each).reshape({rows, stretch});
  each.offsets = compute(queue, Dtype::I64, {parts + 1}, index() * stretch), each.bound = rows;
  const Tensor sums = running_sums(queue, each);

  Ragged out;
  out.values = queue.scratch.take(Dtype::F32, {rows * longest});
  out.offsets = compute(queue, Dtype::I64, {parts + 1}, index() * (int64_t(stretch) * longest));
  out.bound = rows * longest;
  const Num x = floor_div(place(), longest), length = mod(place(), longest) + 1;
  const Tensor last = queue.scratch.take(Dtype::I32, {rows * longest});  // row of the span's last token; −1: it has none
  const Num y = x + length - 1, row = segment() * stretch + y;
  compute(queue, out, pick(y < stretch && row < tokens, row, -1), last);
  const Num end = load(last, index()), from_first = load(sums, end * stretch + mod(end, stretch)),
            before = (x > 0) * load(sums, end * stretch + max(0, x - 1));
  compute(queue, out, pick(end < 0, -kInfinity, from_first - before - baseline / 2 * length * (length + 1)), out.values);
  return out;
}

Tensor span_begins(Queue& queue, const Ragged& scores, int stretch, int longest) {
  const int64_t parts = scores.segments();
  Ragged tokens;
  tokens.offsets = compute(queue, Dtype::I64, {parts + 1}, index() * stretch), tokens.bound = parts * stretch;
  tokens.values = queue.scratch.take(Dtype::F32, {tokens.bound});
  compute(queue, tokens, place() == 0, tokens.values);
  // What does not look at itself enough is no span, and a token alone is one anyway.
  const Num length = mod(place(), longest) + 1, held = load(scores.values, index());
  compute(queue, scores, pick(length > 1 && held > 0, held, -kInfinity), scores.values);
  const Lists best = lists(queue, parts, 1);
  for (int round = 0; round < stretch / 2; ++round) {
    const Scratch scratch(queue.scratch);
    choose(queue, scores, {.k = 1}, best);
    const Num first = floor_div(load(best.index, segment()), longest),
              last = first + mod(load(best.index, segment()), longest), found = load(best.count, segment());
    const Num begin = floor_div(place(), longest);
    compute(queue, scores, pick(found && begin <= last && begin + length > first, -kInfinity, held), scores.values);
    compute(queue, tokens, pick(found && (place() == first || place() == last + 1), 1, load(tokens.values, index())),
            tokens.values);
  }
  return tokens.values;
}

Ragged span_means(Queue& queue, const Ragged& begins, const Ragged& x) {
  const int64_t rows = begins.values.size[0];
  Ragged one = x, out = x;
  one.values = ones(queue, rows);
  const Tensor same = compute(queue, Dtype::F32, {rows}, 1 - load(begins.values, index()));
  const Tensor sums = running_sums(queue, x, same), counts = running_sums(queue, one, same),
               number = running_sums(queue, begins);
  const Num first = begin_of(x, segment()), end = end_of(x, segment()), own = load(number, index());
  const Tensor last = queue.scratch.take(Dtype::I32, {rows});
  compute(queue, x, find(number, first, end, own + 1) - 1, last);
  out.values = queue.scratch.take(Dtype::F32, {rows});
  compute(queue, x, load(sums, load(last, index())) / load(counts, load(last, index())), out.values);
  return out;
}

}  // namespace heed
