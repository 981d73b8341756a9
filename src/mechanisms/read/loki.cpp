#include <algorithm>
#include <map>

#include "attention/maps.h"
#include "attention/reads.h"
#include "attention/rotation.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Loki (Singhania et al., 2024): keys lie near a few of their main directions, and logits along those say which
// entries a query head reads. Directions are those of the prompt's own keys rather than of a calibration text.
// Nothing is forced, and projected queries meet whole keys: what the first coordinates of projected keys would give.
struct Loki final : Mechanism {
  Budget budget;
  double rank;
  Choice keys;
  bool centre;
  int rounds, first_dense;

  static std::vector<ParamInfo> params() {
    using M = Loki;
    return {
        budget_param(&M::budget, "0.25", "entries read by each query head; a fraction is of the prompt"),
        param(&M::rank, "rank", 0.25, 0, 1, "share of the head dim that is looked at, one direction at least"),
        param(&M::keys, "keys", {"rotated", "plain"}, 0,
              "whose main directions: keys as attention reads them, or before rotation"),
        param(&M::centre, "centre", true,
              "of keys less their mean, as released; false: of keys as they are, by which small models find first "
              "tokens"),
        param(&M::rounds, "rounds", 20, 0, 1000, "of orthogonal iteration"),
        dense_layers_param(&M::first_dense, 0),
    };
  }

  /// For each layer, the projection on the main directions of each KV head, [segments, d, d]. Forks share it.
  struct Projections final : State {
    std::map<int, std::shared_ptr<const Buffer>> of;
    std::unique_ptr<State> clone() const override { return std::make_unique<Projections>(*this); }
  };
  std::unique_ptr<State> open(const ModelInfo&) const override { return std::make_unique<Projections>(); }

  void observe(LayerView& at) const override {
    if (at.decoding() || at.phase == Phase::Replay || reads_all(at, first_dense)) return;
    Queue& queue = at.queue;
    const int64_t d = at.store->shape().d, all = at.store->segments();
    const Ragged rows = keys.value ? plain_keys(at) : stored_keys(at);
    const Tensor found = main_directions(queue, centre ? centred(queue, rows) : rows,
                                         std::max<int64_t>(1, int64_t(rank * double(d))), rounds);
    auto& held = static_cast<Projections&>(at.state()).of[at.layer];
    const auto now = std::make_shared<Buffer>(Dtype::F32, std::initializer_list<int64_t>{all, d, d}, *queue.memory);
    const Num fed = length_of(at.q, floor_div(index(), d * d) * at.model.group()) > 0;
    compute(queue, pick(fed, load(found, index()), held ? load(*held, index()) : Num(0)),
            now->view().reshape({all * d * d}));
    held = now;
  }

  Read read(LayerView& at) const override {
    const auto& held = static_cast<Projections&>(*at.state_held()).of;
    const auto of = held.find(at.layer);
    if (reads_all(at, first_dense) || of == held.end()) return {};
    Queue& queue = at.queue;
    const int64_t d = at.q.values.size[1], square = d * d, group = at.model.group();
    const Tensor each = compute(
        queue, Dtype::F32, {at.q.segments() * d, d},
        load(*of->second, floor_div(floor_div(index(), square), group) * square + mod(index(), square)));
    std::vector<int64_t> counts;
    for (int64_t length : at.prompt) counts.push_back(budget.entries(length));
    const Ragged seen = transformed(queue, at.q, each.reshape({at.q.segments(), d, d}));
    return best_entries(at, Plan::Scope::QueryHead, last_logits(at, seen), counts);
  }
};

}  // namespace

Entry loki() {
  Entry e = entry<Loki>("loki", "Loki: Low-Rank Keys for Efficient Sparse Attention",
                        "Singhania et al., 2024, arXiv 2406.02542", 2024, uint8_t(Role::Read));
  e.equation = "W the r main directions of a KV head's keys; read the top B of W^T q · W^T k_j";
  e.needs = "the keys of the prompt, and d² numbers for each KV head";
  e.identity = "loki(budget=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
