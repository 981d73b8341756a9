#include "mechanisms/entries.h"
#include "mechanisms/keep/snapkv.h"

namespace heed::mechanisms {

namespace {

// SpecKV (Galim et al., 2025): a draft model answers the prompt, and the model keeps what the prompt's tail and the
// drafted tokens look at: SnapKV with maxima throughout. The draft is fed as the end of the prompt, and `look` says
// how many tokens it has: they vote and go. A fraction is of what was fed. Its sparse prompt, and the prompt
// compression of the same paper, which choose text and not entries, are left out.
struct SpecKV final : SnapKV {
  static std::vector<ParamInfo> params() {
    using M = SpecKV;
    return keep_params<M>(
        "256", "prompt",
        {
            param<M, int>(&M::window, "window", 32, 1, 4096,
                          "last queries before the draft, which vote and whose keys stay"),
            param<M, int>(&M::look, "look", 0, 0, 1 << 20, "drafted tokens at the end of the prompt, which vote and go"),
            param<M, int>(&M::kernel, "kernel", 7, 1, 63, "width of the maximum over neighbouring keys, odd"),
        });
  }
  SpecKV() { rows = Observe::Rows::Max, pool.value = group.value = 1; }
};

}  // namespace

Entry spec_kv() {
  Entry e = entry<SpecKV>("spec-kv", "Draft-based Approximate Inference for LLMs",
                          "Galim et al., 2025, arXiv 2506.08373", 2025, uint8_t(Role::Keep));
  e.equation =
      "s_j = max_k(max over the last w rows, the drafted rows and the group of P_ij); keep top (C − w) of j < L − w, "
      "and the last w";
  e.needs = "drafted tokens at the end of the prompt; without them it votes as SnapKV does";
  e.identity = "spec-kv(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
