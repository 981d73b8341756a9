#include "attention/reads.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "attention/spans.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Ltri-LLM (Tang et al., 2024): on the attention map of a prompt, spans that mean something show as triangles on the
// diagonal. Those of the largest sums above a baseline are cut out, and a query reads the spans it likes best besides the
// first and the latest entries. There is no released code, and the paper leaves much open. Here: the map is what the
// model's own attention paid, in stretches that spans do not cross, the mean over the query heads of a KV head; no two
// spans overlap, and what lies between two is one; a span is known by the mean of its keys, so that it is worth the mean
// logit of its entries; the heads of a group decide together, those of other groups and earlier steps have no vote; the
// last span that the budget reaches is read in part; a share of a short text that has no room for all of the first and the
// latest entries is filled with the latest before the first. Prompts are read densely, and what is generated stands in
// spans of `longest`.
struct LtriLlm final : Mechanism {
  Budget budget;
  int sinks, local, stretch, longest, first_dense;
  double baseline;

  static std::vector<ParamInfo> params() {
    using M = LtriLlm;
    return {
        budget_param(&M::budget, "2048", "entries that a KV head reads, first and latest ones among them"),
        param(&M::sinks, "sinks", 16, 0, 1 << 20, "first entries, which are always read"),
        param(&M::local, "local", 256, 1, 1 << 20, "latest entries, which are always read"),
        param(&M::stretch, "stretch", 64, 2, 1024, "tokens of a prompt that are cut into spans together"),
        param(&M::longest, "longest", 16, 2, 1024, "entries of the longest span that is looked for"),
        param(&M::baseline, "baseline", 0.02, 0, 1, "what a token of a span must pay each token before it there"),
        dense_layers_param(&M::first_dense, 0),
    };
  }
  std::string check() const override { return too_small(budget, sinks + local, "sinks and local"); }

  // Whether an entry begins a span; −1: nobody has looked yet.
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.columns = {{.name = "ltri_llm.begins", .fill = -1}};
    return n;
  }

  void observe(LayerView& at) const override {
    if (at.decoding() || at.phase == Phase::Replay || reads_all(at, first_dense)) return;
    const Ragged begins = at.column("ltri_llm.begins");
    each_slice(at, stretch, [&](const Slice& s) {
      const Tensor maps = paid_inside(at, s, stretch);
      const Tensor found = span_begins(at.queue, triangles(at.queue, maps, s.n, stretch, longest, baseline), stretch, longest);
      const int64_t head = s.sequence * at.model.g + s.kv_head, old = s.m - s.n;
      compute(at.queue, segments(begins, head, head + 1, 1),
              pick(place() < old, load(begins.values, index()), load(found, max(0, place() - old))), begins.values);
    });
    at.set_column("ltri_llm.begins", begins);
  }

  Read read(LayerView& at) const override {
    if (reads_all(at, first_dense)) return {};
    Queue& queue = at.queue;
    const Ragged begins = at.column("ltri_llm.begins"), where = stored_positions(at);
    const Num known = load(begins.values, index());
    compute(queue, begins, pick(known < 0, mod(load(where.values, index()), longest) == 0, known), begins.values);
    Observe how;
    how.rows = Observe::Rows::Last, how.heads = Observe::Heads::GroupMean, how.logits = true;
    const Ragged liked = span_means(queue, begins, at.observe(at.q, how));
    const Tensor most = compute(queue, Dtype::I32, {liked.segments()}, granted(budget, length_of(liked, index())));
    const Num room = load(most, segment()), latest = min(local, room), first = min(sinks, room - latest);
    compute(queue, liked, pick(place() < first || place() >= length() - latest, kInfinity, load(liked.values, index())),
            liked.values);
    return best_blocks(
        at, Plan::Scope::KvHead, liked, 1, [&](const Num& head) { return load(most, head); }, at.store->longest());
  }
};

}  // namespace

Entry ltri_llm() {
  Entry e = entry<LtriLlm>("ltri_llm",
                           "Ltri-LLM: Streaming Long Context Inference for LLMs with Training-Free Dynamic Triangular "
                           "Attention Pattern",
                           "Tang et al., 2024, arXiv 2412.04757", 2024, uint8_t(Role::Read));
  e.equation =
      "spans [x, y] of the largest Σ_{x ≤ j ≤ i ≤ y} (P_ij − θ), none overlapping; read sinks, the latest and the "
      "spans of the largest q · mean key";
  e.needs = "a number beside each entry; in prompts a map of every stretch";
  e.identity = "ltri_llm(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
