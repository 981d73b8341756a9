#include "attention/scores.h"
#include "mechanisms/drive/kvzip.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// KVgrad (2026): KVzip, with what a row pays weighed by how much the end of the model feels it. The measured number is the
// sum of ‖h‖² over the rows behind the last layer, before their norm; G_p is its gradient with respect to what the output
// matrix makes of row p. A row's G is the same for all heads of its layer, so it joins the softmax as a part of its lse.
// What an entry adds to a row is W_O v, whose length hangs on the query head: one number for each, joined when all
// repetitions have been read.
struct KVgrad final : KVzip {
  static std::vector<ParamInfo> params() { return KVzip::params(512); }

  Needs needs(const ModelInfo& m) const override {
    Needs n = KVzip::needs(m);
    n.columns = {{.name = "kvgrad.most", .width = m.group()}};
    return n;
  }

  void repeat(Run& run, int sequence, const std::vector<int32_t>& request) const override {
    run.replay_backward(sequence, request,
                        [](Queue& queue, Tensor x, Tensor d_x) { compute(queue, 2 * load(x, index()), d_x); });
  }
  void observe(LayerView&) const override {}

  void gradient(LayerView& at) const override {
    if (at.model.window(at.layer) > 0) return;
    Queue& queue = at.queue;
    const Plan plan = seen(at);
    RowStats row;
    row.lse = queue.scratch.take(Dtype::F32, {at.q.values.size[0]});
    at.run().observe_rows(queue, at.q, at.keys(), &plan, at.mods, row);
    const Tensor lengths = row_norms(queue, one_segment(queue, at.gradients->output)).values;
    const Num token = load(at.first, floor_div(segment(), at.q.heads)) + place();
    compute(queue, at.q, load(row.lse, index()) - log(load(lengths, token)), row.lse);
    Observe how;
    how.rows = Observe::Rows::Max, how.heads = Observe::Heads::Each, how.lse = row.lse;
    at.set_column("kvgrad.most", combine(queue, at.column("kvgrad.most"), at.observe(at.q, how, &plan), Combine::Add));
  }

  Ragged score(LayerView& at) const override {
    if (at.model.window(at.layer) > 0) return newest_seen(at);
    const int64_t group = at.model.group();
    const Ragged paid = at.column("kvgrad.most"), length = output_lengths(at), most = at.per_entry();
    compute(at.queue, most, 0, most.values);
    for (int64_t member = 0; member < group; ++member) {
      const Num one = index() * group + member;
      compute(at.queue, most, max(load(most.values, index()), load(paid.values, one) * load(length.values, one)), most.values);
    }
    return force(at.queue, most, sinks, 0);
  }
};

}  // namespace

Entry kvgrad() {
  Entry e = entry<KVgrad>("kvgrad", "KVgrad", "2026, openreview cg1wTCJjjk", 2026, Role::Keep | Role::Drive);
  e.equation =
      "s_j = max over rows p of the repeated chunk and the group of P_pj ‖W_O v_j‖₂ ‖∂Φ/∂o_p‖₂, "
      "Φ = Σ ‖h‖² over rows behind the last layer, o = W_O · attention; "
      "keep the best of all layers and heads";
  e.needs = "the prompt fed again, part by part, and backward: about six times its cost";
  e.identity = "kvgrad(budget=1.0)";
  e.verified = {"identity", "formula", "model"};
  return e;
}

}  // namespace heed::mechanisms
