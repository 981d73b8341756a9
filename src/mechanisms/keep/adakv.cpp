#include "mechanisms/keep/adakv.h"

#include <limits>

#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

Tensor floored(const Allocation& a, const Tensor& even, double alpha) {
  std::vector<Ragged> raised;
  for (size_t l = 0; l < a.scores.size(); ++l) {
    const Ragged& scores = a.scores[l];
    Select own;
    own.count = compute(a.queue, Dtype::I32, {scores.segments()},
                        max(1, floor(alpha * load(even.select(0, int64_t(l)), index()))));
    const Lists sure = chosen(a.queue, scores, own, std::max<int64_t>(1, scores.bound));
    Ragged copied = scores;
    copied.values = a.queue.scratch.take(Dtype::F32, {scores.values.size[0]});
    compute(a.queue, scores, pick(sure.has(segment(), place()), kInfinity, load(scores.values, index())), copied.values);
    raised.push_back(copied);
  }
  return divide(a, raised, even, Pool::Layer);
}

namespace {

// Ada-KV (Feng et al., 2024): the KV heads of a layer share one pool of entries, and the best scores of the pool win.
// Forced entries stay outside the pool. A head is safe from starving by the authors' mix with an even share, or by the
// library's floor (kvpress): its own best entries count as forced, inside its share.
struct AdaKV final : KeepWrapper {
  double alpha;
  bool port;

  static std::vector<ParamInfo> params() {
    using M = AdaKV;
    return {
        param(&M::alpha, "alpha", 0.2, 0, 1, "share of a head's budget that it gets in any case; 1: no division"),
        param(&M::port, "port", false, "the library's floor in place of the authors' mix"),
    };
  }

  Tensor allocate(const Allocation& a) const override {
    const Tensor even = inner->allocate(a);
    return port ? floored(a, even, alpha) : mixed(a, even);
  }

  // B_i = round((1 − α) c_i + ⌊α B⌋), c_i what falls to head i of the layer's best.
  Tensor mixed(const Allocation& a, const Tensor& even) const {
    const Tensor won = divide(a, a.scores, even, Pool::Layer);
    const Tensor counts = a.queue.scratch.take(Dtype::I32, {won.size[0], won.size[1]});
    for (int64_t l = 0; l < counts.size[0]; ++l) {
      const Ragged& scores = a.scores[size_t(l)];
      const Num granted = load(even.select(0, l), index()), forced = min(load(certain(a, scores), index()), granted);
      const Num share = max(0, load(won.select(0, l), index()) - forced), budget = granted - forced;
      const Num mix = forced + round((1 - alpha) * share + floor(alpha * budget));
      // Room for all: nothing to divide.
      compute(a.queue, pick(granted >= length_of(scores, index()), load(won.select(0, l), index()), mix),
              counts.select(0, l));
    }
    return counts;
  }

  /// Entries with score +∞ in every segment: I32 [segments].
  static Tensor certain(const Allocation& a, const Ragged& scores) {
    Select forced;
    forced.by = Select::By::Threshold;
    forced.p = std::numeric_limits<float>::infinity();
    return chosen(a.queue, scores, forced, most(a, scores)).count;
  }

  /// No segment has more entries.
  static int64_t most(const Allocation&, const Ragged& scores) { return std::max<int64_t>(1, scores.bound); }
};

}  // namespace

Entry adakv() {
  Entry e = entry<AdaKV>("adakv", "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation",
                         "Feng et al., 2024, arXiv 2407.11550", 2024, uint8_t(Role::Keep));
  e.equation = "B_i = round((1 − α) c_i + ⌊α B⌋), c_i = how many of the layer's g·B best scores lie in head i";
  e.needs = "a keep policy inside";
  e.identity = "adakv(snapkv(budget=1.0))";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
