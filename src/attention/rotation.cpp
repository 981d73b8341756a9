#include "attention/rotation.h"

#include <bit>
#include <cmath>
#include <numeric>

#include "attention/scores.h"
#include "attention/select.h"
#include "base/random.h"

namespace heed {
namespace {

/// positions[s] for each of the `rows` rows that belong to sequence s.
Tensor constant(Queue& queue, std::span<const int64_t> positions, int64_t rows) {
  return compute(queue, Dtype::I32, {int64_t(positions.size()) * rows}, of_sequence(queue, positions, index(), rows));
}

Ragged unfilled(Queue& queue, Ragged x) {
  x.values = queue.scratch.take(Dtype::F32, {x.values.size[0], x.values.size[1]});
  return x;
}

}  // namespace

Ragged turned(Queue& queue, const Ragged& x, const Rope& rope, const Tensor& positions) {
  Ragged out = unfilled(queue, x);
  const int64_t rows = x.values.size[0], d = x.values.size[1];
  out.heads = 1;
  const Heads one{.x = x.values.reshape({rows, 1, d}), .rope = &rope, .positions = positions, .out = out};
  queue.run->split_heads(queue, x.offsets, 0, {&one, 1});
  out.heads = x.heads;
  return out;
}

Rope backwards(Queue& queue, const Rope& rope) {
  Rope back = rope;
  back.inv_freq = queue.scratch.take(Dtype::F32, {rope.inv_freq.size[0]});
  queue.run->combine(queue, rope.inv_freq, {}, Combine::Multiply, -1, back.inv_freq);
  return back;
}

Tensor mean_rotation(Queue& queue, const Rope& rope, int64_t d, int64_t heads, std::span<const int64_t> first, int64_t count) {
  const int64_t segments = int64_t(first.size()) * heads, rows = segments * d;
  const std::vector<int64_t> each(size_t(segments), d);
  Ragged units = numbers(queue, each, heads, d);
  units.values = units.values.reshape({rows, d});
  compute(queue, mod(floor_div(index(), d), d) == channel(), units.values);
  units = turned(queue, units, rope, constant(queue, first, heads * d));
  for (int64_t step = 1; step < count; step *= 2) {
    const std::vector<int64_t> by(first.size(), step);
    units = combine(queue, units, turned(queue, units, rope, constant(queue, by, heads * d)), Combine::Add);
    units = combine(queue, units, Combine::Multiply, 0.5);
  }
  return units.values.reshape({segments, d, d});
}

Buffer hadamard(int64_t d, int64_t order) {
  require(order > 0 && (order & (order - 1)) == 0 && d % order == 0, "hadamard",
          "order " + std::to_string(order) + " is no power of 2 that divides " + std::to_string(d));
  Buffer out = Buffer::zeros(Dtype::F32, {d, d});
  const float size = 1 / std::sqrt(float(order));
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j < order; ++j)
      out->at<float>(i, i / order * order + j) = std::popcount(uint64_t(i % order & j)) % 2 ? -size : size;
  return out;
}

Buffer random_orthogonal(int64_t d, uint64_t seed) {
  Random random(seed);
  std::vector<std::vector<double>> rows;
  while (int64_t(rows.size()) < d) {
    auto& row = rows.emplace_back();
    for (int64_t c = 0; c < d; ++c) row.push_back(random.normal());
    for (int round = 0; round < 2; ++round)  // once more takes off what rounding left
      for (size_t other = 0; other + 1 < rows.size(); ++other) {
        const double dot = std::inner_product(row.begin(), row.end(), rows[other].begin(), 0.0);
        for (size_t c = 0; c < row.size(); ++c) row[c] -= dot * rows[other][c];
      }
    const double norm = std::sqrt(std::inner_product(row.begin(), row.end(), row.begin(), 0.0));
    for (double& x : row) x /= norm;
  }
  Buffer out(Dtype::F32, {d, d});
  for (int64_t i = 0; i < d; ++i)
    for (int64_t c = 0; c < d; ++c) out->at<float>(i, c) = float(rows[size_t(i)][size_t(c)]);
  return out;
}

