#include "attention/patterns.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// TKL (Hofstätter et al., 2020), the local self-attention of its document side: tokens of a chunk see their chunk and a few
// on either side of it. Its embeddings and its kernel pooling belong to the ranker.
struct Tkl final : Mechanism {
  int64_t chunk, overlap;

  static std::vector<ParamInfo> params() {
    using M = Tkl;
    return {
        param<M, int64_t>(&M::chunk, "chunk", 40, 1, 1000000000, "tokens of a chunk"),
        param<M, int64_t>(&M::overlap, "overlap", 5, 0, 1000000000, "tokens seen on either side of it"),
    };
  }

  Plan plan(LayerView& at) const override {
    return pattern_plan(at, [this](int64_t i, int64_t, const AddKeys& add) {
      const int64_t first = i / chunk * chunk;
      add(first - overlap, first + chunk + overlap);
    });
  }
};

}  // namespace

Entry tkl() {
  Entry e = entry<Tkl>("tkl", "Local Self-Attention over Long Text for Efficient Document Retrieval",
                       "Hofstätter et al., 2020, arXiv 2005.04908", 2020, uint8_t(Role::Plan));
  e.equation = "i sees c b − o ≤ j < (c + 1) b + o, c = ⌊i / b⌋";
  e.needs = "nothing";
  e.identity = "tkl(chunk=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
