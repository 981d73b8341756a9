#include <map>

#include "attention/maps.h"
#include "attention/rotation.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"
#include "mechanisms/keep/taken_rows.h"

namespace heed::mechanisms {

namespace {

/// Rows of one part of a prompt in every layer of a group, as latents that the layers share and a matrix for each.
struct Latents : Tokens {
  Tensor k, v;                     // [rows, rank], as the store keeps numbers
  std::vector<Tensor> to_k, to_v;  // for each layer: F32 [sequences, rank, g · width]
};

struct Factored final : State {
  std::map<int, std::vector<Part<Latents>>> groups;  // by their last layer
  int size = 1, layers = 1;

  std::unique_ptr<State> clone() const override { return std::make_unique<Factored>(*this); }
  /// A group's latents count in equal shares in its layers.
  int64_t bytes(int layer) const override {
    const int first = layer / size * size, last = std::min(first + size, layers) - 1;
    int64_t sum = 0;
    if (const auto found = groups.find(last); found != groups.end())
      for (const Part<Latents>& part : found->second) sum += part.of->bytes() / (last - first + 1);
    return sum;
  }
  void truncate(int sequence, int64_t position) override {
    for (auto& [layer, parts] : groups)
      for (Part<Latents>& part : parts) part.last[size_t(sequence)] = std::min(part.last[size_t(sequence)], position);
  }
};

// xKV (Chang et al., 2025): neighbouring layers' keys before rotation lie side by side in nearly one space of few
// dimensions, and so do their values. Behind each part of a prompt the entries of a group of layers leave the store; what
// stays is their singular value decomposition cut at `rank`, rows of latents that all layers share and a matrix for each. The
// singular values are in the latents (authors: their roots on either side; the product is the same). Decoded tokens stay
// whole, as do parts of a prompt that are no longer than the rank. Each step makes keys and values anew and merges what
// attention over them gives with attention over the store; densities and reads count the store alone.
struct Xkv final : KeepPolicy {
  int size, rank_k, rank_v, rounds;

  static std::vector<ParamInfo> params() {
    using M = Xkv;
    return {
        param(&M::size, "size", 4, 1, 64, "neighbouring layers of a group"),
        param(&M::rank_k, "rank", 512, 1, 1 << 20, "of a group's keys"),
        param(&M::rank_v, "value_rank", 768, 1, 1 << 20, "of a group's values"),
        param(&M::rounds, "rounds", 6, 1, 64, "of orthogonal iteration that find the main directions"),
    };
  }
  std::string check() const override {
    if (!layers.all()) return "layers=" + layers.text + ": groups are of all layers";
    return heads.all() ? "" : "heads=" + heads.text + ": a layer's heads are taken together";
  }
  const When& timing() const override {
    static const When each{When::At::Every, 1};
    return each;
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.same_entries = true;
    return n;
  }
  std::unique_ptr<State> open(const ModelInfo& m) const override {
    auto state = std::make_unique<Factored>();
    state->size = size, state->layers = m.layers;
    return state;
  }

  int last_of(const LayerView& at) const { return std::min((at.layer / size + 1) * size, at.model.layers) - 1; }

  /// Latents and the matrices that make each layer's rows of them.
  static void factor(Queue& queue, const Ragged& x, int64_t rank, int rounds, int64_t layers, Dtype type, Latents& to,
                     Tensor& latents, std::vector<Tensor>& matrices) {
    const int64_t all = x.segments(), width = x.values.size[1], block = width / layers, r = std::min(rank, width);
    latents = to.keep(queue, type, {to.rows, r});
    for (int64_t l = 0; l < layers; ++l) matrices.push_back(to.keep(queue, Dtype::F32, {all, r, block}));
    const Scratch scratch(queue.scratch);
    if (r == width) {  // nothing to find
      for (int64_t l = 0; l < layers; ++l)
        compute(queue, mod(place(), r) == channel() + double(l * block), matrices[size_t(l)].reshape({all * r, block}));
      return narrow(queue, x, latents);
    }
    const MainRows main = main_rows(queue, x, r, rounds);
    for (int64_t l = 0; l < layers; ++l)
      compute(queue, load(main.rows, place() * width + channel() + double(l * block)),
              matrices[size_t(l)].reshape({all * r, block}));
    const Tensor dual = compute(queue, Dtype::F32, {all * width, r},
                                load(main.dual, (floor_div(place(), width) * r + channel()) * width + mod(place(), width)));
    narrow(queue, transformed(queue, x, dual.reshape({all, width, r})), latents);
  }