Basis placed(Queue& queue, const Basis& host) {
  Basis out;
  const auto place_one = [&](const Buffer& from, Buffer& to, Buffer& back) {
    if (!from) return;
    const int64_t d = from->size[0];
    to = Buffer(Dtype::F32, {d, d}, *queue.memory), back = Buffer(Dtype::F32, {d, d}, *queue.memory);
    queue.upload(from, to);
    compute(queue, load(to, channel() * d + place()), back);
  };
  place_one(host.k, out.k, out.k_back), place_one(host.v, out.v, out.v_back);
  return out;
}

void change_basis(Queue& queue, const Ragged& x, const Tensor& matrix, const Ragged& out) {
  const int64_t rows = x.values.size[0], d = x.values.size[1];
  const Scratch scratch(queue.scratch);
  const Tensor made = queue.scratch.take(Dtype::F32, {rows, d});
  queue.run->matmul(queue, matrix, x.values, {}, false, made);
  Ragged to = out;  // every segment as a sequence of one head
  to.heads = 1;
  const Heads one{.x = made.reshape({rows, 1, d}), .out = to};
  queue.run->split_heads(queue, x.offsets, 0, {&one, 1});
}

namespace {

/// body(part of x's columns, first, last), for as many as a recurrence's state has rows on every backend.
template <class Body> void each_columns(const Ragged& x, Body body) {
  constexpr int64_t most = 256;
  for (int64_t first = 0; first < x.values.size[1]; first += most) {
    const int64_t last = std::min(first + most, x.values.size[1]);
    Ragged part = x;
    part.values = x.values.slice(1, first, last);
    body(part, first, last);
  }
}

}  // namespace

Ragged transformed(Queue& queue, const Ragged& x, const Tensor& matrix) {
  // A recurrence that only reads its state.
  const int64_t rows = x.values.size[0], width = matrix.size[2];
  Ragged out = x, nothing = x;
  out.values = queue.scratch.take(Dtype::F32, {rows, width});
  const Scratch scratch(queue.scratch);
  nothing.values = compute(queue, Dtype::F32, {rows, width}, 0);
  Recur plain;
  plain.scale = 1;
  each_columns(x, [&](const Ragged& part, int64_t first, int64_t last) {
    const Scratch inner(queue.scratch);
    Ragged none = part;
    none.values = compute(queue, Dtype::F32, {rows, last - first}, 0);
    RecurInputs in;
    in.q = part, in.k = none, in.v = nothing, in.state = matrix.slice(1, first, last);
    const Tensor made = first == 0 ? out.values : queue.scratch.take(Dtype::F32, {rows, width});
    queue.run->recur(queue, in, plain, made, {}, {});
    if (first > 0) queue.run->combine(queue, out.values, made, Combine::Add, 1, out.values);
  });
  return out;
}

Tensor outer_sums(Queue& queue, const Ragged& x) {
  // A recurrence whose state is all that counts.
  const int64_t d = x.values.size[1];
  const Tensor sums = queue.scratch.take(Dtype::F32, {x.segments(), d, d});
  each_columns(x, [&](const Ragged& part, int64_t first, int64_t last) {
    const Scratch scratch(queue.scratch);
    RecurInputs in;
    in.q = in.k = part, in.v = x;
    queue.run->recur(queue, in, {}, unfilled(queue, x).values, sums.slice(1, first, last), {});
  });
  return sums;
}

Tensor inverse(Queue& queue, const Tensor& matrix, double ridge) {
  const int64_t count = matrix.size[0], d = matrix.size[2];
  const Tensor out = queue.scratch.take(Dtype::F32, {count, d, d});
  const Scratch scratch(queue.scratch);
  const Num i = mod(place(), d), j = channel(), of = floor_div(place(), d);
  Tensor a = compute(queue, Dtype::F64, {count * d, d}, load(matrix, index()) + (i == j) * ridge);
  Tensor next = queue.scratch.take(Dtype::F64, {count * d, d});
  for (int64_t p = 0; p < d; ++p) {
    // The pivot's row, with 1 / pivot in the pivot's place.
    const Num in_row = (place() * d + p) * d;
    const Tensor row = compute(queue, Dtype::F64, {count, d}, pick(j == p, 1, load(a, in_row + j)) / load(a, in_row + p));
    compute(queue,
            pick(i == p, load(row, of * d + j),
                 pick(j == p, 0, load(a, index())) - load(a, place() * d + p) * load(row, of * d + j)),
            next);
    std::swap(a, next);
  }
  compute(queue, load(a, index()), out.reshape({count * d, d}));
  return out;
}

