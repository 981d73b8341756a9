#include "attention/inputs.h"
#include "attention/maps.h"
#include "attention/patterns.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Re-ttention (Chen et al., 2025) for denoisers: a sparse step borrows from the last dense one what share of its weight a
// query had on the keys that it still sees, and what it lost by not seeing the rest. Shares grow by `drift` with every sparse
// step, as released. The residual is taken before the output matrix, which as a linear map changes nothing.
struct Rettention final : Mechanism {
  int64_t window, text, step, warmup, period;
  double drift;

  static std::vector<ParamInfo> params() {
    using M = Rettention;
    return {
        param<M, int64_t>(&M::window, "window", 256, 0, 1000000000, "keys on either side that a query sees"),
        param<M, int64_t>(&M::text, "text", 0, 0, 1 << 30, "first tokens, which see all and are seen by all"),
        param<M, int64_t>(&M::step, "step", 16, 1, 1 << 30, "denoising step, counted from 1"),
        param<M, int64_t>(&M::warmup, "warmup", 15, 1, 1 << 30, "first steps, which are dense"),
        param<M, int64_t>(&M::period, "period", 5, 1, 1 << 30, "of the steps behind them every so many are dense"),
        param(&M::drift, "drift", 0.04, 0, 1, "what a share grows by after a sparse step"),
    };
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.inputs = {"dense_q [h, n, d]: queries of the last dense step", "dense_k [g, m, d]: its keys",
                "dense_v [g, m, d_v]: its values"};
    return n;
  }
  /// Sparse steps since the last dense one, this one included; 0: it is dense.
  int64_t age() const { return step <= warmup ? 0 : (step - warmup) % period; }

  Plan plan(LayerView& at) const override {
    Plan dense;
    dense.causal = at.plan.causal;
    if (age() == 0) return dense;
    return pattern_plan(at, [this](int64_t i, int64_t m, const AddKeys& add) {
      add(0, i < text ? m : text);
      add(i - window, i + window + 1);
    });
  }

  Tensor edit(LayerView& at) const override {
    if (age() == 0) return at.out;
    const int64_t rows = at.out.size[0], width = at.out.size[1];
    Ragged q = at.q, k = at.k, v = at.v;
    q.values = given(at, "dense_q", "[h, n, d]", {rows, q.values.size[1]});
    k.values = given(at, "dense_k", "[g, m, d]", {k.values.size[0], k.values.size[1]});
    v.values = given(at, "dense_v", "[g, m, d_v]", {v.values.size[0], width});
    Plan dense;
    dense.causal = at.plan.causal;
    const auto take = [&] { return at.queue.scratch.take(Dtype::F32, {rows, width}); };
    const auto sums = [&] { return at.queue.scratch.take(Dtype::F32, {rows}); };
    const Tensor all = take(), seen = take(), out = take(), all_lse = sums(), seen_lse = sums();
    at.run().attend(at.queue, q, k, v, dense, at.mods, all, all_lse);
    at.run().attend(at.queue, q, k, v, at.plan, at.mods, seen, seen_lse);
    const Num row = floor_div(index(), width), share = exp(load(seen_lse, row) - load(all_lse, row));
    const Num residual = load(all, index()) - share * load(seen, index()), now = load(at.out, index());
    compute(at.queue, at.q,
            pick(among(at, heads, segment()), (share + drift * double(age() - 1)) * now + residual, now), out);
    return out;
  }
};

}  // namespace

Entry rettention() {
  Entry e = entry<Rettention>("rettention",
                              "Re-ttention: Ultra Sparse Visual Generation via Attention Statistical Reshape",
                              "Chen et al., 2025, arXiv 2505.22918", 2025, Role::Plan | Role::Edit);
  e.equation =
      "o = (ρ + 0.04 t) softmax over M of (q·k s) v + R; ρ and R those of the last dense step: its mass on M, and o "
      "− ρ o_M";
  e.needs = "the last dense step: --input dense_q=…, --input dense_k=…, --input dense_v=…";
  e.no_identity = "it takes another step's statistics; with the step's own, and no drift, it is dense";
  e.verified = {"formula", "bench"};
  return e;
}

}  // namespace heed::mechanisms
