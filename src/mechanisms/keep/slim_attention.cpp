#include <algorithm>
#include <cmath>
#include <map>

#include "attention/maps.h"
#include "attention/scores.h"
#include "base/threads.h"
#include "mechanisms/entries.h"
#include "mechanisms/keep/taken_rows.h"

namespace heed::mechanisms {

namespace {

/// M [out of v, n] with M k = v, k [n, n] and v [out, n], in f64: elimination with partial pivoting.
Buffer quotient(const Buffer& k, const Buffer& v, int layer) {
  const int64_t n = k->size[0], width = n + v->size[0];
  std::vector<double> a;  // of k^T M^T = v^T
  for (int64_t r = 0; r < n; ++r)
    for (int64_t c = 0; c < width; ++c) a.push_back(double(c < n ? k->at<float>(c, r) : v->at<float>(c - n, r)));
  double largest = 0;
  for (int64_t p = 0; p < n; ++p) {
    int64_t best = p;
    for (int64_t r = p + 1; r < n; ++r)
      if (std::abs(a[size_t(r * width + p)]) > std::abs(a[size_t(best * width + p)])) best = r;
    std::swap_ranges(a.begin() + p * width + p, a.begin() + (p + 1) * width, a.begin() + best * width + p);
    const double* from = &a[size_t(p * width)];
    largest = std::max(largest, std::abs(from[p]));
    if (!(std::abs(from[p]) > 1e-7 * largest))
      throw Error(Code::Unsupported, "slim-attention",
                  "the key matrix of layer " + std::to_string(layer) +
                      " has no inverse to speak of: values do not follow from keys",
                  "give it layers=…, without that one");
    parallel_for(n - p - 1, [&](int64_t i) {
      double* to = &a[size_t((p + 1 + i) * width)];
      const double factor = to[p] / from[p];
      for (int64_t c = p + 1; c < width; ++c) to[c] -= factor * from[c];
    });
  }
  for (int64_t p = n - 1; p >= 0; --p) {
    double* own = &a[size_t(p * width)];
    for (int64_t c = n; c < width; ++c) own[c] /= own[p];
    parallel_for(p, [&](int64_t r) {
      double* to = &a[size_t(r * width)];
      for (int64_t c = n; c < width; ++c) to[c] -= to[p] * own[c];
    });
  }
  Buffer out(Dtype::F32, {v->size[0], n});
  for (int64_t o = 0; o < v->size[0]; ++o)
    for (int64_t c = 0; c < n; ++c) out->at<float>(o, c) = float(a[size_t(c * width + n + o)]);
  return out;
}

/// Plain keys of all heads, side by side.
struct Keys : Tokens {
  Tensor k;  // [rows, h · d], as the store keeps numbers
};

/// Of a layer: values are matrix · keys + bias.
struct FromKeys {
  Buffer matrix, bias;  // F32 [h · d_v, h · d] and [h · d_v], or none
};

struct Slim final : State {
  std::map<int, std::vector<Part<Keys>>> layers;
  std::map<int, std::shared_ptr<const FromKeys>> made;

  std::unique_ptr<State> clone() const override { return std::make_unique<Slim>(*this); }
  int64_t bytes(int layer) const override {
    int64_t sum = 0;
    if (const auto found = layers.find(layer); found != layers.end())
      for (const Part<Keys>& part : found->second) sum += part.of->bytes();
    return sum;
  }
  void truncate(int sequence, int64_t position) override {
    for (auto& [layer, parts] : layers)
      for (Part<Keys>& part : parts) part.last[size_t(sequence)] = std::min(part.last[size_t(sequence)], position);
  }
};

// Slim attention (Graef et al., 2025): where every query head has keys of its own and W_K is square, values follow from keys,
// V = K W_K^-1 W_V, so only the keys of all heads before rotary embedding are kept, and P V is made of P K. Behind a prompt, or
// `every` decoded tokens, entries leave the store and their keys stay. While decoding a head's weights multiply the keys of all
// heads first and W_K^-1 W_V then (the authors' order); several queries at once share values made anew. W_K^-1 W_V is found once
// a session and layer, 8/3 (h d)^3 operations on the host, and errors of keys grow with W_K's condition.
struct SlimAttention final : KeepPolicy {
  int every;

