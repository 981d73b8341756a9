#include "attention/reads.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Quest (Tang et al., 2024): a page's channel-wise bounds give the most that any of its keys can score; the query reads the
// pages that promise most. As in the authors' kernels the last page is not scored but always read, and counts in the
// budget; pages are counted by their ceiling, so that a budget of all entries is dense. A fraction is of the entries held.
struct Quest final : Mechanism {
  Budget budget;
  Choice group;
  int page, first_dense;

  static std::vector<ParamInfo> params() {
    using M = Quest;
    return {
        budget_param(&M::budget, "1024", "entries read by each query head"),
        param(&M::page, "page", 16, 1, 64, "entries of a page: 1, 2, 4, … 64"),
        param(&M::group, "group", {"each", "max", "mean"}, 0,
              "whether each query head reads pages of its own, or those of a KV head the same, by the largest or the "
              "mean bound"),
        dense_layers_param(&M::first_dense, 2),
    };
  }
  std::string check() const override { return uneven(page, "page"); }

  std::string low() const { return "quest.low" + std::to_string(page); }
  std::string high() const { return "quest.high" + std::to_string(page); }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.columns = {{low(), Column::Keeps::KeyMin, 1, page}, {high(), Column::Keeps::KeyMax, 1, page}};
    return n;
  }

  Read read(LayerView& at) const override {
    if (reads_all(at, first_dense)) return {};
    using Of = PageChoice::Of;
    const Of of[] = {Of::Each, Of::Max, Of::Mean};
    return best_pages(at, low(), high(), budget, {.of = of[group.value], .recent = 1});
  }
};

}  // namespace

Entry quest() {
  Entry e = entry<Quest>("quest", "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
                         "Tang et al., 2024, arXiv 2406.10774", 2024, uint8_t(Role::Read));
  e.equation = "score(page) = Σ_c max(q_c min_c, q_c max_c); read the top ⌈B / page⌉ pages, the last one among them";
  e.needs = "two columns of bounds: 2 / page of the keys";
  e.identity = "quest(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
