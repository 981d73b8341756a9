#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"
#include "mechanisms/keep/adakv.h"

namespace heed::mechanisms {

namespace {

// CriticalKV (Feng et al., 2025): of what a head may hold, a first share goes by the inner score; the rest by that score
// times how far the output matrix carries the value.
struct CriticalKV : KeepWrapper {
  double first, eps;

  static std::vector<ParamInfo> params() {
    using M = CriticalKV;
    return {
        param(&M::first, "first", 0.5, 0, 1, "share of a head's entries that the inner score alone chooses; 1: all"),
        param(&M::eps, "eps", 1e-4, 0, 1, "added to the inner score before the norm multiplies it"),
    };
  }

  Ragged rank(LayerView& at, const Ragged& given, const Tensor& counts) const override {
    Queue& queue = at.queue;
    const Ragged scores = inner->rank(at, given, counts), norms = output_norms(at);
    const Ragged carried = combine(queue, combine(queue, scores, Combine::Add, float(eps)), norms, Combine::Multiply);
    const int64_t all = scores.segments(), capacity = std::max<int64_t>(1, scores.bound);
    Select best;
    best.count = compute(queue, Dtype::I32, {all}, floor(first * load(counts, index())));
    const Lists sure = chosen(queue, scores, best, capacity);
    const Ragged out = combine(queue, scores, carried, Combine::Forced);
    compute(queue, out, pick(sure.has(segment(), place()), kInfinity, load(out.values, index())), out.values);
    return out;
  }
};

// Critical-AdaKV, of the same paper: the heads of a layer share one pool by the inner scores first.
struct CriticalAda final : CriticalKV {
  double alpha;

  static std::vector<ParamInfo> params() {
    std::vector<ParamInfo> all = CriticalKV::params();
    all.push_back(param(&CriticalAda::alpha, "alpha", 0.2, 0, 1, "share of a head's budget that it gets in any case"));
    return all;
  }
  Tensor allocate(const Allocation& a) const override { return floored(a, inner->allocate(a), alpha); }
};

}  // namespace

Entry criticalkv() {
  Entry e = entry<CriticalKV>("criticalkv",
                              "Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective",
                              "Feng et al., 2025, arXiv 2502.03805", 2025, uint8_t(Role::Keep));
  e.equation = "the top ⌊n / 2⌋ by s, then the best of the rest by (s_j + ε) mean over the group of ‖W_O v_j‖₁";
  e.needs = "a keep policy inside whose scores are weights, and the output matrix";
  e.identity = "criticalkv(snapkv(budget=1.0))";
  e.apply_inputs = {"output [hidden, h·d_v]: the output matrix"};
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

Entry critical_ada() {
  Entry e = entry<CriticalAda>("critical-ada",
                               "Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective",
                               "Feng et al., 2025, arXiv 2502.03805", 2025, uint8_t(Role::Keep));
  e.equation = "adakv by s says what each head holds; criticalkv which entries: criticalkv(adakv(port=true))";
  e.needs = "a keep policy inside whose scores are weights, and the output matrix";
  e.identity = "critical-ada(snapkv(budget=1.0))";
  e.apply_inputs = {"output [hidden, h·d_v]: the output matrix"};
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
