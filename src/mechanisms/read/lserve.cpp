#include <algorithm>

#include "attention/patterns.h"
#include "attention/plans.h"
#include "attention/reads.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// LServe (Yang et al., 2025): streaming heads read sinks and the latest keys, in prompts and while decoding (rounded
// outward to pages there); the others are dense in prompts and read whole pages while decoding. A page is worth the
// most that any of its parts can score, and a choice holds for a few tokens; a page born since is read too. Which
// heads stream is given (DuoAttention's gates; the paper takes half of them), and how keys are quantised is left out.
struct LServe final : Mechanism {
  Range streaming;
  Budget budget;
  int64_t local;
  int sinks, recent, page, part, every;

  static std::vector<ParamInfo> params() {
    using M = LServe;
    return {
        budget_param(&M::budget, "4096", "entries read by each query head that does not stream; three pages at least"),
        param(&M::streaming, "streaming", "range", "", "0-3, 2-, [0,4-7], last",
              "KV heads that stream, by number: layer · KV heads + head; none if empty"),
        param(&M::sinks, "sinks", 128, 0, 1 << 20, "first keys that a streaming head reads"),
        param<M, int64_t>(&M::local, "local", 8192, 1, 1 << 30, "latest keys that a streaming head reads in a prompt"),
        param(&M::recent, "recent", 256, 1, 1 << 20, "latest keys that it reads while decoding"),
        param(&M::page, "page", 64, 1, 64, "entries of a page: 1, 2, 4, … 64"),
        param(&M::part, "part", 16, 1, 64, "entries of a page's part; divides page"),
        param(&M::every, "every", 4, 1, 1 << 20, "tokens from one choice of pages to the next"),
    };
  }
  std::string check() const override {
    if (page % part) return "part=" + std::to_string(part) + " does not divide page=" + std::to_string(page);
    return uneven(page, "page");
  }

  std::string low() const { return "lserve.low" + std::to_string(part); }
  std::string high() const { return "lserve.high" + std::to_string(part); }
  Needs needs(const ModelInfo& model) const override {
    Needs n;
    n.columns = {{low(), Column::Keeps::KeyMin, 1, part},
                 {high(), Column::Keeps::KeyMax, 1, part},
                 {.name = "lserve.read", .width = model.group(), .fill = 1}};
    return n;
  }

  /// The query heads of a layer that stream.
  Range streams(const LayerView& at) const {
    Range out;
    const int g = at.model.g, group = at.model.group();
    for (int kv = 0; kv < g && !streaming.all(); ++kv)
      if (streaming.holds(at.layer * g + kv, at.model.layers * g))
        out.spans.push_back({kv * group, (kv + 1) * group - 1});
    return out;
  }

  Plan plan(LayerView& at) const override {
    const Range which = streams(at);
    Plan dense;
    dense.causal = at.plan.causal;
    if (which.all()) return dense;
    const Plan shape = pattern_plan(at, [this](int64_t i, int64_t, const AddKeys& add) {
      add(0, sinks);
      add(i - local + 1, i + 1);
    });
    return limit_heads(at, shape, at.k, longest_keys(at), which);
  }

  Read read(LayerView& at) const override {
    if (at.mods.window > 0) return {};
    if (at.step() % every == 0) choose(at);
    Queue& queue = at.queue;
    const int64_t h = at.q.heads;
    const Range which = streams(at);
    const Num stream = which.all() ? Num(0) : among(queue, which, h, mod(segment(), h));
    const Ragged flags = by_query_head(queue, at.column("lserve.read"), at.model.group());
    const Ragged pages = of_blocks(queue, flags, page);
    const Num first = place() * page, near = first + page > length_of(flags, segment()) - recent;
    compute(queue, pages, pick(stream, first < sinks || near, load(pages.values, index())), pages.values);
    return chosen_blocks(at, Plan::Scope::QueryHead, pages, flagged(), page,
                         std::max<int64_t>(1, (at.store->longest() + page - 1) / page));
  }

  /// Flags the entries of the best pages; those of a sequence without a new token stay as they were.
  void choose(LayerView& at) const {
    Queue& queue = at.queue;
    const int64_t group = at.model.group(), split = page / part;
    const Ragged parts = spread(queue, block_scores(at, at.q, low(), high(), part), {.of = Spread::Of::Max, .block = split});
    const Ragged worth = of_blocks(queue, parts, split);
    Select best;
    best.count = compute(queue, Dtype::I32, {worth.segments()},
                         max(3, ceil_div(granted(budget, held_entries(at, index(), worth.heads)), page)));
    const Lists pages = chosen(queue, force(queue, worth, 0, 1), best,
                               std::max<int64_t>(1, (at.store->longest() + page - 1) / page));
    const Ragged flags = at.column("lserve.read");
    const Num own = pages.has(segment() * group + channel(), floor_div(place(), page));
    const Num asks = of_sequence(queue, at.rows, segment(), flags.heads) > 0;
    compute(queue, flags, pick(asks, own, load(flags.values, index())), flags.values);
    at.set_column("lserve.read", flags);
  }
};

}  // namespace

Entry lserve() {
  Entry e = entry<LServe>("lserve", "LServe: Efficient Long-sequence LLM Serving with Unified Sparse Attention",
                          "Yang et al., 2025, arXiv 2502.14866", 2025, Role::Plan | Role::Read);
  e.equation =
      "streaming heads: j < s or i − j < w; others, every 4 tokens: the top pages of 64 by max over parts of 16 of "
      "Σ_c max(q_c min_c, q_c max_c)";
  e.needs = "which heads stream (streaming=); bounds of every 16 keys, a flag beside each entry for each query head";
  e.identity = "lserve(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