MainRows main_rows(Queue& queue, const Ragged& x, int64_t rank, int rounds) {
  const int64_t d = x.values.size[1], all = x.segments();
  const MainRows out{queue.scratch.take(Dtype::F32, {all * rank, d}), queue.scratch.take(Dtype::F32, {all * rank, d})};
  const Num unit = mod(place(), d) == channel();
  const Scratch scratch(queue.scratch);
  const Tensor sums = outer_sums(queue, x);
  const Ragged diagonal = numbers(queue, all, d, all, all * d);
  compute(queue, load(sums, index() * d + mod(index(), d)), diagonal.values);
  const Ragged trace = spread(queue, diagonal, {.of = Spread::Of::Sum});
  const Tensor squares = compute(queue, Dtype::F32, {all * d, d},
                                 load(sums, index()) / max(load(trace.values, place()), 1e-30) + unit * 1e-5);
  Random random(1);
  std::vector<float> normals;
  for (int64_t i = 0; i < rank * d; ++i) normals.push_back(float(random.normal()));
  Ragged rows = numbers(queue, all, rank, all, all * rank);  // the directions, [rank, d] a segment
  rows.values = compute(queue, Dtype::F32, {all * rank, d}, load(queue.upload(normals), mod(index(), rank * d)));
  const auto products = [&](const Ragged& a, const Ragged& b) {  // a b^T
    const Grids out = grids(queue, all, rank, rank);
    Proxy dot;
    dot.scale = 1, dot.causal = false;
    queue.run->proxy(queue, a, b, dot, out);
    return out.cells.values.reshape({all, rank, rank});
  };
  const auto mixed = [&](const Tensor& matrix, const Ragged& y) {  // matrix y
    Ragged x = rows;
    x.values = matrix.reshape({all * rank, rank});
    return transformed(queue, x, y.values.reshape({all, rank, d}));
  };
  // Y = B C becomes (B C B^T)^-1 Y: the same span, and rows that are orthonormal once it stays.
  for (int round = 0; round < rounds; ++round) {
    const Scratch inner(queue.scratch);
    const Ragged next = transformed(queue, rows, squares.reshape({all, d, d}));
    queue.move(mixed(inverse(queue, products(rows, next)), next).values, rows.values);
  }
  queue.move(rows.values, out.rows);
  queue.move(mixed(inverse(queue, products(rows, rows)), rows).values, out.dual);
  return out;
}

Tensor main_directions(Queue& queue, const Ragged& x, int64_t rank, int rounds) {
  const int64_t d = x.values.size[1], all = x.segments();
  const Tensor out = queue.scratch.take(Dtype::F32, {all, d, d}), flat = out.reshape({all * d, d});
  if (rank >= d) return compute(queue, mod(place(), d) == channel(), flat), out;
  const Scratch scratch(queue.scratch);
  const MainRows main = main_rows(queue, x, rank, rounds);
  Ragged columns = numbers(queue, all, d, all, all * d);
  columns.values = compute(queue, Dtype::F32, {all * d, rank},
                           load(main.rows, (floor_div(place(), d) * rank + channel()) * d + mod(place(), d)));
  queue.move(transformed(queue, columns, main.dual.reshape({all, rank, d})).values, flat);
  return out;
}

Ragged future_queries(const LayerView& at, int64_t count) {
  const Rope* rope = at.model.rope(at.layer);
  if (!rope) return at.q;
  const Ragged plain = turned(at.queue, at.q, backwards(at.queue, *rope), at.q_pos);
  return transformed(at.queue, plain, mean_rotation(at.queue, *rope, at.q.values.size[1], at.q.heads, at.prompt, count));
}

}  // namespace heed
