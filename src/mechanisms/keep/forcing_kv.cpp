#include <algorithm>

#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Forcing-KV (Ji et al., 2026) for video that grows chunk by chunk: static heads hold the first frame and the latest;
// dynamic ones also those segments of the frames between that resemble the same place of the next frame least. How
// alike a segment is, is the mean over its tokens of the cosine of rotated keys, those of all dynamic heads side by
// side. The first layer keeps all, the next one chooses and all deeper ones follow. As released, but that more than
// three frames may compete; which heads are static (80 % of what they pay lies in the last four frames) is given. Of
// text frames are stretches of tokens.
struct ForcingKV final : KeepPolicy {
  int frame, parts;
  double share;
  Range fixed;

  static std::vector<ParamInfo> params() {
    using M = ForcingKV;
    return {
        param(&M::when, "when", "when", "prompt", "prompt, chunk, every(n)", "when the policy cuts"),
        param(&M::frame, "frame", 1560, 1, 1 << 30, "tokens of a frame"),
        param(&M::parts, "parts", 6, 1, 1 << 20, "segments of a frame, which divide it evenly"),
        param(&M::share, "share", 0.33, 0, 1, "share of the segments between the first and the latest frame that stays"),
        param(&M::fixed, "static", "range", "", "0-3, [0,4-7], …",
              "KV heads, counted through all layers, that keep none of them"),
    };
  }
  std::string check() const override {
    return frame % parts ? "parts=" + std::to_string(parts) + " do not divide frame=" + std::to_string(frame) : "";
  }

  /// What the first layer of a cut has chosen: segments for each sequence. Forks share it.
  struct Segments final : State {
    int last = -1;  // layer that was asked
    int64_t capacity = 0;
    std::shared_ptr<const Buffer> index, count;
    std::unique_ptr<State> clone() const override { return std::make_unique<Segments>(*this); }
  };
  std::unique_ptr<State> open(const ModelInfo&) const override { return std::make_unique<Segments>(); }

  /// Whether a KV head of the layer is static.
  Num is_fixed(LayerView& at, const Num& head) const {
    if (fixed.all()) return 0;
    std::vector<uint8_t> named;
    for (int i = 0; i < at.model.g; ++i)
      named.push_back(fixed.holds(at.layer * at.model.g + i, at.model.layers * at.model.g));
    return load(at.queue.upload(named), head);
  }
  /// Segments that compete among `length` entries.
  Num candidates(const Num& length) const { return max(0, floor_div(length, frame) - 2) * parts; }

  Ragged score(LayerView& at) const override {
    Queue& queue = at.queue;
    const Ragged out = at.per_entry();
    if (at.layer == 0 && at.model.layers > 1) return compute(queue, out, kInfinity, out.values), out;
    auto& choice = static_cast<Segments&>(at.state());
    if (!choice.index || at.layer <= choice.last) choose(at, choice);
    choice.last = at.layer;
    const Lists segments{*choice.index, *choice.count, choice.capacity};
    const int64_t g = out.heads;
    const Num latest = (floor_div(length(), frame) - 1) * frame,
              kept = segments.has(floor_div(segment(), g), floor_div(place(), frame / parts) - parts);
    compute(queue, out,
            pick(place() < frame || place() >= latest || (1 - is_fixed(at, mod(segment(), g)) && kept), kInfinity, 0),
            out.values);
    return out;
  }
  bool unbounded() const override { return true; }
  Tensor allocate(const Allocation& a) const override { return passing(a, 0.5f); }

 private:
  void choose(LayerView& at, Segments& choice) const {
    Queue& queue = at.queue;
    const Ragged keys = stored_keys(at);
    const int64_t d = at.store->shape().d, g = keys.heads, sequences = keys.segments() / g;
    Ragged next = keys;  // the same token of the next frame
    next.values = queue.scratch.take(Dtype::F32, {keys.values.size[0], d});
    compute(queue, keys,
            load(keys.values, (begin_of(keys, segment()) + min(place() + frame, length() - 1)) * d + channel()),
            next.values);
    const auto summed = [&](const Ragged& x, const Ragged& y) {  // over the dynamic heads
      const Ragged own = row_dots(queue, x, y);
      compute(queue, own, (1 - is_fixed(at, mod(segment(), g))) * load(own.values, index()), own.values);
      return spread(queue, own, {.of = Spread::Of::Sum, .over = Spread::Over::Heads});
    };
    const Ragged both = summed(keys, next), first = summed(keys, keys), second = summed(next, next), alike = at.per_entry();
    compute(queue, alike,
            load(both.values, index()) / sqrt(max(load(first.values, index()) * load(second.values, index()), 1e-30)),
            alike.values);
    const Ragged mean = spread(queue, alike, {.of = Spread::Of::Mean, .block = frame / parts});
    int speaker = 0;  // a dynamic head: all of them hold the same
    while (speaker + 1 < g && !fixed.all() && fixed.holds(at.layer * int(g) + speaker, at.model.layers * int(g)))
      ++speaker;
    const auto of = [&](const Num& s) { return s * g + speaker; };
    const Ragged unlike = numbers(queue, sequences, candidates(length_of(mean, of(index()))), 1,
                                  mean.bound / (frame / parts) + 1);
    compute(queue, unlike, -1 * load(mean.values, begin_of(mean, of(segment())) + (place() + parts) * (frame / parts)),
            unlike.values);
    Select least;
    least.count = compute(queue, Dtype::I32, {sequences}, round(share * length_of(unlike, index())));
    const Lists found = chosen(queue, unlike, least, std::max<int64_t>(1, at.store->longest() / (frame / parts)));
    const auto kept = [&](const Tensor& from) {
      auto to = std::make_shared<Buffer>(Dtype::I32, std::initializer_list<int64_t>{from.numel()}, *queue.memory);
      queue.move(from, *to);
      return to;
    };
    choice.index = kept(found.index), choice.count = kept(found.count), choice.capacity = found.capacity;
  }
};

}  // namespace

Entry forcing_kv() {
  Entry e = entry<ForcingKV>(
      "forcing-kv", "Forcing-KV: Hybrid KV Cache Compression for Efficient Autoregressive Video Diffusion Models",
      "Ji et al., 2026, arXiv 2605.09681", 2026, uint8_t(Role::Keep));
  e.equation =
      "keep the first frame, the last, and of the segments between the share of least mean_t cos(k_t, k_t + frame)";
  e.needs = "which heads are static (static=)";
  e.identity = "forcing-kv(share=1)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
