#include <algorithm>

#include "attention/clusters.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// SqueezeAttention (Wang et al., 2024): a layer whose attention hardly turns the residual stream matters less. Layers are
// put into three groups by the mean cosine between the stream before and behind attention (k-means, begun with layers
// spread evenly); the group of the highest one gives up a part of its budget to the others. Which entries stay is the inner
// policy's business, at the end of a prompt; heads of a layer hold alike. Norms and biases behind the output matrix do not
// count.
struct SqueezeAttention final : KeepWrapper {
  double share;

  static std::vector<ParamInfo> params() {
    return {param(&SqueezeAttention::share, "share", 0.35, 0, 1,
                  "what is left of the budget in the layers that matter least; 1: all layers alike")};
  }
  std::string check() const override {
    if (inner->timing().decodes()) return "when=every(n) cuts layers one by one; when=prompt or when=chunk";
    return inner->check();
  }

  Needs needs(const ModelInfo& model) const override {
    Needs n = inner->needs(model);
    n.all_layers = true;
    n.columns.push_back({.name = "squeeze.score", .fill = float(kInfinity)});
    return n;
  }
  /// For each layer and sequence, Σ over tokens of the cosine. Written anew, never changed: forks share it.
  struct Layers final : State {
    std::vector<std::shared_ptr<const Buffer>> sums;
    std::unique_ptr<State> inner;
    std::unique_ptr<State> clone() const override {
      auto out = std::make_unique<Layers>();
      out->sums = sums;
      if (inner) out->inner = inner->clone();
      return out;
    }
  };
  std::unique_ptr<State> open(const ModelInfo& model) const override {
    auto state = std::make_unique<Layers>();
    state->sums.resize(size_t(model.layers));
    state->inner = inner->open(model);
    return state;
  }

  /// What the inner policy does with its own state.
  template <class Body>
  auto inside(LayerView& at, Body&& body) const {
    struct Back {
      LayerView& at;
      State* held;
      ~Back() { at.enter(held); }
    } const back{at, at.state_held()};
    at.enter(static_cast<Layers&>(*back.held).inner.get());
    return body();
  }

  void observe(LayerView& at) const override {
    inside(at, [&] { inner->observe(at); });
    if (at.decoding() || at.phase == Phase::Replay) return;
    // All layers are cut together, when the queries are gone.
    at.set_column("squeeze.score", inside(at, [&] { return inner->score(at); }));
    auto& sum = static_cast<Layers&>(at.state()).sums[size_t(at.layer)];
    if (at.hidden) sum = cosines(at, sum);
  }
  bool settle(LayerView& at) const override {
    return inside(at, [&] { return inner->settle(at); });
  }
  Ragged rank(LayerView& at, const Ragged& scores, const Tensor& counts) const override {
    return inside(at, [&] { return inner->rank(at, scores, counts); });
  }
  void fold(LayerView& at, const Lists& kept) const override {
    inside(at, [&] { inner->fold(at, kept); });
  }

  std::shared_ptr<const Buffer> cosines(LayerView& at, const std::shared_ptr<const Buffer>& before) const {
    Queue& queue = at.queue;
    const int64_t tokens = at.hidden.size[0], hidden = at.hidden.size[1];
    Ragged heads = at.q, x{.values = at.hidden, .offsets = at.first, .ends = {}, .heads = 1, .bound = tokens}, y = x;
    heads.values = at.out;
    const Tensor merged = queue.scratch.take(Dtype::F32, {tokens, at.model.h * at.out.size[1]});
    y.values = queue.scratch.take(Dtype::F32, {tokens, hidden});
    at.run().merge_heads(queue, heads, at.first, merged);
    at.run().matmul(queue, at.output(), merged, {}, false, y.values);
    at.run().add(queue, x.values, y.values);
    const Ragged cosine = row_dots(queue, unit_rows(queue, x), unit_rows(queue, y), 1 / float(hidden));
    const Ragged sum = spread(queue, cosine, {.of = Spread::Of::Sum});
    auto out = std::make_shared<Buffer>(Dtype::F32, std::initializer_list<int64_t>{at.sequences()}, *queue.memory);
    const Num s = index(), more = pick(length_of(x, s) > 0, load(sum.values, begin_of(x, s)), 0);
    compute(queue, before ? more + load(*before, s) : more, *out);
    return out;
  }

  Ragged score(LayerView& at) const override { return at.column("squeeze.score"); }

  Tensor allocate(const Allocation& a) const override {
    const Tensor even = KeepPolicy::allocate(a);
    Queue& queue = a.queue;
    const auto& own = static_cast<const Layers&>(*a.state);
    const int64_t layers = even.size[0], all = even.size[1], g = a.scores[0].heads;
    if (layers < 3 || share >= 1 || !own.sums[size_t(a.first_layer)]) return even;
    const Tensor counts = queue.scratch.take(Dtype::I32, {layers, all});
    // A flag for each (sequence, layer) of the group that matters least, and how many it has.
    const Tensor least = queue.scratch.take(Dtype::F32, {all / g, layers});
    for (int64_t s = 0; s < all / g; ++s) {
      Ragged means = numbers(queue, std::vector<int64_t>{layers}, 1);
      means.values = means.values.reshape({layers, 1});
      for (int64_t l = 0; l < layers; ++l)
        compute(queue, load(*own.sums[size_t(a.first_layer + l)], s) / double(std::max<int64_t>(1, a.prompt[size_t(s)])),
                means.values.slice(0, l, l + 1));
      const Clusters groups = clustered(queue, z_scores(queue, means), layers, 3, 16, false);
      const Tensor c = groups.centroids.reshape({3});
      compute(queue, load(c, load(groups.labels, index())) >= max(load(c, 0), max(load(c, 1), load(c, 2))),
              least.select(0, s));
    }
    Ragged flags;
    flags.values = least.reshape({all / g * layers}), flags.bound = all / g * layers;
    flags.offsets = compute(queue, Dtype::I64, {all / g + 1}, index() * layers);
    const Ragged many = spread(queue, flags, {.of = Spread::Of::Sum});
    for (int64_t l = 0; l < layers; ++l) {
      const Num own_layer = floor_div(index(), g) * layers + l;
      const Tensor size = compute(queue, Dtype::F32, {all}, load(many.values, own_layer)),
                   in = compute(queue, Dtype::F32, {all}, load(flags.values, own_layer));
      const Num n = load(size, index()), b = load(even.select(0, l), index());
      const Num part = pick(load(in, index()) > 0, share, (layers - n * share) / (layers - n));
      compute(queue, pick(n >= layers, b, max(1, floor(b * part + 1e-6))), counts.select(0, l));
    }
    return counts;
  }
};

}  // namespace

Entry squeeze_attention() {
  Entry e = entry<SqueezeAttention>(
      "squeeze-attention", "SqueezeAttention: 2D Management of KV-Cache in LLM Inference via Layer-wise Optimal Budget",
      "Wang et al., 2024, arXiv 2404.04793", 2024, uint8_t(Role::Keep));
  e.equation =
      "c_l = mean cos(x, x + attention(x)); the layers of the highest of three groups hold p B, the others share "
      "the rest";
  e.needs = "a keep policy inside; the residual stream, and another product with the output matrix in prompts";
  e.identity = "squeeze-attention(snapkv(budget=1.0),share=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
