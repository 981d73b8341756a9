#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Knorm (Devoto et al., 2024): keys of small norm draw attention; keep those. Nothing is kept for its place unless `sinks`
// says so (as in kvpress).
struct Knorm final : KeepPolicy {
  int sinks;

  static std::vector<ParamInfo> params() {
    using M = Knorm;
    return keep_params<M>("1024", "prompt", {param(&M::sinks, "sinks", 0, 0, 64, "first entries that always stay")});
  }
  std::string check() const override { return too_small(budget, sinks, "sinks"); }

  // A rotation keeps a norm: keys as the store has them will do.
  Ragged score(LayerView& at) const override {
    const Ragged norms = row_norms(at.queue, stored_keys(at));
    return force(at.queue, combine(at.queue, norms, Combine::Multiply, -1), sinks, 0);
  }
};

}  // namespace

Entry knorm() {
  Entry e = entry<Knorm>("knorm", "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
                         "Devoto et al., 2024, arXiv 2406.11430", 2024, uint8_t(Role::Keep));
  e.equation = "keep the top B of −‖k_j‖₂";
  e.needs = "nothing";
  e.identity = "knorm(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
