#include "attention/scores.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// KeyDiff (Park et al., 2025): the keys least like the mean direction of all keys stay. The paper feeds the prompt in blocks
// and cuts behind each, which is when=chunk on a text fed by chunks; kvpress cuts once.
struct KeyDiff final : KeepPolicy {
  static std::vector<ParamInfo> params() { return keep_params<KeyDiff>("1024", "prompt"); }

  Ragged score(LayerView& at) const override {
    const Ragged keys = unit_rows(at.queue, stored_keys(at)), anchor = unit_rows(at.queue, mean_rows(at.queue, keys));
    return dots(at.queue, anchor, keys, -1 / float(at.store->shape().d));
  }
};

}  // namespace

Entry keydiff() {
  Entry e = entry<KeyDiff>("keydiff",
                           "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in "
                           "Resource-Constrained Environments",
                           "Park et al., 2025, arXiv 2504.15364", 2025, uint8_t(Role::Keep));
  e.equation = "keep the top B of −cos(k_j, mean_i k_i / ‖k_i‖)";
  e.needs = "nothing";
  e.identity = "keydiff(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
