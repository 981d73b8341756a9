#include "attention/scores.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// CAOTE (Goel et al., 2025): an inner score a, normalised to weights, tells how far the output moves when one entry goes:
// a_j / (1 − a_j) ‖o − v_j‖ exactly, with o = Σ a v (fast: the plain mean of the values). What the inner policy forces
// stays forced and has no part in a and o. Scores that are no weights (negative ones) count as 0.
struct Caote final : KeepWrapper {
  bool fast;

  static std::vector<ParamInfo> params() {
    return {param(&Caote::fast, "fast", false, "FastCAOTE: the mean of the values in place of their weighted sum")};
  }

  Ragged score(LayerView& at) const override {
    const Ragged given = inner->score(at), values = stored_values(at);
    const Ragged weights = combine(at.queue, combine(at.queue, given, Combine::Finite, 0), Combine::Max, 0);
    const Ragged a = shares(at.queue, weights);
    const Ragged out = fast ? spread(at.queue, values, {.of = Spread::Of::Mean})
                            : spread(at.queue, combine(at.queue, values, a, Combine::Multiply), {.of = Spread::Of::Sum});
    const Ragged moved = row_norms(at.queue, combine(at.queue, values, out, Combine::Add, -1));
    const Ragged rest = combine(at.queue, combine(at.queue, a, Combine::Multiply, -1), Combine::Add, 1);
    const Ragged c = combine(at.queue, combine(at.queue, rest, a, Combine::Power, -1), moved, Combine::Multiply);
    // A single entry has no rest, hence no finite score: it never goes.
    return combine(at.queue, given, combine(at.queue, c, Combine::Finite, float(kInfinity)), Combine::Forced);
  }
};

}  // namespace

Entry caote() {
  Entry e = entry<Caote>("caote", "CAOTE: KV Caching through Attention Output Error based Token Eviction",
                         "Goel et al., 2025, arXiv 2504.14051", 2025, uint8_t(Role::Keep));
  e.equation = "c_j = a_j / (1 − a_j) ‖Σ a v − v_j‖, a = the inner score / its sum; evict the lowest c";
  e.needs = "a keep policy inside whose scores are weights: h2o, tova, snapkv";
  e.identity = "caote(snapkv(budget=1.0))";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
