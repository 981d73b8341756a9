#include <algorithm>
#include <map>

#include "attention/maps.h"
#include "attention/reads.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Double Sparsity (Yang et al., 2024): a few channels of each query head, those where |q_c k_c| of the same token is
// largest on average, approximate its logits; the query reads the entries they rank highest. Which channels is learnt
// from the prompt itself rather than from a calibration text, and labels are the channels as they are held, not 4-bit
// copies.
struct DoubleSparsity final : Mechanism {
  Budget budget;
  int factor, first_dense;

  static std::vector<ParamInfo> params() {
    using M = DoubleSparsity;
    return {
        budget_param(&M::budget, "0.0625", "entries read by each query head; a fraction is of the prompt"),
        param(&M::factor, "factor", 16, 1, 4096, "one of so many channels is looked at"),
        dense_layers_param(&M::first_dense, 2),
    };
  }

  /// For each layer, Σ |q_c k_c| over the prompt, [query heads of all sequences, d]. Forks share what they do not replace.
  struct Channels final : State {
    std::map<int, std::shared_ptr<const Buffer>> sums;
    std::unique_ptr<State> clone() const override { return std::make_unique<Channels>(*this); }
  };
  std::unique_ptr<State> open(const ModelInfo&) const override { return std::make_unique<Channels>(); }

  void observe(LayerView& at) const override {
    if (at.decoding() || at.phase == Phase::Replay) return;
    Queue& queue = at.queue;
    const int64_t d = at.q.values.size[1], group = at.model.group();
    Ragged products = at.q;
    products.values = queue.scratch.take(Dtype::F32, {at.q.values.size[0], d});
    const Num key = end_of(at.k, floor_div(segment(), group)) - length() + place();
    compute(queue, products, load(at.q.values, index()) * load(at.k.values, key * d + channel()), products.values);
    const Num x = load(products.values, index());
    compute(queue, products, abs(x), products.values);
    const Ragged mean = mean_rows(queue, products);
    auto& sums = static_cast<Channels&>(at.state()).sums[at.layer];
    auto now = std::make_shared<Buffer>(Dtype::F32, std::initializer_list<int64_t>{at.q.segments(), d}, *queue.memory);
    const Num more = load(mean.values, index()) * length_of(at.q, floor_div(index(), d));
    compute(queue, sums ? more + load(*sums, index()) : more, now->view().reshape({at.q.segments() * d}));
    sums = now;
  }

  Read read(LayerView& at) const override {
    const auto& sums = static_cast<Channels&>(*at.state_held()).sums;
    const auto of = sums.find(at.layer);
    if (reads_all(at, first_dense) || of == sums.end()) return {};
    Queue& queue = at.queue;
    const int64_t d = at.q.values.size[1], all = at.q.segments();
    Ragged importance = numbers(queue, all, d, at.q.heads, all * d);
    importance.values = (*of->second)->reshape({all * d});
    Select largest;
    largest.k = std::max<int64_t>(1, d / factor);
    const Lists labels = chosen(queue, importance, largest, largest.k);
    Ragged q = at.q;
    q.values = queue.scratch.take(Dtype::F32, {at.q.values.size[0], d});
    compute(queue, q, pick(labels.has(segment(), channel()), load(at.q.values, index()), 0), q.values);
    std::vector<int64_t> counts;
    for (int64_t length : at.prompt) counts.push_back(budget.entries(length));
    return best_entries(at, Plan::Scope::QueryHead, last_logits(at, q), counts);
  }
};

}  // namespace

Entry double_sparsity() {
  Entry e = entry<DoubleSparsity>("double-sparsity", "Post-Training Sparse Attention with Double Sparsity",
                                  "Yang et al., 2024, arXiv 2408.07092", 2024, uint8_t(Role::Read));
  e.equation = "C = top d / f of Σ_i |q_ic k_ic|; read the top B of Σ_{c ∈ C} q_c k_jc";
  e.needs = "the queries of the prompt";
  e.identity = "double-sparsity(budget=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
