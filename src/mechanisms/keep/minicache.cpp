#include "attention/scores.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// MiniCache (Liu et al., 2024): neighbouring layers of a model's upper half have keys and values in nearly one direction. Two
// layers hold one page: the direction between theirs, and the norms of both. Entries whose directions differ most stay
// whole. Prompts are merged, part by part, full pages of 64 entries at a time; what is decoded stays as it is. Rows of
// their own are there for 4 entries of a page (PageType::kSpare): a page with more of those that differ stays whole.
struct MiniCache final : KeepPolicy {
  int from;
  double t, retention;

  static std::vector<ParamInfo> params() {
    using M = MiniCache;
    return {
        param(&M::from, "from", -1, -1, 1 << 20,
              "the first layer that is merged, with the next one; −1: half of the layers"),
        param<M, double>(&M::t, "t", 0.6, 0, 1, "how far the direction lies towards the upper layer's"),
        param<M, double>(&M::retention, "retention", 0.05, 0, 1,
                         "share of the range of similarities whose entries stay whole"),
    };
  }

  const When& timing() const override {
    static const When each{When::At::Every, 1};
    return each;
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.paired = n.same_entries = true;
    return n;
  }

  /// Whether a layer is the upper one of two.
  bool upper(const LayerView& at) const {
    const int above = at.layer - (from < 0 ? at.model.layers / 2 : from);
    return above > 0 && above % 2 == 1 && layers.holds(at.layer - 1, at.model.layers);
  }

  /// 1 for entries from number first[segment] on that are less alike than min + retention · (max − min) of them.
  Ragged apart(Queue& queue, const Ragged& x, const Ragged& y, const Tensor& first) const {
    const float width = float(x.values.size[1]);
    const Ragged alike = row_dots(queue, unit_rows(queue, x), unit_rows(queue, y), 1 / width);
    const auto among = [&](double others) {
      Ragged out = alike;
      out.values = queue.scratch.take(Dtype::F32, {alike.values.size[0]});
      compute(queue, alike, pick(place() >= load(first, segment()), load(alike.values, index()), others), out.values);
      return out;
    };
    const Ragged low = spread(queue, among(kInfinity), {.of = Spread::Of::Min}),
                 high = spread(queue, among(-kInfinity), {.of = Spread::Of::Max});
    const Num least = load(low.values, index()), most = load(high.values, index());
    compute(queue, alike, load(alike.values, index()) < least + retention * (most - least), alike.values);
    return alike;
  }

  bool settle(LayerView& at) const override {
    if (at.decoding() || !upper(at)) return true;
    const int64_t all = at.store->segments(), g = at.model.g;
    std::vector<uint8_t> chosen;
    int64_t pages = 0;  // that this part of the prompt may have filled
    for (int64_t s = 0; s < all; ++s) {
      chosen.push_back(heads.holds(int(s % g), int(g)));
      if (chosen.back()) pages += at.rows[size_t(s / g)] / kPage + 1;
    }
    LayerView below(at.model, at.queue, at.layer - 1, at.phase);
    below.store = &at.stores->layer(at.layer - 1), below.stores = at.stores, below.read = at.read;
    const Num s = floor_div(index(), g), length = load(at.store->pages().length, index());
    const Num came = load(at.first, s + 1) - load(at.first, s);
    const Tensor first = compute(at.queue, Dtype::I32, {all}, floor_div(length - came, kPage)),
                 last = compute(at.queue, Dtype::I32, {all},
                                pick(load(at.queue.upload(chosen), index()), floor_div(length, kPage), 0)),
                 entry = compute(at.queue, Dtype::I32, {all}, load(first, index()) * kPage);
    const Ragged keys = apart(at.queue, kept_keys(below), kept_keys(at), entry),
                 values = apart(at.queue, stored_values(below), stored_values(at), entry);
    at.store->pair(at.queue, *below.store, first, last, 1, keys, values, float(t), pages);
    return true;
  }
};

}  // namespace

Entry minicache() {
  Entry e = entry<MiniCache>("minicache", "MiniCache: KV Cache Compression in Depth Dimension for Large Language Models",
                             "Liu et al., 2024, arXiv 2405.14366", 2024, uint8_t(Role::Keep));
  e.equation =
      "e = (sin((1 − t) Ω) x / ‖x‖ + sin(t Ω) y / ‖y‖) / sin Ω, Ω the angle of x and y of two layers; x ≈ ‖x‖ e, y ≈ "
      "‖y‖ e";
  e.needs = "pages that two layers hold; the same entries in both";
  e.identity = "minicache(from=1000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
