#include <cmath>

#include "attention/maps.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// ACT (Yu et al., 2024): keys that draw more than `threshold` of the attention on average, save the first of them, are
// sinks that carry nothing: their weights shrink to `beta`, and what is freed goes to the row's other keys in proportion.
// In a prompt only, as released. The two sets of keys are two parts of one attention, and both steps together are a
// merge with edited log weights: log(beta · M) for the sinks of a row that pays them M, log(1 − beta · M) for the rest.
struct Act final : Mechanism {
  double threshold, beta;
  int skip_first, skip_last;

  static std::vector<ParamInfo> params() {
    using M = Act;
    return {
        param(&M::threshold, "threshold", 0.1, 0, 1e6,
              "mean attention above which a key is a sink (the released scripts: 0.1 and 0.15)"),
        param(&M::beta, "beta", 0.4, 0, 1, "what is left of a sink's weight; 1: nothing changes"),
        param(&M::skip_first, "skip_first", 2, 0, 1 << 20,
              "first layers left alone (in a model with more layers than are left alone)"),
        param(&M::skip_last, "skip_last", 1, 0, 1 << 20, "last layers left alone"),
    };
  }

  Tensor edit(LayerView& at) const override {
    const int layers = at.model.layers;
    const bool outside = layers > skip_first + skip_last && (at.layer < skip_first || at.layer >= layers - skip_last);
    if (at.decoding() || at.phase == Phase::Replay || outside || beta >= 1) return at.out;
    const Sinks sinks = find_sinks(at);
    const Plan parts = two_parts(at, sinks);
    const int64_t rows = at.out.size[0], width = at.out.size[1];
    const Tensor outs = at.queue.scratch.take(Dtype::F32, {2, rows, width}),
                 lse = at.queue.scratch.take(Dtype::F32, {2, rows});
    // Heads without sinks keep what they have: no work for their rows.
    const Num calibrated = load(sinks.others, segment()) > 0;
    Mods mods = at.mods;
    mods.gain = at.queue.scratch.take(Dtype::F32, {rows});
    compute(at.queue, at.q, pick(calibrated, at.mods.gain ? load(at.mods.gain, index()) : Num(1), 0), mods.gain);
    at.run().attend(at.queue, at.q, at.k, at.v, parts, mods, outs, lse);
    const Num rest = load(lse.select(0, 0), index()), sink = load(lse.select(0, 1), index());
    const Tensor mass = at.queue.scratch.take(Dtype::F64, {rows});
    compute(at.queue, at.q, 1 / (1 + exp(rest - sink)), mass);
    const Num both = rest > -kInfinity && sink > -kInfinity;  // one part alone keeps all the weight
    const Tensor weights = at.queue.scratch.take(Dtype::F32, {2, rows});
    compute(at.queue, at.q, pick(both, log1p(-beta * load(mass, index())), rest), weights.select(0, 0));
    compute(at.queue, at.q, pick(both, log(beta * load(mass, index())), sink), weights.select(0, 1));
    const Tensor merged = at.queue.scratch.take(Dtype::F32, {rows, width}),
                 out = at.queue.scratch.take(Dtype::F32, {rows, width});
    at.run().merge(at.queue, outs, weights, merged, {});
    compute(at.queue, at.q, pick(calibrated, load(merged, index()), load(at.out, index())), out);
    return out;
  }

 private:
  /// Keys of each query head that draw more than the threshold, ascending; the first is the text's own sink and stays.
  struct Sinks {
    Tensor index, others;  // I32 [segments · capacity]; I32 [segments]: how many follow the first
    int64_t capacity;
  };

  Sinks find_sinks(LayerView& at) const {
    Observe how;
    how.rows = Observe::Rows::Seen, how.heads = Observe::Heads::Each;
    const Ragged means = by_query_head(at.queue, at.observe(at.q, how, &at.plan), at.model.group());
    const int64_t all = at.q.segments(), h = at.q.heads, capacity = std::max<int64_t>(1, longest_keys(at));
    const Tensor which = at.queue.scratch.take(Dtype::I32, {all * capacity}),
                 count = at.queue.scratch.take(Dtype::I32, {all});
    Select above;
    above.by = Select::By::Threshold, above.p = std::nextafter(float(threshold), INFINITY);
    at.run().select(at.queue, means, above, capacity, which, count);
    const Num others = among(at, heads, mod(index(), h)) * max(0, load(count, index()) - 1);
    return {which, compute(at.queue, Dtype::I32, {all}, others), capacity};
  }

  /// Part 0: all keys but a head's sinks; part 1: its sinks. A row lists gap, sink, gap, sink, … gap; gaps may be empty.
  Plan two_parts(LayerView& at, const Sinks& sinks) const {
    const int64_t tile = longest_queries(at), rows = plan_rows(at, int(tile)), wide = 2 * sinks.capacity + 1;
    Plan plan;
    plan.form = Plan::Form::Interval, plan.parts = 2, plan.q_tile = int(tile), plan.causal = at.plan.causal;
    plan.nnz_bound = rows * wide;
    plan.rowptr = compute(at.queue, Dtype::I64, {rows + 1}, index() * wide);
    const Tensor of = compute(at.queue, Dtype::I32, {rows}, query_segment(at, index()));
    plan.count = compute(at.queue, Dtype::I32, {rows}, 2 * load(sinks.others, load(of, index())) + 1);
    plan.index = at.queue.scratch.take(Dtype::I32, {plan.nnz_bound, 2}),
    plan.part = at.queue.scratch.take(Dtype::I32, {plan.nnz_bound});
    Ragged listed;
    listed.offsets = plan.rowptr, listed.bound = plan.nnz_bound;
    listed.ends = compute(at.queue, Dtype::I64, {rows}, index() * wide + load(plan.count, index()));
    const Num s = load(of, segment()), odd = mod(place(), 2);
    auto sink = [&](const Num& i) { return load(sinks.index, s * sinks.capacity + i); };
    const Num here = floor_div(place() + 1, 2);
    compute(at.queue, listed, pick(place() == 0, 0, sink(here) + 1 - odd), plan.index.select(1, 0));
    const Num gap_end = pick(place() == length() - 1, length_of(at.k, floor_div(s, at.model.group())), sink(here + 1));
    compute(at.queue, listed, pick(odd, sink(here) + 1, gap_end), plan.index.select(1, 1));
    compute(at.queue, listed, odd, plan.part);
    return plan;
  }
};

}  // namespace

Entry act() {
  Entry e = entry<Act>("act",
                       "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without "
                       "Training through Attention Calibration",
                       "Yu et al., 2024, arXiv 2406.15765", 2024, uint8_t(Role::Edit));
  e.equation = "A_ij ← β A_ij for j in S = {c_j > thr} minus its first; the rest takes what is freed in proportion";
  e.needs = "column means of the prompt; a second, two-part attention; choose heads with heads= and layers=";
  e.identity = "act(beta=1)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
