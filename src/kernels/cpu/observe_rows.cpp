// observe_rows: statistics of each row's own distribution.
#include <algorithm>

#include "kernels/check.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/row_sums.h"

namespace heed::HEED_ISA {
namespace {

/// Of the lanes of a tile.
struct RowTotals {
  float *entropy, *distance, *best, *best_key;  // [kTile]; best in log2
  float* span;                                  // [spans][kTile]
  static int64_t floats(int64_t spans) { return (4 + spans) * kTile; }
  explicit RowTotals(float* memory)
      : entropy(memory), distance(memory + kTile), best(memory + 2 * kTile), best_key(memory + 3 * kTile),
        span(memory + 4 * kTile) {}
};

void add(const Tile& tile, const Lanes& lanes, const Chunk& chunk, bool made, const KeyView& keys,
         const float* log_sums, WeightFunction weight, const RowStats& stats, const RowTotals& sums) {
  const bool sigmoid = weight == WeightFunction::Sigmoid;
  const int64_t spans = stats.span && stats.spans ? stats.spans.size[0] : 0;
  for (int j = 0; j < chunk.count; ++j) {
    const int64_t key = chunk.key[j];
    const F position = set(float(keys.position(key))), number = set(float(key));
    for (int w = 0; w < lanes.width; w += kLanes) {
      const F s = load(tile.s + int64_t(j) * lanes.width + w), x = made ? s : s * load(lanes.factor + w) * set(kLog2e);
      const auto shown = less(set(-kInfinity), x);
      F log_p = x - load(log_sums + w), p;
      if (sigmoid) {
        p = set(1) / (set(1) + exp2(zero() - x));
        float each[kLanes];
        store(each, p);
        for (float& e : each) e = std::log2(e);
        log_p = load(each);
      } else {
        p = exp2(log_p);
      }
      p = where(shown, p, zero());
      // p is 0 where log p is −∞ or close to it: that product is 0.
      const F term = where(less(zero(), p), p * log_p, zero());
      store(sums.entropy + w, load(sums.entropy + w) - term);
      store(sums.distance + w, fma(p, load(lanes.position + w) - position, load(sums.distance + w)));
      const F best = load(sums.best + w);
      // Keys come in ascending order within a part, but parts may interleave: the lower key of equals wins.
      const F best_key = load(sums.best_key + w);
      const F nearer = where(
          less(best, x), number,
          where(less_equal(best, x), where(less_equal(set(0), best_key), min(best_key, number), number), best_key));
      store(sums.best_key + w, where(shown, nearer, best_key));
      store(sums.best + w, where(shown, max(best, x), best));
      for (int64_t i = 0; i < spans; ++i) {
        if (key < stats.spans.at<int32_t>(i, 0) || key >= stats.spans.at<int32_t>(i, 1)) continue;
        store(sums.span + i * kTile + w, load(sums.span + i * kTile + w) + p);
      }
    }
  }
}

}  // namespace

void observe_rows(Queue& queue, const Ragged& q, const Keys& keys, const Plan* plan, const Mods& mods, const RowStats& stats) {
  constexpr const char* where = "observe_rows";
  const Scratch scratch(queue.scratch);
  Observed from(where, queue, q, keys, plan, mods, true);
  const int64_t rows = q.values.size[0], spans = stats.spans ? stats.spans.size[0] : 0;
  check_tensor(where, "entropy", stats.entropy, {rows}, true);
  check_tensor(where, "distance", stats.distance, {rows}, true);
  check_tensor(where, "argmax", stats.argmax, {rows}, true, Dtype::I32);
  check_tensor(where, "peak", stats.peak, {rows}, true);
  check_tensor(where, "lse", stats.lse, {rows}, true);
  check_tensor(where, "spans", stats.spans, {spans, 2}, true, Dtype::I32);
  check_tensor(where, "span", stats.span, {rows, spans}, true);
  from.sum_rows({});
  const bool sigmoid = mods.weight == WeightFunction::Sigmoid;
  const bool second = stats.entropy || stats.distance || stats.argmax || stats.peak || stats.span;
  const int64_t tile_bytes = Tile::bytes(from.shape()), floats = RowTotals::floats(spans);
  parallel_with(queue, tile_bytes + floats * 4, int64_t(from.tasks().size()), [&](char* memory, int64_t t) {
    Tile tile(from.shape(), memory);
    auto* numbers = reinterpret_cast<float*>(memory + tile_bytes);
    const RowTotals sums(numbers);
    const TileTask& task = from.tasks()[size_t(t)];
    const KeyView view = from.source().view(task, from.mods());
    const Lanes lanes = from.lanes(task, view);
    alignas(64) float log_sums[kTile];
    from.log_sums(t, lanes, log_sums);
    std::fill_n(numbers, floats, 0.0f);
    std::fill_n(sums.best, kTile, -kInfinity);
    std::fill_n(sums.best_key, kTile, -1.0f);
    if (second)
      from.each_chunk(tile, task, view, lanes, 0, view.size(), [&](const Chunk& chunk, bool made) {
        add(tile, lanes, chunk, made, view, log_sums, mods.weight, stats, sums);
      });
    for (int lane = 0; lane < lanes.count; ++lane) {
      const int64_t row = lanes.row[lane];
      const float best = sums.best[lane];
      if (stats.entropy) stats.entropy.as<float>()[row] = sums.entropy[lane] / kLog2e;
      if (stats.distance) stats.distance.as<float>()[row] = sums.distance[lane];
      if (stats.argmax) stats.argmax.as<int32_t>()[row] = int32_t(sums.best_key[lane]);
      if (stats.peak)
        stats.peak.as<float>()[row] = sums.best_key[lane] < 0 ? 0
                                      : sigmoid               ? 1 / (1 + std::exp2(-best))
                                                              : std::exp2(best - log_sums[lane]);
      if (stats.lse) stats.lse.as<float>()[row] = from.lse(t, lanes, lane);
      for (int64_t i = 0; stats.span && i < spans; ++i)
        stats.span.as<float>()[row * stats.span.stride[0] + i * stats.span.stride[1]] = sums.span[i * kTile + lane];
    }
  });
}

}  // namespace heed::HEED_ISA
