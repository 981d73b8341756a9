#include <cmath>

#include "attention/select.h"
#include "base/threads.h"
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
        param(&M::threshold, "threshold", 0.1, 0, 1e6, "mean attention above which a key is a sink (the released scripts: 0.1 and 0.15)"),
        param(&M::beta, "beta", 0.4, 0, 1, "what is left of a sink's weight; 1: nothing changes"),
        param(&M::skip_first, "skip_first", 2, 0, 1 << 20, "first layers left alone (in a model with more layers than are left alone)"),
        param(&M::skip_last, "skip_last", 1, 0, 1 << 20, "last layers left alone"),
    };
  }

  Tensor edit(LayerView& at) const override {
    const int layers = at.model.layers;
    const bool outside = layers > skip_first + skip_last && (at.layer < skip_first || at.layer >= layers - skip_last);
    if (at.decoding() || at.phase == Phase::Replay || outside || beta >= 1) return at.out;
    const Plan parts = two_parts(at);
    if (parts.nnz_bound == 0) return at.out;
    const int64_t rows = at.out.size[0], width = at.out.size[1];
    const Tensor outs = at.queue.scratch.take(Dtype::F32, {2, rows, width}), lse = at.queue.scratch.take(Dtype::F32, {2, rows});
    at.run().attend(at.queue, at.q, at.k, at.v, parts, at.mods, outs, lse);
    float* rest = lse.as<float>();
    float* sinks = rest + rows;
    parallel_for(at.q.segments(), [&](int64_t s) {
      for (int64_t i = at.q.begin(s); i < at.q.end(s); ++i) {
        if (sinks[i] == -INFINITY || rest[i] == -INFINITY) continue;  // one part alone keeps all the weight
        const double mass = 1 / (1 + std::exp(double(rest[i]) - double(sinks[i])));
        sinks[i] = float(std::log(beta * mass));
        rest[i] = float(std::log1p(-beta * mass));
      }
    });
    const Tensor out = at.queue.scratch.take(Dtype::F32, {rows, width});
    at.run().merge(at.queue, outs, lse, out, {});
    return out;
  }

 private:
  /// Part 0: all keys but a head's sinks; part 1: its sinks. No rows' entries at all when no head has any.
  Plan two_parts(LayerView& at) const {
    const int64_t group = at.model.group();
    Observe how;
    how.rows = Observe::Rows::Seen, how.heads = Observe::Heads::Each;
    const Ragged means = at.observe(at.q, how, &at.plan);
    std::vector<int64_t> lengths;
    for (int64_t s = 0; s < at.q.segments(); ++s) lengths.push_back(means.length(s / group));
    const Ragged columns = numbers(at.queue, lengths, at.q.heads);
    for (int64_t s = 0; s < at.q.segments(); ++s)
      copy(means.values.reshape({means.bound, group}).slice(0, means.begin(s / group), means.end(s / group)).select(1, s % group), columns.segment(s));
    const int64_t all = at.q.segments(), capacity = std::max<int64_t>(1, longest_keys(at));
    const Tensor index = at.queue.scratch.take(Dtype::I32, {all * capacity}), count = at.queue.scratch.take(Dtype::I32, {all});
    Select above;
    above.by = Select::By::Threshold, above.p = std::nextafter(float(threshold), INFINITY);
    at.run().select(at.queue, columns, above, capacity, index, count);

    Plan plan;
    plan.form = Plan::Form::Interval, plan.parts = 2, plan.q_tile = 1;
    for (int64_t s = 0; s < all; ++s) plan.q_tile = std::max(plan.q_tile, int(at.q.length(s)));
    std::vector<int64_t> rows{0};
    std::vector<int32_t> ranges, part;
    bool any = false;
    for (int64_t s = 0; s < all; ++s) {
      if (at.q.length(s) == 0) continue;
      auto add = [&](int64_t begin, int64_t end, int which) {
        if (begin >= end) return;
        ranges.push_back(int32_t(begin)), ranges.push_back(int32_t(end)), part.push_back(which);
      };
      int64_t from = 0;
      const bool chosen = heads.holds(int(s % at.q.heads), int(at.q.heads));
      for (int64_t i = 1; chosen && i < count.at<int32_t>(s); ++i) {  // the first is the text's own sink and stays
        const int64_t sink = index.at<int32_t>(s * capacity + i);
        add(from, sink, 0), add(sink, sink + 1, 1);
        from = sink + 1, any = true;
      }
      add(from, at.k.length(s / group), 0);
      rows.push_back(int64_t(part.size()));
    }
    if (!any) return plan;
    plan.nnz_bound = rows.back();
    plan.rowptr = at.queue.scratch.take(Dtype::I64, {int64_t(rows.size())});
    plan.index = at.queue.scratch.take(Dtype::I32, {plan.nnz_bound, 2});
    plan.part = at.queue.scratch.take(Dtype::I32, {plan.nnz_bound});
    std::copy(rows.begin(), rows.end(), plan.rowptr.as<int64_t>());
    std::copy(ranges.begin(), ranges.end(), plan.index.as<int32_t>());
    std::copy(part.begin(), part.end(), plan.part.as<int32_t>());
    plan.causal = at.plan.causal;
    return plan;
  }
};

}  // namespace

Entry act() {
  Entry e = entry<Act>("act", "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through Attention Calibration", "Yu et al., 2024, arXiv 2406.15765", 2024, uint8_t(Role::Edit));
  e.equation = "A_ij ← β A_ij for j in S = {c_j > thr} minus its first; the rest takes what is freed in proportion";
  e.needs = "column means of the prompt; a second, two-part attention; choose heads with heads= and layers=";
  e.identity = "act(beta=1)";
  e.verified = {"identity", "formula", "model"};
  return e;
}

}  // namespace heed::mechanisms
