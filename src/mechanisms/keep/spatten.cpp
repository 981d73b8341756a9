#include <cmath>

#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// SpAtten's cascade token pruning (Wang et al., 2021): what a token is paid adds up over heads, layers and steps, and what
// a layer drops is dropped in all deeper layers too. As a keep policy: tokens leave the cache, not the residual stream, and
// layers share no work in the prompt; head and value pruning and progressive precision are not part of it. The first
// layers keep all, then the share that goes grows linearly, so that layers hold `budget` on average
// (below a budget of about 0.57 the deepest are down to one token, and the average is more).
struct Spatten final : KeepPolicy {
  double dense;

  static std::vector<ParamInfo> params() {
    using M = Spatten;
    return keep_params<M>(
        "0.7", "prompt",
        {param(&M::dense, "dense", 0.15, 0, 1, "share of the layers, the first, that keep all tokens")});
  }

  /// All tokens of the sequences, as the first layer holds them: what they were paid so far, and the layer that dropped
  /// them. Written anew in each layer, never changed: forks share it.
  struct Tokens final : State {
    int last = -1;  // layer of this step
    std::shared_ptr<const Buffer> offsets, position, paid, dropped;
    std::unique_ptr<State> clone() const override { return std::make_unique<Tokens>(*this); }
  };
  std::unique_ptr<State> open(const ModelInfo&) const override { return std::make_unique<Tokens>(); }

  int64_t entries(const Budget& b, const ModelInfo& m, int layer, int64_t length) const override {
    const double kept = double(b.entries(length)) / double(std::max<int64_t>(1, length));
    const int first = std::min(m.layers - 1, int(std::ceil(dense * m.layers)));
    if (kept >= 1 || layer < first) return 1 << 30;
    const double layers = m.layers - first, step = (1 - kept) * m.layers / (layers * (layers + 1) / 2);
    return std::max<int64_t>(1, std::llround(double(length) * std::max(0.0, 1 - step * (layer - first + 1))));
  }

  /// The number of the token that stands at `position` in the sequence of segment `s` of g.
  static Num token(const Tokens& t, const Num& s, int64_t g, const Num& position) {
    const Num sequence = floor_div(s, g);
    return find(*t.position, load(*t.offsets, sequence), load(*t.offsets, sequence + 1), position);
  }

  void observe(LayerView& at) const override {
    if (at.phase == Phase::Replay) return;
    Queue& queue = at.queue;
    auto& tokens = static_cast<Tokens&>(at.state());
    const int64_t g = at.store->shape().kv_heads, sequences = at.store->segments() / g;
    const Ragged places = stored_positions(at);
    auto made = [&](Dtype type, int64_t size) {
      return std::make_shared<Buffer>(type, std::initializer_list<int64_t>{size}, *queue.memory);
    };
    if (at.layer <= tokens.last || tokens.last < 0) {  // a new step: its tokens join
      const Tokens before = tokens;
      const Ragged heads = members(queue, places, g, 0);  // the first KV head stands for the sequence
      const auto offsets = made(Dtype::I64, sequences + 1);
      queue.run->offsets(queue, compute(queue, Dtype::I64, {sequences}, length_of(heads, index())), *offsets);
      const int64_t most = std::max<int64_t>(1, places.bound);
      Ragged all;
      all.offsets = *offsets, all.heads = 1, all.bound = most;
      const auto position = made(Dtype::F32, most), paid = made(Dtype::F32, most), dropped = made(Dtype::F32, most);
      const Num own = load(places.values, begin_of(heads, segment()) + place());
      compute(queue, all, own, *position);
      if (before.position) {
        const Num p = load(*position, index()), from = load(*before.offsets, segment()),
                  to = load(*before.offsets, segment() + 1);
        const Num was = holds(*before.position, from, to, p), old = find(*before.position, from, to, p);
        compute(queue, all, pick(was, load(*before.paid, old), 0), *paid);
        compute(queue, all, pick(was, load(*before.dropped, old), kInfinity), *dropped);
      } else {
        compute(queue, all, 0, *paid), compute(queue, all, kInfinity, *dropped);
      }
      tokens.offsets = offsets, tokens.position = position, tokens.paid = paid, tokens.dropped = dropped;
    }
    tokens.last = at.layer;
    Observe how;
    how.rows = Observe::Rows::Sum, how.heads = Observe::Heads::LayerMean;
    const Ragged now = at.observe(at.q, how, at.decoding() ? &at.read.plan : &at.plan);
    const auto paid = made(Dtype::F32, (*tokens.paid)->size[0]);
    Ragged all;
    all.offsets = *tokens.offsets, all.heads = 1, all.bound = (*paid)->size[0];
    const Num p = load(*tokens.position, index()), from = begin_of(now, segment() * g), to = end_of(now, segment() * g);
    const Num here = find(places.values, from, to, p);
    const Num more = pick(holds(places.values, from, to, p), load(now.values, here), 0) * at.model.h;
    compute(queue, all, load(*tokens.paid, index()) + more, *paid);
    tokens.paid = paid;
  }

  Ragged score(LayerView& at) const override {
    const auto& tokens = static_cast<const Tokens&>(at.state());
    const Ragged out = stored_positions(at);
    const Tensor which = compute(at.queue, Dtype::I64, {out.bound}, 0);
    compute(at.queue, out, token(tokens, segment(), out.heads, load(out.values, index())), which);
    const Num of = load(which, index());
    compute(at.queue, out, pick(load(*tokens.dropped, of) <= at.layer, -kInfinity, load(*tokens.paid, of)), out.values);
    return out;
  }

  // Which tokens this layer drops: those of the first KV head, since all score alike.
  void fold(LayerView& at, const Lists& kept) const override {
    auto& tokens = static_cast<Tokens&>(at.state());
    const Ragged places = stored_positions(at);
    const int64_t g = places.heads;
    const auto dropped = std::make_shared<Buffer>(Dtype::F32, std::initializer_list<int64_t>{(*tokens.paid)->size[0]},
                                                  *at.queue.memory);
    Ragged all;
    all.offsets = *tokens.offsets, all.heads = 1, all.bound = (*dropped)->size[0];
    const Num s = segment() * g, from = begin_of(places, s), to = end_of(places, s);
    const Tensor entry = compute(at.queue, Dtype::I64, {all.bound}, 0);
    compute(at.queue, all, find(places.values, from, to, load(*tokens.position, index())) - from, entry);
    const Num stays = kept.has(s, load(entry, index()));
    compute(at.queue, all, pick(stays, load(*tokens.dropped, index()), min(at.layer, load(*tokens.dropped, index()))),
            *dropped);
    tokens.dropped = dropped;
  }
};

}  // namespace

Entry spatten() {
  Entry e = entry<Spatten>("spatten",
                           "SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning",
                           "Wang et al., 2021, arXiv 2012.09852", 2021, uint8_t(Role::Keep));
  e.equation =
      "S_t += Σ over heads and queries of P_it in every layer and step; layer l keeps the top n_l of what layer l − "
      "1 kept";
  e.needs = "column sums of the whole prompt";
  e.identity = "spatten(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