  static std::vector<ParamInfo> params() {
    return {param(&SlimAttention::every, "every", 256, 1, 1 << 30,
                  "decoded tokens that keep their values until they are so many")};
  }
  std::string check() const override {
    return heads.all() ? "" : "heads=" + heads.text + ": values are made of the keys of all heads";
  }
  const When& timing() const override {
    static const When each{When::At::Every, 1};
    return each;
  }
  Needs needs(const ModelInfo& m) const override {
    if (m.h != m.g)
      throw Error(
          Code::Unsupported, "slim-attention",
          "values follow from keys only where each query head has keys of its own; here " + std::to_string(m.h) +
              " heads share " + std::to_string(m.g),
          "use a model with as many KV heads as query heads; xkv, minicache and the quantised stores take this one");
    if (m.hidden != 0 && m.hidden != m.h * m.d)
      throw Error(Code::Unsupported, "slim-attention",
                  "keys are " + std::to_string(m.h * m.d) + " numbers a token made of " + std::to_string(m.hidden) +
                      ": W_K is not square",
                  "use a model whose heads make its width");
    Needs n;
    n.same_entries = n.plain_keys = true;
    return n;
  }
  std::unique_ptr<State> open(const ModelInfo&) const override { return std::make_unique<Slim>(); }

  bool settle(LayerView& at) const override {
    if (at.decoding() && at.store->longest() < every) return true;
    if (at.store->longest() == 0) return true;
    if (!at.projections.k)
      throw Error(Code::Unsupported, "slim-attention",
                  "values follow from keys by a model's W_K and W_V, which are not here, or keys are normed behind W_K",
                  "use it with a model, of a family without a norm of keys");
    Queue& queue = at.queue;
    const auto keys = std::make_shared<Keys>();
    tokens_of(at, *keys);
    const Dtype type = at.stores->options().k.kind == PageType::Kind::F32   ? Dtype::F32
                       : at.stores->options().k.kind == PageType::Kind::F16 ? Dtype::F16
                                                                            : Dtype::BF16;
    keys->k = keys->keep(queue, type, {keys->rows, int64_t(at.model.h) * at.model.d});
    narrow(queue, side_by_side(queue, {kept_keys(at)}, keys->like()), keys->k);
    leave_store(at);
    static_cast<Slim&>(at.state())
        .layers[at.layer]
        .push_back({keys, std::vector<int64_t>(size_t(at.store->segments() / at.model.g), kForever)});
    return true;
  }

  /// On the host, whatever type it is kept in.
  static Buffer read(Queue& queue, const Tensor& weights) {
    const Scratch scratch(queue.scratch);
    const Tensor plain = queue.scratch.take(Dtype::F32, {weights.size[0], weights.size[1]});
    queue.run->dequantise(queue, weights, plain);
    return queue.read_back(plain);
  }

