#include <map>

#include "attention/maps.h"
#include "attention/rotation.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

/// Rows of one part of a prompt in every layer of a group, as latents that the layers share and a matrix for each.
struct Latents {
  Tensor k, v;                     // [rows, rank], as the store keeps numbers
  Tensor offsets;                  // I64 [sequences + 1]
  Tensor positions;                // I32 [rows]
  Tensor heads, head_positions;    // the same for rows of every head, head-major
  std::vector<Tensor> to_k, to_v;  // for each layer: F32 [sequences, rank, g · width]
  std::vector<Buffer> held;        // what those lie in
  int64_t rows = 0, bytes = 0;
};

constexpr int64_t kForever = int64_t(1) << 40;

struct Factored final : State {
  struct Part {
    std::shared_ptr<const Latents> of;
    std::vector<int64_t> last;  // for each sequence: positions from here on are forgotten
  };
  std::map<int, std::vector<Part>> groups;  // by their last layer
  int size = 1, layers = 1;

  std::unique_ptr<State> clone() const override { return std::make_unique<Factored>(*this); }
  /// A group's latents count in equal shares in its layers.
  int64_t bytes(int layer) const override {
    const int first = layer / size * size, last = std::min(first + size, layers) - 1;
    int64_t sum = 0;
    if (const auto found = groups.find(last); found != groups.end())
      for (const Part& part : found->second) sum += part.of->bytes / (last - first + 1);
    return sum;
  }
  void truncate(int sequence, int64_t position) override {
    for (auto& [layer, parts] : groups)
      for (Part& part : parts) part.last[size_t(sequence)] = std::min(part.last[size_t(sequence)], position);
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

  /// Head-major rows of several layers, side by side: [rows, layers · g · width], a segment a sequence.
  static Ragged side_by_side(Queue& queue, const std::vector<Ragged>& layers, const Ragged& like) {
    const int64_t block = layers[0].heads * layers[0].values.size[1], width = int64_t(layers.size()) * block;
    Ragged out = like;
    out.values = queue.scratch.take(Dtype::F32, {like.bound, width});
    for (size_t l = 0; l < layers.size(); ++l) {
      const Scratch scratch(queue.scratch);
      const Tensor own = queue.scratch.take(Dtype::F32, {like.bound, block});
      queue.run->merge_heads(queue, layers[l], like.offsets, own);
      const Num c = channel() - double(int64_t(l) * block);
      compute(queue, pick(c >= 0 && c < block, load(own, place() * block + c), load(out.values, index())), out.values);
    }
    return out;
  }

  /// Latents and the matrices that make each layer's rows of them.
  static void factor(Queue& queue, const Ragged& x, int64_t rank, int rounds, int64_t layers, Dtype type, Latents& to,
                     Tensor& latents, std::vector<Tensor>& matrices) {
    const int64_t all = x.segments(), width = x.values.size[1], block = width / layers, r = std::min(rank, width);
    const auto keep = [&](Dtype as, std::initializer_list<int64_t> sizes) {
      to.held.emplace_back(as, sizes, *queue.memory);
      return to.held.back().view();
    };
    latents = keep(type, {to.rows, r});
    for (int64_t l = 0; l < layers; ++l) matrices.push_back(keep(Dtype::F32, {all, r, block}));
    const Scratch scratch(queue.scratch);
    Ragged out = x;
    out.values = latents, out.heads = 1;
    if (r == width) {  // nothing to find
      for (int64_t l = 0; l < layers; ++l)
        compute(queue, mod(place(), r) == channel() + double(l * block), matrices[size_t(l)].reshape({all * r, block}));
      const Heads kept{.x = x.values.reshape({x.values.size[0], 1, width}), .out = out};
      return queue.run->split_heads(queue, x.offsets, 0, {&kept, 1});
    }
    const MainRows main = main_rows(queue, x, r, rounds);
    for (int64_t l = 0; l < layers; ++l)
      compute(queue, load(main.rows, place() * width + channel() + double(l * block)),
              matrices[size_t(l)].reshape({all * r, block}));
    const Tensor dual = compute(queue, Dtype::F32, {all * width, r},
                                load(main.dual, (floor_div(place(), width) * r + channel()) * width + mod(place(), width)));
    const Ragged made = transformed(queue, x, dual.reshape({all, width, r}));
    const Heads kept{.x = made.values.reshape({x.values.size[0], 1, r}), .out = out};
    queue.run->split_heads(queue, x.offsets, 0, {&kept, 1});
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
    to.rows = rows;
    const Tensor held = at.store->pages().length;
    const auto keep = [&](Dtype type, int64_t size) {
      to.held.emplace_back(type, std::initializer_list<int64_t>{size}, *queue.memory);
      return to.held.back().view();
    };
    to.offsets = keep(Dtype::I64, sequences + 1), to.positions = keep(Dtype::I32, rows);
    to.heads = keep(Dtype::I64, sequences * g + 1), to.head_positions = keep(Dtype::I32, rows * g);
    queue.move(offsets_of(queue, sequences, load(held, index() * g)), to.offsets);
    const Ragged like{.values = {}, .offsets = to.offsets, .ends = {}, .heads = 1, .bound = rows};
    const Ragged places = stored_positions(at);
    compute(queue, like, load(places.values, begin_of(places, segment() * g) + place()), to.positions);
    queue.move(at.store->offsets(queue), to.heads);  // every head holds the same
    compute(queue, places, load(places.values, index()), to.head_positions);

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
    for (const LayerView& view : views) {
      const std::vector<int64_t> none(size_t(sequences * g), 0);
      const Tensor zeros = compute(queue, Dtype::I32, {sequences * g}, 0);
      view.store->compact(queue, zeros, zeros, 1, none, 0);
    }
    for (const Buffer& held_here : to.held) to.bytes += held_here->bytes();
    static_cast<Factored&>(at.state()).groups[at.layer].push_back({latents, std::vector<int64_t>(size_t(sequences), kForever)});
    return true;
  }

  /// A layer's rows of latents, head-major, turned to their positions when a rope is given.
  static Ragged opened(Queue& queue, const Tensor& latents, const Tensor& matrix, const Latents& of, int64_t g,
                       const Rope* rope) {
    const Ragged made = transformed(queue, in_f32(queue, {latents, of.offsets, {}, 1, of.rows}), matrix);
    const int64_t width = matrix.size[2] / g;
    Ragged out{.values = queue.scratch.take(Dtype::F32, {of.rows * g, width}),
               .offsets = of.heads,
               .ends = {},
               .heads = g,
               .bound = of.rows * g};
    const Heads heads{.x = made.values.reshape({of.rows, g, width}), .rope = rope, .positions = of.positions, .out = out};
    queue.run->split_heads(queue, of.offsets, 0, {&heads, 1});
    return out;
  }

  Tensor edit(LayerView& at) const override {
    const auto& groups = static_cast<const Factored&>(at.state()).groups;
    const auto found = groups.find(last_of(at));
    if (found == groups.end()) return at.out;
    Queue& queue = at.queue;
    const int64_t rows = at.out.size[0], d_v = at.out.size[1], g = at.model.g, parts = int64_t(found->second.size());
    const Tensor outs = queue.scratch.take(Dtype::F32, {parts + 1, rows, d_v}),
                 sums = queue.scratch.take(Dtype::F32, {parts + 1, rows});
    queue.move(at.out, outs.select(0, parts)), queue.move(at.lse, sums.select(0, parts));
    Plan all;
    all.causal = false;
    Mods mods = at.mods;
    mods.gain = mods.sink_logits = mods.key_bias = mods.until = {};
    const size_t l = size_t(at.layer % size);
    for (int64_t p = 0; p < parts; ++p) {
      const Scratch scratch(queue.scratch);
      const Factored::Part& part = found->second[size_t(p)];
      const Latents& of = *part.of;
      Ragged k = opened(queue, of.k, of.to_k[l], of, g, at.model.rope(at.layer)),
             v = opened(queue, of.v, of.to_v[l], of, g, nullptr);
      mods.k_pos = of.head_positions;
      if (std::any_of(part.last.begin(), part.last.end(), [](int64_t last) { return last < kForever; })) {
        const Num s = floor_div(index(), g), begin = load(of.offsets, s), end = load(of.offsets, s + 1);
        const Num left = find(of.positions, begin, end, of_sequence(queue, part.last, index(), g)) - begin;
        k.ends = v.ends = compute(queue, Dtype::I64, {at.sequences() * g}, load(of.heads, index()) + left);
      }
      at.run().attend(queue, at.q, k, v, all, mods, outs.select(0, p), sums.select(0, p));
    }
    const Tensor out = queue.scratch.take(Dtype::F32, {rows, d_v}), lse = queue.scratch.take(Dtype::F32, {rows});
    at.run().merge(queue, outs, sums, out, lse);
    at.lse = lse;
    return out;
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
