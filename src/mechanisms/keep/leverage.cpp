#include "mechanisms/keep/leverage.h"

#include <cmath>

#include "attention/rotation.h"
#include "attention/scores.h"
#include "base/random.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

/// Columns drawn from N(0, 1 / width), another matrix for each KV head: [segments, d, width].
Tensor drawn_sketch(Queue& queue, int64_t segments, int64_t heads, int64_t d, int64_t width, uint64_t seed) {
  Random random(seed);
  Buffer host(Dtype::F32, {segments, d, width});
  const std::span<float> all = host->span<float>();
  const int64_t own = heads * d * width;
  for (int64_t i = 0; i < int64_t(all.size()); ++i)
    all[size_t(i)] = i < own ? float(random.normal() / std::sqrt(double(width))) : all[size_t(i - own)];
  return queue.upload(host);
}

struct Leverage final : KeepPolicy {
  int sketch;
  double ridge;
  int64_t seed;

  static std::vector<ParamInfo> params() {
    using M = Leverage;
    return keep_params<M>(
        "1024", "prompt",
        {
            param(&M::sketch, "sketch", 48, 1, 4096, "channels that keys are sketched to; no sketch of fewer channels"),
            param(&M::ridge, "ridge", 0.01, 1e-6, 1e6, "added to the diagonal of the sketch's products"),
            param(&M::seed, "seed", 0, 0, 1000000000, "of the sketch; layers draw on their own"),
        });
  }

  Ragged score(LayerView& at) const override { return leverage_scores(at, plain_keys(at), sketch, ridge, seed); }
};

}  // namespace

Ragged leverage_scores(const LayerView& at, const Ragged& keys, int sketch, double ridge, int64_t seed) {
  Queue& queue = at.queue;
  const int64_t d = keys.values.size[1];
  Ragged y = combine(queue, keys, spread(queue, keys, {.of = Spread::Of::Mean}), Combine::Add, -1);
  if (sketch < d)
    y = transformed(queue, y,
                    drawn_sketch(queue, keys.segments(), keys.heads, d, sketch,
                                 uint64_t(seed) * 0x9E3779B97F4A7C15u + uint64_t(at.layer)));
  const Ragged scores = row_dots(queue, transformed(queue, y, inverse(queue, outer_sums(queue, y), ridge)), y);
  compute(queue, max(0, load(scores.values, index())), scores.values);
  return scores;
}

Entry leverage() {
  Entry e = entry<Leverage>(
      "leverage", "Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate Leverage Scores",
      "Chari et al., 2025, arXiv 2507.08143", 2025, uint8_t(Role::Keep));
  e.equation = "s_j = y_j^T (Σ y y^T + λ I)^-1 y_j, y_j = Φ^T (k_j − mean k), k before rotation";
  e.needs = "nothing";
  e.identity = "leverage(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
