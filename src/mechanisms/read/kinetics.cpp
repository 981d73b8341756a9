#include "attention/reads.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// The block top-k of Kinetics (Sadhukhan, Chen et al., 2025): each KV head reads sinks, a window and the blocks whose mean
// logit over the group is highest, which is the mean query's logit at the mean key. Blocks are counted from the first
// entry, not from behind the sinks, so blocks that hold a sink or reach into the window are read whole.
struct Kinetics final : Mechanism {
  Budget budget;
  int block, sinks, local, first_dense;

  static std::vector<ParamInfo> params() {
    using M = Kinetics;
    return {
        budget_param(&M::budget, "1024",
                     "entries read by each KV head, sinks and window among them; a fraction is of the entries held"),
        param(&M::block, "block", 16, 1, 64, "entries of a block: 1, 2, 4, … 64"),
        param(&M::sinks, "sinks", 4, 0, 1 << 20, "first entries that are always read"),
        param(&M::local, "local", 64, 1, 1 << 20, "latest entries that are always read"),
        dense_layers_param(&M::first_dense, 1),
    };
  }
  std::string check() const override { return uneven(block, "block"); }

  std::string means() const { return "kinetics.mean" + std::to_string(block); }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.columns = {{means(), Column::Keeps::KeyMean, 1, block}};
    return n;
  }

  Read read(LayerView& at) const override {
    if (reads_all(at, first_dense)) return {};
    return best_pages(at, means(), means(), budget, {.of = PageChoice::Of::Mean, .sinks = sinks, .recent = local});
  }
};

}  // namespace

Entry kinetics() {
  Entry e = entry<Kinetics>("kinetics", "Kinetics: Rethinking Test-Time Scaling Laws",
                            "Sadhukhan, Chen et al., 2025, arXiv 2506.05333", 2025, uint8_t(Role::Read));
  e.equation = "score(block) = mean over the group of q · mean key; read sinks, the latest entries and the best blocks";
  e.needs = "a column of means: 1 / block of the keys in f32";
  e.identity = "kinetics(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
