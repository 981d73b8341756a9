#include <algorithm>

#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// DefensiveKV (Feng et al., 2025): an entry is worth the worst case of losing it, the most that any row of the window pays
// it in any head of its group, never less than the mean entry; times its share of what the output matrix carries. Entries
// that make up `mass` of the mean weights are sure to stay, and a layer's heads share one pool. Its form with one pool over
// all layers is left out. The mass that the window itself holds counts as held. The released code looks when it has cut
// the window off: it takes the mass of as many keys before it, in the mean over the layer's heads, and no more entries are
// sure than the budget's share of what is left grants beside another window.
struct DefensiveKV final : KeepPolicy {
  int window, kernel;
  double mass;
  bool as_released;

  static std::vector<ParamInfo> params() {
    using M = DefensiveKV;
    return keep_params<M>(
        "1024", "prompt",
        {
            param(&M::window, "window", 32, 1, 4096, "last queries, which vote and whose keys stay"),
            param(&M::kernel, "kernel", 5, 1, 63, "width of the smoothing over keys, odd"),
            param(&M::mass, "mass", 0.9, 0, 0.999, "share of the mean weights that is sure to stay; 0: none"),
            param(&M::as_released, "as_released", false,
                  "the released code's mass of the window and bound on what is sure"),
        });
  }
  std::string check() const override {
    if (when.decodes()) return "when=every(n): a decoded token has no window of queries; when=prompt or chunk";
    if (kernel % 2 == 0) return "kernel=" + std::to_string(kernel) + " is even: a smoothing width has a middle";
    return too_small(budget, window, "window");
  }

  Ragged score(LayerView& at) const override {
    Queue& queue = at.queue;
    const std::vector<int64_t> recent = affordable(at, budget, window);
    const Ragged paid = row_weights(at, window);

    // Each row smoothed before the window, and brought back to its own mass.
    const Ragged rows = without_last(queue, paid, recent);
    Ragged smoothed = rows;
    smoothed.values = queue.scratch.take(Dtype::F32, {rows.values.size[0]});
    queue.run->smooth(queue, rows, PoolKind::Mean, kernel, smoothed.values);
    const Ragged own = spread(queue, rows, {.of = Spread::Of::Sum}),
                 scaled = combine(queue, shares(queue, smoothed), own, Combine::Multiply);
    Ragged whole = paid;  // the window's part is 0 in smoothed, whatever lies in shares of it
    whole.values = compute(queue, Dtype::F32, {paid.values.size[0]}, 0);
    compute(queue, rows, load(scaled.values, index()), whole.values);

    const Ragged worst = over_runs(at, whole, Spread::Of::Max), mean = over_runs(at, paid, Spread::Of::Mean);
    const Ragged before = without_last(queue, worst, recent);
    const Ragged least = spread(queue, before, {.of = Spread::Of::Mean});
    const Ragged norms = output_norms(at),
                 carried = combine(queue, norms, spread(queue, norms, {.of = Spread::Of::Sum, .over = Spread::Over::Heads}),
                                   Combine::Divide);
    const Ragged scores = combine(queue, combine(queue, worst, least, Combine::Max), carried, Combine::Multiply);
    return force_last(queue, sure(at, mean, scores, recent), recent);
  }

  /// scores with +∞ for the entries before the window whose mean weights, the largest first, make up `mass` together with
  /// what the window holds; no more than the budget leaves beside the window.
  Ragged sure(const LayerView& at, const Ragged& mean, const Ragged& scores, std::span<const int64_t> recent) const {
    Queue& queue = at.queue;
    const int64_t all = mean.segments(), capacity = std::max<int64_t>(1, mean.bound);
    const Ragged before = without_last(queue, mean, recent), weights = shares(queue, before);
    Ragged held = before;  // the keys whose mean weights count as the window's
    const Num s = index(), w = of_sequence(queue, recent, s, mean.heads);
    const Num end = as_released ? end_of(before, s) : end_of(mean, s);
    held.ends = compute(queue, Dtype::I64, {all}, end);
    held.offsets = compute(queue, Dtype::I64, {all + 1},
                           pick(s < all, max(begin_of(mean, min(s, all - 1)), load(held.ends, s) - w), mean.bound));
    const Ragged window_mass = spread(queue, held, {.of = Spread::Of::Sum});
    Select top_p;
    top_p.by = Select::By::TopP, top_p.p = float(mass), top_p.crossing = false;
    // Σ chosen ≤ p − o of a total of 1 is Σ chosen + H ≤ p (1 + H) with H = o / (1 − p).
    Ragged o = numbers(queue, all, 1, mean.heads, all);
    compute(queue, pick(length_of(held, s) > 0, load(window_mass.values, begin_of(held, s)), 0), o.values);
    if (as_released) o = spread(queue, o, {.of = Spread::Of::Mean, .over = Spread::Over::Heads});
    top_p.held = compute(queue, Dtype::F32, {all}, load(o.values, s) / (1 - mass));
    const Lists entries = chosen(queue, weights, top_p, capacity);
    std::vector<int64_t> room;
    for (size_t i = 0; i < recent.size(); ++i) {
      const int64_t length = at.prompt[i], own = budget.entries(length), left = std::max<int64_t>(0, length - recent[i]);
      const int64_t granted = as_released ? left * std::min(own, length) / std::max<int64_t>(1, length) : own;
      room.push_back(std::max<int64_t>(0, granted - recent[i]));
    }
    Select best;
    best.count = compute(queue, Dtype::I32, {all}, min(load(entries.count, s), of_sequence(queue, room, s, mean.heads)));
    choose(queue, before, best, entries);
    compute(queue, scores, pick(entries.has(segment(), place()), kInfinity, load(scores.values, index())), scores.values);
    return scores;
  }

  Tensor allocate(const Allocation& a) const override {
    return divide(a, a.scores, KeepPolicy::allocate(a), Pool::Layer);
  }
};

}  // namespace

Entry defensivekv() {
  Entry e = entry<DefensiveKV>("defensivekv", "Taming the Fragility of KV Cache Eviction in LLM Inference",
                               "Feng et al., 2025, arXiv 2510.13334", 2025, uint8_t(Role::Keep));
  e.equation =
      "s_j = max(x_j, mean x) n_j / Σ over KV heads of n_j, x_j = max over rows and the group of smoothed P_ij, n_j "
      "= ‖W_O v_j‖₁; keep the best of the layer's pool";
  e.needs = "the output matrix";
  e.identity = "defensivekv(budget=1.0)";
  e.apply_inputs = {"output [hidden, h·d_v]: the output matrix"};
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
