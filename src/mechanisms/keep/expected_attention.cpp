#include <functional>

#include "attention/array_file.h"
#include "attention/inputs.h"
#include "attention/rotation.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

/// E e^(q·k/√d) over queries to come, mean ± covariance; averaged over the group, with the values' norms. What varies is where
/// the Gaussian comes from.
struct ExpectedWeights : KeepPolicy {
  int future, sinks;
  double eps;
  bool covariance, norm;

  template <class M>
  static std::vector<ParamInfo> params_of(std::vector<ParamInfo> more = {}) {
    std::vector<ParamInfo> own = {
        param<M, int>(&M::future, "future", 512, 1, 1 << 16, "positions to come, a power of 2"),
        param<M, int>(&M::sinks, "sinks", 4, 0, 1 << 20,
                      "first entries that always stay and whose queries do not count"),
        param<M, double>(&M::eps, "eps", 0, 0, 1,
                         "added to an expected weight before the value's norm multiplies it (for adakv: 0.01)"),
        param<M>(&M::covariance, "covariance", true, "false: the mean query alone"),
        param<M>(&M::norm, "norm", true, "weights times ‖v‖"),
    };
    own.insert(own.end(), more.begin(), more.end());
    return keep_params<M>("1024", "prompt", std::move(own));
  }
  std::string check() const override {
    if (future & (future - 1)) return "future=" + std::to_string(future) + " is no power of 2";
    if (when.decodes())
      return "when=every(n) cuts while decoding, but the statistics are a prompt's: when=prompt or when=chunk";
    return too_small(budget, sinks, "sinks");
  }

  /// A Gaussian for every query head: its mean, one row a segment, and the covariances of the heads that come `member`-th in
  /// their groups, [KV segments, d, d].
  struct Gaussian {
    Ragged mean;
    std::function<Tensor(int64_t member)> covariance;
  };
  virtual Gaussian queries_to_come(LayerView& at) const = 0;

  Ragged score(LayerView& at) const override {
    const int64_t group = at.model.group();
    const float scale = at.scale();
    const Spread counted{.of = Spread::Of::Mean, .first = sinks};
    const Ragged keys = stored_keys(at);
    const Gaussian to_come = queries_to_come(at);

    Ragged total;
    for (int64_t member = 0; member < group; ++member) {
      Ragged z = dots(at.queue, members(at.queue, to_come.mean, group, member), keys, scale);
      if (covariance) {
        const Tensor s = to_come.covariance(member);
        const Ragged half = row_dots(at.queue, transformed(at.queue, keys, s), keys, scale * scale / 2);
        z = combine(at.queue, z, half, Combine::Add);
      }
      const Ragged weights = softmax(at.queue, z, counted);
      total = member ? combine(at.queue, total, weights, Combine::Add) : weights;
    }
    total = combine(at.queue, total, Combine::Multiply, 1 / float(group));
    if (norm) {
      total = combine(at.queue, total, Combine::Add, float(eps));
      total = combine(at.queue, total, row_norms(at.queue, stored_values(at)), Combine::Multiply);
    }
    return force(at.queue, total, sinks, 0);
  }
};

// Expected Attention (Devoto et al., 2025): queries to come are taken for Gaussian, with the mean and covariance that the
// prompt's have before rotation, turned by the mean rotation R of the next `future` positions; E e^(q·k/√d) then has a
// closed form.
struct ExpectedAttention final : ExpectedWeights {
  static std::vector<ParamInfo> params() { return params_of<ExpectedAttention>(); }

  Gaussian queries_to_come(LayerView& at) const override {
    Queue& queue = at.queue;
    const Spread counted{.of = Spread::Of::Mean, .first = sinks};
    const Ragged x = future_queries(at, future);
    Ragged count = x;  // how many queries count, for each row
    count.values = ones(queue, x.values.size[0]);
    count = spread(queue, count, {.of = Spread::Of::Sum, .first = sinks});
    const Ragged apart = combine(queue, x, spread(queue, x, counted), Combine::Add, -1);
    const Ragged scaled = combine(queue, apart, combine(queue, count, Combine::Power, -0.5), Combine::Multiply);
    const Ragged deviations = without_first(queue, scaled, sinks);
    const int64_t group = at.model.group();
    return {mean_rows(queue, without_first(queue, x, sinks)), [&queue, deviations, group](int64_t member) {
              return outer_sums(queue, members(queue, deviations, group, member));
            }};
  }
};

