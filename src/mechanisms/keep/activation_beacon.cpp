#include "attention/plans.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Activation Beacon (Zhang et al., 2024): behind every `ratio` tokens of the text stands a beacon, and behind every window of
// the text all its entries go but those of its beacons. A token sees what is left of earlier windows and everything of its own
// up to itself, beacons included. A beacon's rows of q, k and v come from matrices of its own: whoever has them gives rows made
// so (`heed apply`); a session makes all rows alike, so it serves a model whose beacons need none, and the text must bring
// the beacons. Entries keep their true positions; the released code lets positions begin anew in every window.
struct ActivationBeacon final : KeepPolicy {
  int window, ratio;

  static std::vector<ParamInfo> params() {
    using M = ActivationBeacon;
    return {
        param(&M::window, "window", 1024, 1, 1 << 30, "tokens of a window, beacons not counted"),
        param(&M::ratio, "ratio", 8, 1, 1 << 30, "tokens for which a beacon stands, a divisor of the window"),
        param(&M::when, "when", "when", "every(1)", "prompt, chunk, every(n)", "when windows that have ended go"),
    };
  }
  std::string check() const override {
    return window % ratio ? "ratio=" + std::to_string(ratio) + " does not divide window=" + std::to_string(window) : "";
  }

  double whole() const { return double(window) + window / ratio; }  // with its beacons
  Num is_beacon(const Num& position) const { return mod(mod(position, whole()), ratio + 1.0) == ratio; }

  Plan plan(LayerView& at) const override {
    const Num j = load(at.k_pos, index());
    see_until(at, heads, pick(is_beacon(j), kAlways, (floor_div(j, whole()) + 1) * whole() - 1));
    Plan dense;
    dense.causal = at.plan.causal;
    return dense;
  }

  bool unbounded() const override { return true; }
  Ragged score(LayerView& at) const override {
    const Ragged positions = stored_positions(at), out = at.per_entry();
    const Num j = load(positions.values, index()), next = load(positions.values, end_of(positions, segment()) - 1) + 1;
    compute(at.queue, out, is_beacon(j) || floor_div(j, whole()) >= floor_div(next, whole()), out.values);
    return out;
  }
  Tensor allocate(const Allocation& a) const override { return passing(a, 0.5f); }
};

}  // namespace

Entry activation_beacon() {
  Entry e = entry<ActivationBeacon>("activation-beacon", "Long Context Compression with Activation Beacon",
                                    "Zhang et al., 2024, arXiv 2401.03462", 2024, Role::Plan | Role::Keep);
  e.equation =
      "windows of w + w / a positions, every (a + 1)-th a beacon: i sees j ≤ i of its window and earlier beacons; "
      "of a window that has ended beacons stay";
  e.needs = "rows of q, k and v at beacons from a trained model's own matrices";
  e.identity = "activation-beacon(window=1000000000,ratio=1)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
