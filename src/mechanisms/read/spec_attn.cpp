#include <algorithm>

#include "attention/inputs.h"
#include "attention/maps.h"
#include "attention/plans.h"
#include "attention/reads.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Two papers of one name, both of which let one pass of speculative decoding tell the other where to look. A pass that sees
// everything gives rows of attention, averaged over heads; the keys that hold a share `p` of a row's weight, of any row, are
// what the other pass reads, besides what comes later.
//   Self-drafting (2602.07223): the rows are those of the tokens just verified (parts of several tokens, prompts included), and
//   drafts, token by token, read what they chose. Tokens that a verification confirms are those of dense attention.
//   With a draft model (Shah et al., 2025): its rows, of the layer that goes with this one, are given; the drafted tokens are
//   verified over what they chose. The output is approximate. Which layers go together is found by whoever has both models.
// The speculation around it is no business of attention. Neither paper's code is out: union and threshold follow the texts.
struct SpecAttn final : Mechanism {
  double p;
  int rows, first_dense;

  static std::vector<ParamInfo> params() {
    using M = SpecAttn;
    return {
        param(&M::p, "p", 0.95, 0, 1, "share of a row's weight that is read; 1: everything"),
        param(&M::rows, "rows", 8, 1, 1024, "last tokens of a part whose rows choose"),
        dense_layers_param(&M::first_dense, 0),
    };
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.same_entries = true;  // rows are averaged over all heads
    n.columns = {{.name = "spec-attn.read", .fill = 1}};
    return n;
  }

  /// Keys that hold the share p of a row, in each segment.
  Lists chosen_of(Queue& queue, const Ragged& row, int64_t capacity) const {
    Select best;
    best.by = Select::By::TopP, best.p = float(p), best.at_least = 1;
    return chosen(queue, row, best, std::max<int64_t>(1, capacity));
  }

  Plan plan(LayerView& at) const override {
    Plan dense;
    dense.causal = at.plan.causal;
    if (!is_given(at, "draft") || p >= 1) return dense;
    Queue& queue = at.queue;
    const int64_t n = at.rows[0], m = at.key_rows[0];
    const Tensor draft = at.input("draft", "[rows, m]");
    require(
        draft.rank == 2 && draft.size[1] == m, "--input",
        "draft is " + draft.shape() + "; a number for each of " + std::to_string(m) + " keys is needed in every row");
    const int64_t count = draft.size[0];
    Ragged weights = heads_of(queue, draft, count, m);
    weights.values = given(at, "draft", "[rows, m]", {count * m});
    const Lists sets = chosen_of(queue, weights, m);
    const std::vector<int64_t> keys{m};
    const Ragged read = numbers(queue, keys, 1);
    compute(queue, read, place() >= m - n, read.values);  // what is verified
    for (int64_t row = 0; row < count; ++row)
      compute(queue, read, load(read.values, index()) || sets.has(row, place()), read.values);
    const Lists tokens = chosen(queue, read, flagged(), m);
    return tokens_plan(queue, Plan::Scope::Layer, int(n), tokens.index, tokens.count, m);
  }

  void observe(LayerView& at) const override {
    if (at.decoding() || at.phase == Phase::Replay || p >= 1 || reads_all(at, first_dense)) return;
    Queue& queue = at.queue;
    const int64_t h = at.q.heads, g = at.store->shape().kv_heads, count = std::min<int64_t>(rows, longest_queries(at));
    const Ragged old = at.column("spec-attn.read"), read = at.per_entry(), paid = row_weights(at, count);
    // Rows averaged over heads: `count` runs of numbers, as long as its entries, for each sequence.
    const Ragged mean = numbers(queue, at.sequences() * count, length_of(old, floor_div(index(), count) * g), count,
                                at.sequences() * count * at.store->longest());
    for (int64_t head = 0; head < h; ++head) {
      const Num run = (floor_div(segment(), count) * h + head) * count + mod(segment(), count),
                weight = load(paid.values, begin_of(paid, run) + place()) / double(h);
      compute(queue, mean, head ? load(mean.values, index()) + weight : weight, mean.values);
    }
    const Lists sets = chosen_of(queue, mean, at.store->longest());
    compute(queue, 0, read.values);
    for (int64_t r = 0; r < count; ++r) {
      const Num row = floor_div(segment(), g) * count + r;
      const Num taken = sets.has(row, place()) && load(mean.values, begin_of(mean, row) + place()) > 0;
      compute(queue, read, load(read.values, index()) || taken, read.values);
    }
    const Num fed = length_of(at.q, segment() * at.model.group()) > 0;
    compute(queue, read, pick(fed, load(read.values, index()), load(old.values, index())), read.values);
    at.set_column("spec-attn.read", read);
  }

  Read read(LayerView& at) const override {
    if (p >= 1 || reads_all(at, first_dense)) return {};
    const Ragged column = at.column("spec-attn.read");
    return named_entries(at, Plan::Scope::KvHead, column, load(column.values, index()) > 0.5);
  }
};

}  // namespace

Entry spec_attn() {
  Entry e = entry<SpecAttn>("spec-attn", "SpecAttn: Speculating Sparse Attention",
                            "Shah, 2025, arXiv 2510.27641; 2026, arXiv 2602.07223", 2025, Role::Plan | Role::Read);
  e.equation = "A_r = mean over heads of P of row r; read the union over rows of the fewest keys that hold p of A_r";
  e.needs = "attention weights of the last rows of each part; or a draft model's: --input draft=…";
  e.identity = "spec-attn(p=1)";
  e.apply_inputs = {"draft [rows, m]: weights that the draft model's last rows pay"};
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