  bool settle(LayerView& at) const override {
    if (at.decoding() || at.layer != last_of(at)) return true;
    Queue& queue = at.queue;
    const int64_t g = at.model.g, sequences = at.sequences(), count = at.layer % size + 1;
    int64_t longest = 0, rows = 0;
    for (int64_t s = 0; s < sequences; ++s)
      longest = std::max(longest, at.store->length(s * g)), rows += at.store->length(s * g);
    if (longest <= std::max(rank_k, rank_v) &&
        std::min<int64_t>(rank_k, rank_v) < count * g * std::min(at.model.d, at.model.d_v))
      return true;
    if (rows == 0) return true;

    const auto latents = std::make_shared<Latents>();
    Latents& to = *latents;
    tokens_of(at, to);
    const Ragged like = to.like();

    std::vector<Ragged> keys, values;
    std::vector<LayerView> views;
    views.reserve(size_t(count));
    for (int64_t l = 0; l < count; ++l) {
      LayerView& view = views.emplace_back(at.model, queue, at.layer - int(count - 1 - l), at.phase);
      view.store = &at.stores->layer(view.layer), view.stores = at.stores, view.read = at.read;
      view.read.rope = at.model.rope(view.layer);
      keys.push_back(plain_keys(view)), values.push_back(stored_values(view));
    }
    const PageType kept = at.stores->options().k;
    const Dtype type = kept.kind == PageType::Kind::F32 ? Dtype::F32 : Dtype::BF16;
    factor(queue, side_by_side(queue, keys, like), rank_k, rounds, count, type, to, to.k, to.to_k);
    factor(queue, side_by_side(queue, values, like), rank_v, rounds, count, type, to, to.v, to.to_v);
    for (const LayerView& view : views) leave_store(view);
    static_cast<Factored&>(at.state()).groups[at.layer].push_back({latents, std::vector<int64_t>(size_t(sequences), kForever)});
    return true;
  }

  Tensor edit(LayerView& at) const override {
    const auto& groups = static_cast<const Factored&>(at.state()).groups;
    const auto found = groups.find(last_of(at));
    if (found == groups.end()) return at.out;
    Queue& queue = at.queue;
    Plan all;
    all.causal = false;
    const size_t l = size_t(at.layer % size);
    return merged(at, int64_t(found->second.size()), [&](int64_t p, Mods mods, const Tensor& out, const Tensor& lse) {
      const Part<Latents>& part = found->second[size_t(p)];
      const Latents& of = *part.of;
      const auto opened = [&](const Tensor& latents, const Tensor& matrix, const Rope* rope) {
        const Ragged rows = transformed(queue, in_f32(queue, {latents, of.offsets, {}, 1, of.rows}), matrix);
        return head_major(queue, rows.values, of, at.model.g, rope);
      };
      Ragged k = opened(of.k, of.to_k[l], at.model.rope(at.layer)), v = opened(of.v, of.to_v[l], nullptr);
      k.ends = v.ends = ends_of(at, of, part.last);
      mods.k_pos = of.head_positions;
      at.run().attend(queue, at.q, k, v, all, mods, out, lse);
    });
  }
};

}  // namespace

Entry xkv() {
  Entry e = entry<Xkv>("xkv", "xKV: Cross-Layer SVD for KV-Cache Compression", "Chang et al., 2025, arXiv 2503.18893",
                       2025, Role::Keep | Role::Edit);
  e.equation =
      "[K_l … K_l+3] ≈ U_r S_r V_r^T over a prompt's rows, keys before rotation; U_r S_r is kept once, V_r by layer; "
      "values alike";
  e.needs = "the same entries in all layers of a group";
  e.identity = "xkv(rank=1000000,value_rank=1000000)";
  e.verified = {"identity", "formula", "model"};
  return e;
}

}  // namespace heed::mechanisms
