#include <cmath>

#include "attention/rotation.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Expected Attention (Devoto et al., 2025): queries to come are taken for Gaussian, with the mean and covariance that the
// prompt's have before rotation, turned by the mean rotation R of the next `future` positions; E e^(q·k/√d) then has a
// closed form.
struct ExpectedAttention final : KeepPolicy {
  int future, sinks;
  double eps;
  bool covariance, norm;

  static std::vector<ParamInfo> params() {
    using M = ExpectedAttention;
    return keep_params<M>(
        "1024", "prompt",
        {
            param(&M::future, "future", 512, 1, 1 << 16, "positions to come, a power of 2"),
            param(&M::sinks, "sinks", 4, 0, 1 << 20, "first entries that always stay and whose queries do not count"),
            param(&M::eps, "eps", 0, 0, 1,
                  "added to an expected weight before the value's norm multiplies it (for adakv: 0.01)"),
            param(&M::covariance, "covariance", true, "false: the mean query alone"),
            param(&M::norm, "norm", true, "weights times ‖v‖"),
        });
  }
  std::string check() const override {
    if (future & (future - 1)) return "future=" + std::to_string(future) + " is no power of 2";
    if (when.decodes())
      return "when=every(n) cuts while decoding, but the statistics are a prompt's: when=prompt or when=chunk";
    return too_small(budget, sinks, "sinks");
  }

  Ragged score(LayerView& at) const override {
    const int64_t group = at.model.group();
    const float scale = at.scale();
    const Spread counted{.of = Spread::Of::Mean, .first = sinks};
    const Ragged x = future_queries(at, future), keys = stored_keys(at);
    Ragged count = x;  // how many queries count, for each row
    count.values = ones(at.queue, x.values.size[0]);
    count = spread(at.queue, count, {.of = Spread::Of::Sum, .first = sinks});
    const Ragged centred = combine(at.queue, x, spread(at.queue, x, counted), Combine::Add, -1);
    const Ragged scaled = combine(at.queue, centred, combine(at.queue, count, Combine::Power, -0.5), Combine::Multiply);
    const Ragged mean = mean_rows(at.queue, without_first(at.queue, x, sinks)),
                 deviations = without_first(at.queue, scaled, sinks);

    Ragged total;
    for (int64_t member = 0; member < group; ++member) {
      Ragged z = dots(at.queue, members(at.queue, mean, group, member), keys, scale);
      if (covariance) {
        const Tensor s = outer_sums(at.queue, members(at.queue, deviations, group, member));
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

}  // namespace

Entry expected_attention() {
  Entry e = entry<ExpectedAttention>(
      "expected-attention",
      "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
      "Devoto et al., 2025, arXiv 2510.00636", 2025, uint8_t(Role::Keep));
  e.equation = "z_j = R μ·k_j / √d + k_j^T R S R^T k_j / 2d; s_j = (mean over the group of softmax z_j + ε) ‖v_j‖";
  e.needs = "queries of the prompt";
  e.identity = "expected-attention(budget=1.0)";
  e.verified = {"identity", "formula", "model"};
  return e;
}

}  // namespace heed::mechanisms
