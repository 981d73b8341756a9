#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Key re-rotation (kvpress; Corallo and Papotti, 2024): what stays moves together. Entry i of a head is read at position i,
// and the text goes on behind the last; keys are kept before rotation, so nothing is rounded twice. The inner policy scores
// keys rotated as they are read.
struct Rerotate final : KeepWrapper {
  static std::vector<ParamInfo> params() { return {}; }

  Needs needs(const ModelInfo& model) const override {
    Needs n = inner->needs(model);
    n.plain_keys = true;
    n.positions = Read::Positions::Cache;
    return n;
  }
};

}  // namespace

Entry rerotate() {
  Entry e = entry<Rerotate>("rerotate", "FINCH: Prompt-guided Key-Value Cache Compression for Large Language Models",
                            "Corallo and Papotti, 2024, arXiv 2408.00167", 2024, uint8_t(Role::Keep));
  e.equation = "the i-th entry that stays is rotated at i: k_i ← R(i − p_i) k_i";
  e.needs = "a keep policy inside, and keys kept before rotation";
  e.identity = "rerotate(snapkv(budget=1.0))";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
