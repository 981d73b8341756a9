#include "attention/inputs.h"
#include "attention/maps.h"
#include "attention/plans.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Superlinear attention (2026) in two steps: a query of its own looks at keys further and further apart, and around
// the best of them the attention query reads a span as long as the gaps there are, so that spans together reach every
// key. Each span is read on its own together with the latest keys, and what is read is mixed by the search's scores.
// Searching and reading take O(√i) keys of each query i.
struct Superlinear final : Mechanism {
  int spans, window;
  double back, ahead;

  static std::vector<ParamInfo> params() {
    using M = Superlinear;
    return {
        param(&M::spans, "spans", 3, 1, 64, "spans that a query reads"),
        param(&M::window, "window", 15, 1, 1 << 14, "w: the latest (w + 1)² − 1 keys are read with every span"),
        param(&M::back, "back", 2, 0, 1e6, "keys of a span before its anchor, times √(i + 1)"),
        param(&M::ahead, "ahead", 0, 0, 1e6, "keys of a span behind its anchor, times √(i + 1)"),
    };
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = n.same_entries = true;
    n.inputs = {"search_q [h, n, d]: the queries that search, as they meet the keys"};
    return n;
  }

  /// The latest keys, which no span holds.
  int64_t near() const { return int64_t(window + 1) * (window + 1) - 1; }
  /// How far anchor i lies before its query.
  static Num behind(const Num& i) { return i * i - 1; }

  Plan plan(LayerView& at) const override {
    causal_only(at, "superlinear");
    return replaced(at, heads, 1, 1);
  }

  Tensor edit(LayerView& at) const override {
    Queue& queue = at.queue;
    const int64_t n = at.rows[0], m = at.key_rows[0], rows = at.out.size[0], d_v = at.out.size[1];
    Mods mods = at.mods;
    mods.gain = {};
    int64_t anchors = 1;  // i = w + 1 … w + anchors of the last query, or one that lies before the text
    while ((window + 1 + anchors) * (window + 1 + anchors) <= m) ++anchors;
    // The farthest first: of ties the farther wins.
    const Tensor scores = searched(at, anchors);
    const Ragged each{scores.reshape({rows * anchors}), offsets_of(queue, rows, anchors), {}, 1, rows * anchors};
    Select best;
    best.k = spans;
    const Lists found = chosen(queue, each, best, spans);
    const auto there = [&](const Num& row, const Num& span) { return span < load(found.count, row); };
    // A span that is missing weighs nothing, unless all are: then each is the window.
    Ragged gates = numbers(queue, rows, spans, 1, rows * spans);
    compute(queue, gates,
            pick(there(segment(), place()), load(scores, segment() * anchors + load(found.index, index())), -1e9),
            gates.values);
    gates = softmax(queue, gates);
    const Tensor sum = compute(queue, Dtype::F32, {rows, d_v}, 0), part = queue.scratch.take(Dtype::F32, {rows, d_v});
    const Num query = m - n + mod(index(), n), reach = sqrt(query + 1);
    for (int span = 0; span < spans; ++span) {
      const Scratch scratch(queue.scratch);
      const Num anchor = query - behind(window + anchors - load(found.index, index() * spans + span));
      const Num end = min(anchor - floor(reach * -ahead), query - near()) + 1;
      const Plan reads = ranges_plan(queue, Plan::Scope::QueryHead, 1, rows,
                                     {max(0, anchor + floor(reach * -back)), pick(there(index(), span), end, 0)},
                                     {max(0, query + 1 - near()), query + 1});
      at.run().attend(queue, at.q, at.k, at.v, reads, mods, part, {});
      const Num gate = load(gates.values, floor_div(index(), d_v) * spans + span);
      compute(queue, load(sum, index()) + gate * load(part, index()), sum);
    }
    const Tensor out = queue.scratch.take(Dtype::F32, {rows, d_v});
    compute(queue, at.q, pick(among(at, heads, segment()), load(sum, index()), load(at.out, index())), out);
    return out;
  }

  /// search_q · k of every query's anchors, [rows, anchors]; −∞ where the text has none.
  Tensor searched(LayerView& at, int64_t anchors) const {
    Queue& queue = at.queue;
    const int64_t h = at.q.heads, n = at.rows[0], m = at.key_rows[0], d = at.model.d;
    const Ragged search = heads_of(queue, given(at, "search_q", "[h, n, d]", {h, n, d}), h, n);
    const Tensor scores = queue.scratch.take(Dtype::F32, {h * n, anchors});
    for (int64_t column = 0; column < anchors; ++column) {
      const Scratch scratch(queue.scratch);
      const Num anchor = m - n + place() - behind(window + anchors - column);
      const Ragged keys = picked_rows(queue, at.k,
                                      begin_of(at.k, floor_div(segment(), h / at.k.heads)) + max(0, anchor), search);
      const Ragged score = row_dots(queue, search, keys);
      compute(queue, search, pick(anchor >= 0, load(score.values, index()), -kInfinity), scores.select(1, column));
    }
    return scores;
  }
};

}  // namespace

Entry superlinear() {
  Entry e = entry<Superlinear>("superlinear", "Superlinear Multi-Step Attention", "2026, arXiv 2601.18401", 2026,
                               Role::Plan | Role::Edit);
  e.equation =
      "anchors a = i − (r² − 1), r > w; of the k best by u = q′·k_a: o = Σ softmax(u) attention over [a − ⌈B √(i + "
      "1)⌉, a] ∪ the last (w + 1)² − 1 keys";
  e.needs = "trained queries that search: --input search_q=…";
  e.no_identity = "the search is an input; with a window of all keys it is dense";
  e.verified = {"formula", "bench"};
  return e;
}

}  // namespace heed::mechanisms
