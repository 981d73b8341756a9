#include "attention/rotation.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// CapKV (2026) as in kvpress: how much an entry's value adds to the log determinant of all values, each weighted by how
// well its key fits the mean query of the positions to come.
struct CapKV final : KeepPolicy {
  int future, sinks;
  double tau;

  static std::vector<ParamInfo> params() {
    using M = CapKV;
    return keep_params<M>(
        "1024", "prompt",
        {
            param(&M::tau, "tau", 5, 0, 1000, "sharpness of the weights"),
            param(&M::future, "future", 512, 1, 1 << 16, "positions to come, a power of 2"),
            param(&M::sinks, "sinks", 4, 0, 1 << 20, "first entries that always stay and whose queries do not count"),
        });
  }
  std::string check() const override {
    if (future & (future - 1)) return "future=" + std::to_string(future) + " is no power of 2";
    if (when.decodes())
      return "when=every(n) cuts while decoding, but the mean query is a prompt's: when=prompt or when=chunk";
    return too_small(budget, sinks, "sinks");
  }

  Ragged score(LayerView& at) const override {
    Queue& queue = at.queue;
    const int64_t group = at.model.group();
    const Ragged x = future_queries(at, future), values = stored_values(at), keys = unit_rows(queue, stored_keys(at));
    const Ragged mean = unit_rows(queue, mean_rows(queue, without_first(queue, x, sinks)));
    const Spread counted{.of = Spread::Of::Max, .first = sinks};
    Ragged total;
    for (int64_t member = 0; member < group; ++member) {
      const Ragged fit = dots(queue, members(queue, mean, group, member), keys, 1 / float(at.store->shape().d));
      const Ragged w = combine(queue, combine(queue, fit, spread(queue, fit, counted), Combine::Add, -1), Combine::Exp,
                               float(tau));
      const Ragged root = combine(queue, combine(queue, w, Combine::Add, 1e-6f), Combine::Power, 0.5);
      const Ragged scaled = combine(queue, values, root, Combine::Multiply);
      const Tensor inverted = inverse(queue, outer_sums(queue, without_first(queue, scaled, sinks)), 1);
      const Ragged s = combine(queue, row_dots(queue, transformed(queue, values, inverted), values), w, Combine::Multiply);
      total = member ? combine(queue, total, s, Combine::Add) : s;
    }
    return force(queue, total, sinks, 0);
  }
};

}  // namespace

Entry capkv() {
  Entry e = entry<CapKV>("capkv", "CapKV, as in kvpress", "2026, arXiv 2604.25975", 2026, uint8_t(Role::Keep));
  e.equation = "s_j = w_j v_j^T (I + Σ w v v^T)^-1 v_j, w_j = e^(τ (cos(k_j, R μ) − max)), mean over the group";
  e.needs = "queries of the prompt";
  e.identity = "capkv(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
