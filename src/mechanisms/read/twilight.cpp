#include "attention/plans.h"
#include "attention/reads.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Twilight (Lin et al., 2025): the smallest set of entries that holds a share p of a query's weights, the crossing one
// included, so that a budget follows the query. Its base selector is all entries here, and weights come from the keys as
// they are stored rather than from 4-bit copies: what the published form approaches.
struct Twilight final : Mechanism {
  double p;
  int first_dense;

  static std::vector<ParamInfo> params() {
    using M = Twilight;
    return {
        param(&M::p, "p", 0.95, 0, 1, "share of a query's weights that is read"),
        dense_layers_param(&M::first_dense, 2),
    };
  }

  Read read(LayerView& at) const override {
    if (p >= 1 || reads_all(at, first_dense)) return {};
    const Ragged weights = with_queries(at, last_weights(at));
    Select mass;
    mass.by = Select::By::TopP, mass.p = float(p), mass.at_least = 1;
    const int64_t capacity = std::max<int64_t>(1, at.store->longest());
    const Tensor index = at.queue.scratch.take(Dtype::I32, {weights.segments() * capacity}),
                 count = at.queue.scratch.take(Dtype::I32, {weights.segments()});
    at.run().select(at.queue, weights, mass, capacity, index, count);
    Read read;
    read.plan = tokens_plan(at.queue, Plan::Scope::QueryHead, 1, index, count, capacity);
    return read;
  }
};

}  // namespace

Entry twilight() {
  Entry e = entry<Twilight>("twilight", "Twilight: Adaptive Attention Sparsity with Hierarchical Top-p Pruning",
                            "Lin et al., 2025, arXiv 2502.02770", 2025, uint8_t(Role::Read));
  e.equation = "read the smallest set with Σ P_j ≥ p, for each query head";
  e.needs = "nothing";
  e.identity = "twilight(p=1)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
