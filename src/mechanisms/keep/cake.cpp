#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// CAKE (Qin et al., 2025): layers whose attention spreads over many keys (entropy) and moves between queries (variance) get
// more of one budget; inside a layer a key is worth what it is paid on average and how much that varies. Layers are cut
// together behind the prompt (the authors' cascade, which cuts as it goes, comes to the same cache).
struct Cake final : KeepPolicy {
  int window, kernel;
  double gamma, entropy, variance;

  static std::vector<ParamInfo> params() {
    using M = Cake;
    return keep_params<M>(
        "1024", "prompt",
        {
            param(&M::window, "window", 32, 2, 4096, "last queries, which vote and whose keys stay"),
            param(&M::kernel, "kernel", 5, 1, 63, "width of the smoothing over keys, odd"),
            param(&M::gamma, "gamma", 200, 0, 1e6, "weight of the variance in an entry's score"),
            param(&M::entropy, "tau1", 1.6, 0.01, 1000, "a layer's entropy counts to the power 1 / tau1"),
            param(&M::variance, "tau2", 0.4, 0.01, 1000, "a layer's variance counts to the power 1 / tau2"),
        });
  }
  std::string check() const override {
    if (when.decodes()) return "when=every(n): a decoded token has no window of queries; when=prompt or chunk";
    if (kernel % 2 == 0) return "kernel=" + std::to_string(kernel) + " is even: a smoothing width has a middle";
    return too_small(budget, window, "window");
  }

  /// What each layer prefers, one number a sequence; written anew, never changed, so that forks may share it.
  struct Preferences final : State {
    std::vector<std::shared_ptr<const Buffer>> layers;  // F32 [sequences]
    std::unique_ptr<State> clone() const override { return std::make_unique<Preferences>(*this); }
  };
  std::unique_ptr<State> open(const ModelInfo& model) const override {
    auto state = std::make_unique<Preferences>();
    state->layers.resize(size_t(model.layers));
    return state;
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.all_layers = true;
    n.columns = {{.name = "cake", .fill = float(kInfinity)}};
    return n;
  }

  void observe(LayerView& at) const override {
    if (at.phase == Phase::Replay || at.decoding()) return;
    Queue& queue = at.queue;
    const Ragged paid = row_weights(at, window);
    const Num before = place() < length() - window;
    compute(queue, paid, pick(before, load(paid.values, index()), 0), paid.values);
    Ragged rows = paid;  // the rows of one query head together
    rows.heads = window;
    Ragged varied = spread(queue, rows, {.of = Spread::Of::Deviation, .over = Spread::Over::Heads});
    varied.heads = paid.heads;
    varied = combine(queue, varied, Combine::Power, 2);

    const Ragged score = combine(queue, over_runs(at, paid, Spread::Of::Mean), over_runs(at, varied, Spread::Of::Mean),
                                 Combine::Add, float(gamma));
    at.set_column("cake", score);

    const Ragged surprise = combine(queue, combine(queue, paid, Combine::Add, 1e-10f), paid, Combine::Log, -1);
    const Spread layer{.of = Spread::Of::Sum, .over = Spread::Over::Layer};
    const Ragged h = spread(queue, surprise, layer), v = spread(queue, varied, layer);
    const Num first = begin_of(paid, index() * paid.heads);
    auto preferred = std::make_shared<Buffer>(Dtype::F32, std::initializer_list<int64_t>{at.sequences()}, *queue.memory);
    auto power = [](const Num& x, double tau) { return exp(log(max(x, 1e-30)) * (1 / tau)); };
    compute(queue, power(load(h.values, first), entropy) * power(load(v.values, first) / window, variance), *preferred);
    static_cast<Preferences&>(at.state()).layers[size_t(at.layer)] = std::move(preferred);
  }

  Ragged score(LayerView& at) const override {
    const std::vector<int64_t> recent = affordable(at, budget, window);
    const Ragged votes = at.column("cake");
    Ragged smoothed = votes;
    smoothed.values = at.queue.scratch.take(Dtype::F32, {votes.values.size[0]});
    at.run().smooth(at.queue, without_last(at.queue, votes, recent), PoolKind::Mean, kernel, smoothed.values);
    return force_last(at.queue, smoothed, recent);
  }

  // b_l = w + ⌊share of the layer · N (B − w)⌋; what a layer cannot fill goes to the others in equal parts. Less than an
  // entry a layer may be left over.
  Tensor allocate(const Allocation& a) const override {
    Queue& queue = a.queue;
    const auto& state = static_cast<const Preferences&>(*a.state);
    const int64_t layers = int64_t(a.scores.size()), all = a.scores[0].segments(), g = a.scores[0].heads,
                  sequences = all / g;
    std::vector<int64_t> each(size_t(sequences), layers), budgets, recent;
    for (int64_t length : a.prompt)
      budgets.push_back(a.budget.entries(length)), recent.push_back(std::min<int64_t>(window, budgets.back()));
    Ragged preferred = numbers(queue, each, 1), room = numbers(queue, each, 1);
    auto of_layer = [&](const Tensor& x, int64_t l) {  // a layer's numbers, which stand `layers` apart
      Tensor out = x;
      out.data = x.as<float>() + l;
      out.size[0] = sequences, out.stride[0] = layers;
      return out;
    };
    const Num w = of_sequence(queue, recent, index(), 1);
    for (int64_t l = 0; l < layers; ++l) {
      const auto& kept = state.layers[size_t(a.first_layer + l)];
      compute(queue, kept ? load(*kept, index()) : Num(1), of_layer(preferred.values, l));
      compute(queue, max(0, length_of(a.scores[size_t(l)], index() * g) - w), of_layer(room.values, l));
    }
    const Num own = index();
    const Num total = of_sequence(queue, budgets, segment(), 1) - of_sequence(queue, recent, segment(), 1);
    const Ragged share = shares(queue, preferred);
    Ragged b = share;
    compute(queue, b, min(load(room.values, own), floor(load(share.values, own) * total * layers)), b.values);
    for (int round = 0; round < 4; ++round) {
      Ragged open = b;
      open.values = compute(queue, Dtype::F32, {b.bound}, load(b.values, own) < load(room.values, own));
      const Ragged taken = spread(queue, b, {.of = Spread::Of::Sum}), others = spread(queue, open, {.of = Spread::Of::Sum});
      const Num more = floor_div(total * layers - load(taken.values, own), load(others.values, own));
      compute(queue, b, min(load(room.values, own), load(b.values, own) + load(open.values, own) * more), b.values);
    }
    const Tensor counts = queue.scratch.take(Dtype::I32, {layers, all});
    for (int64_t l = 0; l < layers; ++l) {
      const Num s = floor_div(index(), g), length = length_of(a.scores[size_t(l)], index());
      const Num budget_of = of_sequence(queue, budgets, index(), g), window_of = of_sequence(queue, recent, index(), g);
      compute(queue, pick(length <= budget_of, length, load(b.values, s * layers + l) + window_of), counts.select(0, l));
    }
    return counts;
  }
};

}  // namespace

Entry cake() {
  Entry e = entry<Cake>("cake", "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences",
                        "Qin et al., 2025, arXiv 2503.12491", 2025, uint8_t(Role::Keep));
  e.equation =
      "s_j = pool_5(mean_i P_ij + γ var_i P_ij), mean over the group; b_l = w + share of H^(1/τ1) V^(1/τ2) · N (B − w)";
  e.needs = "nothing";
  e.identity = "cake(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
