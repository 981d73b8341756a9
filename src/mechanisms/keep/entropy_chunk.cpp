#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// ChunkKV behind a gate, as in kvpress: a chunk whose score is high because of a few tokens (low entropy) keeps those alone,
// and what that saves buys the best tokens elsewhere. All heads keep the same.
struct EntropyChunk final : KeepWrapper {
  int chunk, few;

  static std::vector<ParamInfo> params() {
    using M = EntropyChunk;
    return {
        param(&M::chunk, "chunk", 10, 1, 1 << 20, "entries that stay or go together; the last chunk may be shorter"),
        param(&M::few, "few", 4, 1, 1 << 20, "entries that a gated chunk keeps"),
    };
  }

  Ragged score(LayerView& at) const override {
    Queue& queue = at.queue;
    Ragged s = inner->score(at);
    auto write = [&](const Ragged& like, const Num& what) {
      Ragged out = like;
      out.values = queue.scratch.take(Dtype::F32, {like.values.size[0]});
      compute(queue, out, what, out.values);
      return out;
    };
    auto at_entry = [](const Ragged& x) { return load(x.values, index()); };
    // Entries that must stay count as a little better than the best.
    const Ragged forced = spread(queue, s, {.of = Spread::Of::Max, .over = Spread::Over::Heads});
    Ragged most = write(s, pick(at_entry(s) < kInfinity, at_entry(s), -kInfinity));
    most = combine(queue, spread(queue, most, {.of = Spread::Of::Max, .over = Spread::Over::Layer}), Combine::Finite, 0);
    s = write(s, min(at_entry(s), at_entry(most) + 1));
    s = spread(queue, s, {.of = Spread::Of::Sum, .over = Spread::Over::Heads});

    auto over_chunk = [&](const Ragged& x, Spread::Of of) { return spread(queue, x, {.of = of, .block = chunk}); };
    const Num size = min(chunk, length() - (place() - mod(place(), chunk)));
    const Ragged low = over_chunk(s, Spread::Of::Min), shifted = write(s, at_entry(s) - min(0, at_entry(low)));
    const Ragged sum = over_chunk(shifted, Spread::Of::Sum), p = write(s, at_entry(shifted) / (at_entry(sum) + 1e-8));
    const Ragged surprise = over_chunk(write(s, -1 * at_entry(p) * log(at_entry(p) + 1e-8)), Spread::Of::Sum);
    const Ragged entropy = write(s, pick(size > 1, clamp(at_entry(surprise) / log(size), 0, 1), 0));

    const Ragged worth = of_blocks(queue, over_chunk(s, Spread::Of::Mean), chunk),
                 spreads = of_blocks(queue, entropy, chunk);
    const Ragged rank = spread(queue, worth, {.of = Spread::Of::Rank}),
                 order = spread(queue, spreads, {.of = Spread::Of::Rank});
    auto median = [&](const Ragged& x, const Ragged& ranks) {  // the lower one of two
      const Num middle = at_entry(ranks) == floor_div(length() - 1, 2);
      return spread(queue, write(x, pick(middle, at_entry(x), -kInfinity)), {.of = Spread::Of::Max});
    };
    const Ragged worth_median = median(worth, rank), spreads_median = median(spreads, order);
    const Ragged gated = write(
        worth, at_entry(worth) >= at_entry(worth_median) && at_entry(spreads) < at_entry(spreads_median));

    // Whole chunks from the best one down, the best entries of each first; then the entries that gates left out.
    const Ragged inside = over_chunk(s, Spread::Of::Rank), top = spread(queue, s, {.of = Spread::Of::Max});
    const Num own = begin_of(worth, segment()) + floor_div(place(), chunk);
    const Ragged left_out = write(s, load(gated.values, own) > 0 && at_entry(inside) < size - few);
    const Num in_order = floor(max(0, at_entry(top))) + 1 + load(rank.values, own) * chunk + at_entry(inside);
    const Ragged out = write(s, pick(at_entry(left_out) > 0, at_entry(s), in_order));
    return combine(queue, forced, out, Combine::Forced);
  }
};

}  // namespace

Entry entropy_chunk() {
  Entry e = entry<EntropyChunk>("entropy-chunk", "ChunkKV behind an entropy gate, as in kvpress",
                                "kvpress 0.5, after Liu et al., 2025", 2025, uint8_t(Role::Keep));
  e.equation =
      "chunkkv, but of a chunk with score ≥ the median and entropy < the median only the best 4 entries; the rest "
      "of the budget to the best others";
  e.needs = "a keep policy inside";
  e.identity = "entropy-chunk(snapkv(budget=1.0))";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
