#include "base/random.h"

#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Random (kvpress): a uniform score for each head and entry, drawn anew at every cut: the control that a policy must beat.
struct RandomKeep final : KeepPolicy {
  int64_t seed;
  int sinks;

  static std::vector<ParamInfo> params() {
    using M = RandomKeep;
    return keep_params<M>(
        "1024", "prompt",
        {
            param(&M::seed, "seed", 0, 0, 1000000000, "of the draws; layers and steps draw on their own"),
            param(&M::sinks, "sinks", 0, 0, 1 << 20, "first entries that always stay"),
        });
  }
  std::string check() const override { return too_small(budget, sinks, "sinks"); }

  Ragged score(LayerView& at) const override {
    const Ragged scores = at.per_entry();
    Random random(mixed({uint64_t(seed), uint64_t(at.layer), uint64_t(at.step())}));
    Buffer drawn(Dtype::F32, {scores.bound});
    for (float& x : drawn->span<float>()) x = float(random.uniform());
    at.queue.upload(drawn, scores.values);
    return force(at.queue, scores, sinks, 0);
  }
};

}  // namespace

Entry random() {
  Entry e = entry<RandomKeep>("random", "Random eviction", "kvpress, a baseline", 2024, uint8_t(Role::Keep));
  e.equation = "keep the top B of uniform draws";
  e.needs = "nothing";
  e.identity = "random(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
