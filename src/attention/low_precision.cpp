#include "attention/low_precision.h"

#include <cmath>

#include "attention/scores.h"
#include "attention/select.h"

namespace heed {

void round_to(Queue& queue, Format format, const Tensor& x) {
  const Scratch scratch(queue.scratch);
  const Num value = load(x, index());
  if (format == Format::F16) {
    const Tensor half = queue.scratch.take(Dtype::F16, {x.numel()});
    const Tensor flat = x.reshape({x.numel()});
    compute(queue, load(flat, index()), half);
    compute(queue, load(half, index()), flat);
  }
  if (format != Format::E4M3) return;
  std::vector<float> steps;  // between numbers from 2^e to 2^(e + 1), and between those below 2^-6
  for (int e = -6; e <= 8; ++e) steps.push_back(std::ldexp(1.0f, e - 3));
  // Rounding of the logarithm may put a number that is next to a power of 2 above it, where it is rounded to all the same.
  const Num exponent = clamp(floor(log(abs(value)) * (1 / std::log(2.0)) + 1e-12), -6, 8);
  const Num step = load(queue.upload(steps), exponent + 6);
  compute(queue, clamp(round(value / step) * step, -448, 448), x);
}

Ragged coded(Queue& queue, const Ragged& x, std::span<const int64_t> lengths, int levels, const CodeGroups& by) {
  const int64_t rows = x.values.size[0], d = x.values.size[1], each = by.block / by.groups, period = by.groups * by.run;
  Ragged out = x;
  out.values = queue.scratch.take(Dtype::F32, {rows, d});
  const Scratch scratch(queue.scratch);
  const Grids top = grids(queue, 1, rows, 1);
  {
    const Scratch inner(queue.scratch);
    const Grids sizes = grids(queue, 1, rows, d);
    compute(queue, abs(load(x.values, index())), sizes.cells.values.reshape({rows, d}));
    queue.run->reduce(queue, sizes, {.to = Reduce::To::Rows, .kind = ReduceKind::Max}, top);
  }
  // Whole blocks in another order, so that the rows of a group follow one another.
  std::vector<int64_t> whole;
  for (const int64_t length : lengths) whole.push_back((length + by.block - 1) / by.block * by.block);
  Ragged sorted = numbers(queue, whole, x.heads);
  const Tensor from = queue.scratch.take(Dtype::I32, {sorted.bound});
  const Num inside = mod(place(), by.block), member = mod(inside, each);
  compute(queue, sorted,
          place() - inside + floor_div(member, by.run) * period + floor_div(inside, each) * by.run + mod(member, by.run),
          from);
  const Num row = load(from, index());
  compute(queue, sorted, pick(row < length_of(x, segment()), load(top.cells.values, begin_of(x, segment()) + row), 0),
          sorted.values);
  const Tensor most = spread(queue, sorted, {.of = Spread::Of::Max, .block = each}).values;
  const Tensor scales = queue.scratch.take(Dtype::F32, {rows});
  const Num place_in_group = floor_div(inside, period) * by.run + mod(inside, by.run),
            group = floor_div(mod(inside, period), by.run);
  compute(queue, x,
          load(most, begin_of(sorted, segment()) + place() - inside + group * each + place_in_group) / levels + 1e-7,
          scales);
  const Num value = load(x.values, index()), scale = load(scales, begin_of(x, segment()) + place());
  compute(queue, x, pick(value < 0, -1, 1) * floor(abs(value) / scale + 0.5) * scale, out.values);
  return out;
}

}  // namespace heed