// The same with statistics of the model, learnt beforehand from texts, in place of the prompt's own: `heed calibrate`
// makes them (each text's first tokens left out, divisor n − 1). They are of queries before rotation, so the mean rotation
// comes here.
struct ExpectedAttentionStats final : ExpectedWeights {
  ArrayFile stats;

  static std::vector<ParamInfo> params() {
    return params_of<ExpectedAttentionStats>(
        {array_file_param(&ExpectedAttentionStats::stats, "stats",
                          "mean [layers, h, d] and covariance [layers, h, d, d] of plain queries")});
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    if (!stats)
      n.inputs = {
          "stats=@FILE.npz, which `heed calibrate` makes; or mean [h, d]: of the layer's queries before rotation",
          "covariance [h, d, d]"};
    return n;
  }
  std::unique_ptr<State> open(const ModelInfo& m) const override {
    if (!stats) return nullptr;
    stats.check_model(m);
    stats.array("mean", {m.layers, m.h, m.d}), stats.array("covariance", {m.layers, m.h, m.d, m.d});
    return nullptr;
  }

  Gaussian queries_to_come(LayerView& at) const override {
    Queue& queue = at.queue;
    const ModelInfo& m = at.model;
    const int64_t h = m.h, d = m.d, sequences = at.sequences() > 0 ? at.sequences() : at.store->segments() / m.g;
    Tensor mean, spread_out;
    if (stats && !is_given(at, "mean")) {
      mean = queue.upload(stats.array("mean", {m.layers, h, d})->select(0, at.layer));
      spread_out = queue.upload(stats.array("covariance", {m.layers, h, d, d})->select(0, at.layer));
    } else {
      mean = given(at, "mean", "[h, d]", {h, d}), spread_out = given(at, "covariance", "[h, d, d]", {h, d, d});
    }
    // A mean and d rows of the covariance for every query head of every sequence.
    const std::vector<int64_t> one(size_t(sequences * h), 1), many(size_t(sequences * h), d);
    Ragged mu = numbers(queue, one, h, d), s = numbers(queue, many, h, d);
    mu.values = compute(queue, Dtype::F32, {sequences * h, d}, load(mean, mod(index(), h * d)));
    s.values = compute(queue, Dtype::F32, {sequences * h * d, d}, load(spread_out, mod(index(), h * d * d)));
    if (const Rope* rope = m.rope(at.layer)) {
      const Tensor turn = mean_rotation(queue, *rope, d, h, at.prompt, future);
      mu = transformed(queue, mu, turn);
      const Ragged half = transformed(queue, s, turn);  // S R^T, and R S is its transpose
      const Num row = mod(place(), d), first = floor_div(place(), d) * d;
      s.values = compute(queue, Dtype::F32, {sequences * h * d, d}, load(half.values, (first + channel()) * d + row));
      s = transformed(queue, s, turn);
    }
    const int64_t group = m.group(), all = sequences * m.g;
    return {mu, [&queue, s, d, group, all](int64_t member) {
              const Num from = (floor_div(place(), d) * group + member) * d + mod(place(), d);
              return compute(queue, Dtype::F32, {all * d, d}, load(s.values, from * d + channel())).reshape({all, d, d});
            }};
  }
};

}  // namespace

Entry expected_attention() {
  Entry e = entry<ExpectedAttention>(
      "expected-attention",
      "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
      "Devoto et al., 2025, arXiv 2510.00636", 2025, uint8_t(Role::Keep));
  e.equation = "z_j = R μ·k_j / √d + k_j^T R S R^T k_j / 2d; s_j = (mean over the group of softmax z_j + ε) ‖v_j‖";
  e.needs = "queries of the prompt";
  e.identity = "expected-attention(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

Entry expected_attention_stats() {
  Entry e = entry<ExpectedAttentionStats>(
      "expected-attention-stats",
      "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
      "Devoto et al., 2025, arXiv 2510.00636", 2025, uint8_t(Role::Keep));
  e.equation = "as expected-attention, μ and S of the model's queries before rotation, learnt from texts";
  e.needs = "statistics of each query head, which `heed calibrate` learns (stats=@FILE.npz)";
  e.no_identity = "statistics come from a file; with them and budget=1.0 it is dense";
  e.verified = {"identity", "formula", "model"};
  return e;
}

}  // namespace heed::mechanisms
