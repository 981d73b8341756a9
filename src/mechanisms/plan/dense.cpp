#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {
struct Dense final : Mechanism {
  static std::vector<ParamInfo> params() { return {}; }
};
}  // namespace

// Every query reads every key it may see: the reference that all others are held against.
Entry dense() {
  Entry e = entry<Dense>("dense", "Attention Is All You Need", "Vaswani et al., 2017, arXiv 1706.03762", 2017, 0);
  e.equation = "o_i = Σ_j softmax_j(q_i·k_j / √d) v_j over j ≤ i";
  e.identity = "dense";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
