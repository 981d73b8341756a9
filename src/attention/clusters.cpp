#include "attention/clusters.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "attention/inputs.h"
#include "attention/maps.h"
#include "attention/scores.h"
#include "attention/select.h"

namespace heed {

Tensor hashed(Queue& queue, const Tensor& rows, const Tensor& planes, int bits) {
  const int64_t count = rows.size[0], sides = planes.size[0], tables = sides / bits;
  const Tensor out = queue.scratch.take(Dtype::F32, {count, tables});
  const Ragged all = heads_of(queue, rows, 1, count), normals = heads_of(queue, planes, 1, sides);
  constexpr int64_t part = 1024;  // rows at a time: bounds what their sides take
  for (int64_t first = 0; first < count; first += part) {
    const Scratch scratch(queue.scratch);
    const int64_t n = std::min(part, count - first);
    const Grids side = grids(queue, 1, n, sides);
    Grids code = grids(queue, 1, n, tables);
    code.cells.values = out.slice(0, first, first + n).reshape({n * tables});
    Proxy dot;
    dot.scale = 1, dot.causal = false;
    queue.run->proxy(queue, n == count ? all : rows_between(queue, all, first, first + n), normals, dot, side);
    const Num bit = round(exp(mod(index(), bits) * std::numbers::ln2));
    compute(queue, pick(load(side.cells.values, index()) > 0, bit, 0), side.cells.values);
    Reduce sum;
    sum.col_block = bits;
    queue.run->reduce(queue, side, sum, code);
  }
  return out;
}

std::vector<double> lloyd_max(int count, double low, double high, const std::function<double(double)>& density) {
  constexpr size_t cells = 4096;
  const double step = (high - low) / double(cells);
  std::vector<double> mass{0}, moment{0};  // up to the beginning of a grid cell
  for (size_t i = 0; i < cells; ++i) {
    const double t = low + (double(i) + 0.5) * step, f = density(t);
    mass.push_back(mass.back() + f), moment.push_back(moment.back() + f * t);
  }
  const auto until = [&](const std::vector<double>& sums, double t) {
    const double at = std::clamp((t - low) / step, 0.0, double(cells));
    const size_t i = std::min(size_t(at), cells - 1);
    return sums[i] + (sums[i + 1] - sums[i]) * (at - double(i));
  };
  // Begun at quantiles of equal mass.
  std::vector<double> points;
  for (int i = 0; i < count; ++i) {
    const double wanted = mass.back() * (i + 0.5) / count;
    points.push_back(low + step * double(std::lower_bound(mass.begin(), mass.end(), wanted) - mass.begin()));
  }
  for (int round = 0; round < 1000; ++round) {
    double before = low, change = 0;
    for (size_t i = 0; i < points.size(); ++i) {
      const double end = i + 1 < points.size() ? (points[i] + points[i + 1]) / 2 : high;
      const double held = until(mass, end) - until(mass, before);
      const double mean = held > 0 ? (until(moment, end) - until(moment, before)) / held : points[i];
      change = std::max(change, std::abs(mean - points[i]));
      points[i] = mean, before = end;
    }
    if (change < 1e-9 * (high - low)) break;
  }
  return points;
}

Clusters clustered(Queue& queue, const Ragged& segment, int64_t length, int64_t count, int rounds, bool cosine) {
  const int64_t d = segment.values.size[1];
  const auto room = [&](int64_t n) {
    Ragged out = numbers(queue, std::span(&n, 1), 1, d);
    out.values = out.values.reshape({n, d});  // also where d is 1
    return out;
  };
  // A copy, so that rows count from 0.
  const Ragged rows = room(length);
  compute(queue, rows, load(segment.values, (begin_of(segment, 0) + place()) * d + channel()), rows.values);
  const Ragged centroids = room(count);
  compute(queue, centroids, load(rows.values, floor_div(place() * length, count) * d + channel()), centroids.values);
  const Clusters out{centroids.values, queue.scratch.take(Dtype::I32, {length})};
  const auto join = [&] {
    const Scratch scratch(queue.scratch);
    Ragged to = cosine ? unit_rows(queue, centroids) : centroids;
    Plan all;
    all.causal = false;
    Mods dot;
    dot.scale = 1;
    // |x − c|² is least where x · c − |c|² / 2 is largest.
    if (!cosine) dot.key_bias = row_dots(queue, centroids, centroids, -0.5f).values;
    RowStats stats;
    stats.argmax = out.labels;
    queue.run->observe_rows(queue, rows, {.panel = &to, .pages = nullptr, .read = nullptr}, &all, dot, stats);
  };
  for (int round = 0; round < rounds; ++round) {
    join();
    const Scratch scratch(queue.scratch);
    const Ragged sums = sums_by(queue, rows, out.labels, centroids);
    Ragged one = numbers(queue, std::span(&length, 1), 1), many = numbers(queue, std::span(&count, 1), 1);
    compute(queue, one, 1, one.values);
    const Ragged sizes = sums_by(queue, one, out.labels, many);
    const Num size = load(sizes.values, place());
    compute(queue, centroids, pick(size > 0, load(sums.values, index()) / max(size, 1), load(centroids.values, index())),
            centroids.values);
  }
  join();
  return out;
}

}  // namespace heed
