#include "attention/patterns.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// PowerAttention (Chen et al., 2025): blocks at distances 0, 1, 2, 4, 8, … from the query's, so that every key is reached in
// a logarithm of layers; local blocks and sinks besides. Meant for models trained further with it.
struct Power final : Mechanism {
  int block, local, sinks;

  static std::vector<ParamInfo> params() {
    using M = Power;
    return {
        param(&M::block, "block", 256, 1, 1 << 20, "queries and keys of a block"),
        param(&M::local, "local", 5, 1, 1 << 30, "latest blocks that are seen, the query's own among them"),
        param(&M::sinks, "sinks", 1, 0, 1 << 20, "first blocks that are seen"),
    };
  }

  Plan plan(LayerView& at) const override {
    return pattern_plan(at, [this](int64_t i, int64_t, const AddKeys& add) {
      const int64_t own = i / block;
      add(0, int64_t(sinks) * block);
      add((own - local + 1) * block, i + 1);
      for (int64_t far = 1; far <= own; far *= 2) add((own - far) * block, (own - far + 1) * block);
    });
  }
};

}  // namespace

Entry power() {
  Entry e = entry<Power>("power",
                         "PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention",
                         "Chen et al., 2025, arXiv 2503.03588", 2025, uint8_t(Role::Plan));
  e.equation = "block b_q sees b_k iff x = b_q − b_k is 0 or a power of two, or x < local, or b_k < sinks";
  e.needs = "nothing";
  e.identity = "power(local=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
