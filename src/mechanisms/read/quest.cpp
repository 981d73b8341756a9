#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Quest (Tang et al., 2024): a page's channel-wise bounds give the most that any of its keys can score; the query reads the
// pages that promise most. As in the authors' kernels the last page is not scored but always read, and counts in the
// budget; pages are counted by their ceiling, so that a budget of all entries is dense. A fraction is of the entries held.
struct Quest final : Mechanism {
  Budget budget;
  int page, first_dense;

  static std::vector<ParamInfo> params() {
    using M = Quest;
    return {
        param(&M::budget, "budget", "budget", "1024", "entries ≥ 1, or a fraction: 0.1, 10%",
              "entries read by each query head"),
        param(&M::page, "page", 16, 1, 64, "entries of a page: 1, 2, 4, … 64"),
        param(&M::first_dense, "dense", 2, 0, 1 << 20, "first layers that read everything (in a model that has more)"),
    };
  }
  std::string check() const override { return 64 % page ? "page=" + std::to_string(page) + " does not divide 64" : ""; }

  std::string low() const { return "quest.low" + std::to_string(page); }
  std::string high() const { return "quest.high" + std::to_string(page); }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.columns = {{low(), Column::Keeps::KeyMin, 1, page}, {high(), Column::Keeps::KeyMax, 1, page}};
    return n;
  }

  Read read(LayerView& at) const override {
    // A sliding window already bounds what is read.
    if ((at.layer < first_dense && at.model.layers > first_dense) || at.mods.window > 0) return {};
    const int64_t h = at.q.heads, group = at.model.group(), all = at.q.segments(),
                  most = (at.store->longest() + page - 1) / page;
    const Tensor held = at.store->pages().length;
    auto pages = [&](const Num& entries) { return ceil_div(entries, page); };
    const Ragged scores = numbers(at.queue, all, pages(load(held, floor_div(index(), group))), h, all * most);
    at.run().page_score(at.queue, at.q, at.store->pages(), at.stores->column(low()), at.stores->column(high()), scores);
    const Ragged rows = with_queries(at, force(at.queue, scores, 0, 1));
    const int64_t capacity = std::max<int64_t>(
        1, (std::min(budget.entries(at.store->longest()), at.store->longest()) + page - 1) / page);
    Select best;
    best.count = compute(at.queue, Dtype::I32, {rows.segments()},
                         pages(granted(budget, load(held, floor_div(query_segment(at, index()), group)))));
    const Tensor index = at.queue.scratch.take(Dtype::I32, {rows.segments() * capacity}),
                 count = at.queue.scratch.take(Dtype::I32, {rows.segments()});
    at.run().select(at.queue, rows, best, capacity, index, count);
    Read read;
    read.plan = blocks_plan(at.queue, Plan::Scope::QueryHead, 1, page, index, count, capacity);
    return read;
  }
};

}  // namespace

Entry quest() {
  Entry e = entry<Quest>("quest", "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
                         "Tang et al., 2024, arXiv 2406.10774", 2024, uint8_t(Role::Read));
  e.equation = "score(page) = Σ_c max(q_c min_c, q_c max_c); read the top ⌈B / page⌉ pages, the last one among them";
  e.needs = "two columns of bounds: 2 / page of the keys in f32";
  e.identity = "quest(budget=1.0)";
  e.verified = {"identity", "formula", "model"};
  return e;
}

}  // namespace heed::mechanisms
