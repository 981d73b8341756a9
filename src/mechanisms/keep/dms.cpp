#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// A threshold in place of a budget, after DMS (Lancucki et al., 2025) as kvpress uses it around any score: what scores less
// goes, but for the newest entries. The trained evictor is not part of it. Scores are those of the cut, so one that depends
// on the text (snapkv's) moves with it; the inner budget has no effect.
struct Dms final : KeepWrapper {
  double threshold;
  int window;

  static std::vector<ParamInfo> params() {
    using M = Dms;
    return {
        param(&M::threshold, "threshold", -1e30, -1e30, 1e30,
              "the least score that stays; needs a score of an absolute scale, such as knorm's"),
        param(&M::window, "window", 128, 0, 1 << 20, "newest entries that always stay"),
    };
  }

  Ragged score(LayerView& at) const override { return force(at.queue, inner->score(at), 0, window); }
  bool unbounded() const override { return true; }
  Tensor allocate(const Allocation& a) const override { return passing(a, float(threshold)); }
};

}  // namespace

Entry dms() {
  Entry e = entry<Dms>("dms", "Inference-Time Hyper-Scaling with KV Cache Compression",
                       "Lancucki et al., 2025, arXiv 2506.05345", 2025, uint8_t(Role::Keep));
  e.equation = "keep {j : s_j ≥ τ} ∪ the last w";
  e.needs = "a keep policy inside whose scores have an absolute scale";
  e.identity = "dms(knorm)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