  static const FromKeys& from_keys(LayerView& at) {
    auto& made = static_cast<Slim&>(at.state()).made[at.layer];
    if (made) return *made;
    Queue& queue = at.queue;
    const Projections& by = at.projections;
    const Buffer matrix = quotient(read(queue, by.k), read(queue, by.v), at.layer);
    auto own = std::make_shared<FromKeys>();
    const auto place = [&](const Buffer& from, Buffer& to) {
      to = Buffer(Dtype::F32, std::span<const int64_t>(from->size.data(), size_t(from->rank)), *queue.memory);
      queue.upload(from, to);
    };
    place(matrix, own->matrix);
    if (by.k_bias || by.v_bias) {
      const int64_t n = matrix->size[0];
      Buffer bias = Buffer::zeros(Dtype::F32, {n});
      const auto numbers = [&](const Tensor& x) {
        const Scratch scratch(queue.scratch);
        return queue.read_back(compute(queue, Dtype::F32, {x.size[0]}, load(x, index())));
      };
      if (by.v_bias) bias = numbers(by.v_bias);
      if (by.k_bias) {
        const Buffer k = numbers(by.k_bias);
        for (int64_t o = 0; o < n; ++o) {
          double sum = 0;
          for (int64_t c = 0; c < matrix->size[1]; ++c)
            sum += double(matrix->at<float>(o, c)) * double(k->at<float>(c));
          bias->at<float>(o) -= float(sum);
        }
      }
      place(bias, own->bias);
    }
    made = own;
    return *made;
  }

  Tensor edit(LayerView& at) const override {
    const auto& layers = static_cast<const Slim&>(at.state()).layers;
    const auto found = layers.find(at.layer);
    if (found == layers.end()) return at.out;
    Queue& queue = at.queue;
    const FromKeys& by = from_keys(at);
    const Tensor bias = by.bias ? by.bias.view() : Tensor();
    const int64_t h = at.model.h, d = at.model.d, d_v = at.model.d_v, rows = at.out.size[0];
    Plan all;
    all.causal = false;
    return merged(at, int64_t(found->second.size()), [&](int64_t p, Mods mods, const Tensor& out, const Tensor& lse) {
      const Part<Keys>& part = found->second[size_t(p)];
      const Keys& of = *part.of;
      const Tensor plain = in_f32(queue, {of.k, of.offsets, {}, 1, of.rows}).values;
      Ragged k = head_major(queue, plain, of, h, at.model.rope(at.layer));
      k.ends = ends_of(at, of, part.last);
      mods.k_pos = of.head_positions;
      if (!at.decoding()) {
        const Tensor values = queue.scratch.take(Dtype::F32, {of.rows, h * d_v});
        queue.run->matmul(queue, by.matrix, plain, bias, false, values);
        Ragged v = head_major(queue, values, of, h, nullptr);
        v.ends = k.ends;
        return at.run().attend(queue, at.q, k, v, all, mods, out, lse);
      }
      Ragged v = head_major(queue, plain, of, h, nullptr);
      v.ends = k.ends;
      const Tensor each = queue.scratch.take(Dtype::F32, {h, rows, d});
      for (int64_t head = 0; head < h; ++head) {
        mods.v_map = compute(queue, Dtype::I32, {h}, double(head));
        at.run().attend(queue, at.q, k, v, all, mods, each.select(0, head), lse);
      }
      const Tensor wide = compute(queue, Dtype::F32, {rows, h * d},
                                  load(each, (floor_div(channel(), d) * rows + place()) * d + mod(channel(), d))),
                   made = queue.scratch.take(Dtype::F32, {rows, h * d_v});
      queue.run->matmul(queue, by.matrix, wide, bias, false, made);
      // Of the values of all heads under a head's weights, its own.
      compute(queue, at.q, load(made, floor_div(index(), d_v) * (h * d_v) + mod(segment(), h) * d_v + channel()), out);
    });
  }
};

}  // namespace

Entry slim_attention() {
  Entry e = entry<SlimAttention>(
      "slim-attention", "Slim attention: cut your context memory in half without loss - K-cache is all you need for MHA",
      "Graef et al., 2025, arXiv 2503.05840", 2025, Role::Keep | Role::Edit);
  e.equation = "V = K W_K^-1 W_V, so P V = (P K) W_K^-1 W_V: the keys of all heads are kept, no values";
  e.needs = "keys before rotation, of every query head and not normed; a square W_K";
  e.no_identity = "only up to rounding, which goes through an inverse";
  e.verified = {"formula"};
  return e;
}

}  // namespace heed::mechanisms
