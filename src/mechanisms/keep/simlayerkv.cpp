#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// SimLayerKV (Zhang et al., 2024): a layer is lazy when the last query, over all heads, pays more than `threshold` to the
// first and the latest entries (its own left out); a lazy layer keeps those alone, the others keep all. As released a
// lazy layer keeps recent − 1.
struct SimLayerKV final : KeepPolicy {
  double threshold;
  int sinks, recent;

  static std::vector<ParamInfo> params() {
    using M = SimLayerKV;
    return {
        param(&M::when, "when", "when", "prompt", "prompt, chunk, every(n)", "when the policy cuts"),
        param(&M::threshold, "threshold", 0.9, 0, 1,
              "mass that makes a layer lazy (Llama 3: 0.9, Llama 2: 0.65, Mistral: 0.8, Qwen: 0.85); 1: none"),
        param(&M::sinks, "sinks", 4, 0, 1 << 20, "first entries of a lazy layer"),
        param(&M::recent, "recent", 1024, 2, 1 << 20, "latest entries whose mass counts; all but one of them stay"),
    };
  }

  /// 1 for the first `first` and the last `last` entries, else 0.
  static Ragged ends(const LayerView& at, int64_t first, int64_t last) {
    const Ragged marks = at.per_entry();
    compute(at.queue, marks, 0, marks.values);
    return combine(at.queue, force(at.queue, marks, first, last), Combine::AtLeast);
  }

  // 1 for what stays.
  Ragged score(LayerView& at) const override {
    Observe how;
    how.rows = Observe::Rows::Last, how.heads = Observe::Heads::LayerMean;
    const Ragged paid = at.observe(at.last_queries(1), how), own = ends(at, 0, 1);
    const Ragged others = combine(at.queue, ends(at, sinks, recent + 1), own, Combine::Add, -1);
    const Ragged mass = spread(at.queue, combine(at.queue, paid, others, Combine::Multiply), {.of = Spread::Of::Sum});
    const Ragged busy = combine(at.queue, combine(at.queue, mass, Combine::Multiply, -1), Combine::AtLeast,
                                -float(threshold));
    return combine(at.queue, ends(at, sinks, recent - 1), busy, Combine::Max);
  }
  bool unbounded() const override { return true; }
  Tensor allocate(const Allocation& a) const override { return passing(a, 1); }
};

}  // namespace

Entry simlayerkv() {
  Entry e = entry<SimLayerKV>("simlayerkv", "SimLayerKV: A Simple Framework for Layer-Level KV Cache Reduction",
                              "Zhang et al., 2024, arXiv 2410.13846", 2024, uint8_t(Role::Keep));
  e.equation =
      "lazy iff Σ P_last,j over j < 4 and the last 1024 > τ, mean over heads; lazy layers keep the first 4 and the "
      "last 1023";
  e.needs = "nothing";
  e.identity = "simlayerkv(threshold=1)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
