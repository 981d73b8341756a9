#include "attention/maps.h"
#include "attention/plans.h"
#include "attention/reads.h"
#include "attention/rotation.h"
#include "attention/scores.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Dual chunk attention (An et al., 2024): text stands in chunks of s = c − w positions, and keys keep their place inside
// theirs. A query stands at its own place for keys of its chunk, s further on, but no further than c, for those of the chunk
// before (the latest w keys are so at their true distance), and at the chunk's last such place for all older ones: no
// distance exceeds c, however long the text. One softmax over the three parts; in prompts they are read apart and merged
// by their lse. Layers with a sliding window are left alone, and what others gather of attention is that of true distances.
struct DualChunk final : Mechanism {
  int64_t farthest, local;

  static std::vector<ParamInfo> params() {
    using M = DualChunk;
    return {
        param<M, int64_t>(
            &M::farthest, "chunk", 0, 0, 1 << 30,
            "c, the longest distance between a query and a key; 0: three quarters of the trained context"),
        param<M, int64_t>(&M::local, "local", 0, 0, 1 << 30,
                          "w ≤ c / 2, latest keys that stand at their true distance; 0: a twelfth of c"),
    };
  }
  std::string check() const override {
    // Beyond that, latest keys would stand in a third chunk.
    if (farthest > 0 && local > farthest / 2)
      return "local=" + std::to_string(local) + " is more than half of chunk=" + std::to_string(farthest);
    return whole_groups(heads);
  }

  /// c and s of a model; c = 0: nothing is known to go by.
  struct Sizes {
    int64_t c, s;
  };
  Sizes sizes(const ModelInfo& m) const {
    const int64_t c = farthest > 0 ? farthest : m.context * 3 / 4, w = local > 0 ? local : c / 12;
    return {c, std::max<int64_t>(1, c - w)};
  }
  Needs needs(const ModelInfo& m) const override {
    const int64_t c = sizes(m).c;
    require(c == 0 || local <= c / 2, "dca",
            "local=" + std::to_string(local) + " is more than half of the longest distance, " + std::to_string(c),
            "give a smaller local, or chunk=");
    Needs n;
    n.plain_keys = true;
    if (layers.all() && heads.all() && m.context >= c) n.reach = 1 << 30;
    return n;
  }
  bool leaves_alone(const LayerView& at) const { return sizes(at.model).c == 0 || at.model.window(at.layer) > 0; }

  Plan plan(LayerView& at) const override {
    Plan dense;
    dense.causal = at.plan.causal;
    if (leaves_alone(at)) return dense;
    causal_only(at, "dca");
    return replaced(at, heads, 1, 1);
  }

  Tensor edit(LayerView& at) const override {
    if (at.decoding() || leaves_alone(at)) return at.out;
    const auto [c, s] = sizes(at.model);
    Queue& queue = at.queue;
    const int64_t rows = at.out.size[0], d_v = at.out.size[1], keys = at.k.values.size[0], per = at.q.heads / at.k.heads;
    const Tensor outs = queue.scratch.take(Dtype::F32, {3, rows, d_v}),
                 sums = queue.scratch.take(Dtype::F32, {3, rows}), out = queue.scratch.take(Dtype::F32, {rows, d_v});
    const Num i = load(at.q_pos, index()), j = load(at.k_pos, index()), kv = floor_div(segment(), per);
    /// The first key of the query's own chunk, or of one before it, for every query.
    const auto first_of = [&](int64_t before) {
      const Tensor first = queue.scratch.take(Dtype::I32, {rows});
      const Num begin = begin_of(at.k, kv);
      compute(queue, at.q, find(at.k_pos, begin, end_of(at.k, kv), (floor_div(i, s) - before) * s) - begin, first);
      return load(first, index());
    };
    const Num own = first_of(0), previous = first_of(1);
    Mods mods = at.mods;
    mods.gain = {};
    const auto read = [&](int64_t part, const Ragged& q, const Ragged& k, const KeyRange& range) {
      const Plan seen = ranges_plan(queue, Plan::Scope::QueryHead, 1, rows, range);
      at.run().attend(queue, q, k, at.v, seen, mods, outs.select(0, part), sums.select(0, part));
    };
    read(0, at.q, at.k, {own, keys});
    mods.sink_logits = {};
    const Rope* rope = at.model.rope(at.layer);
    const auto moved = [&](const Ragged& x, const Num& by) {
      return rope ? turned(queue, x, *rope, compute(queue, Dtype::I32, {x.values.size[0]}, by)) : x;
    };
    const Ragged k = moved(in_f32(queue, at.k), mod(j, s) - j);
    read(1, moved(at.q, min(mod(i, s) + s, c) - i), k, {previous, own});
    read(2, moved(at.q, std::min(2 * s - 1, c) - i), k, {0, previous});
    queue.run->merge(queue, outs, sums, out, {});
    return out;
  }

  Read read(LayerView& at) const override {
    if (leaves_alone(at)) return {};
    const auto [c, s] = sizes(at.model);
    const Tensor stands = compute(at.queue, Dtype::I32, {at.store->segments()},
                                  load(at.q_pos, begin_of(at.q, floor_div(index(), at.model.g) * at.q.heads)));
    const Num i = load(stands, segment()), j = load(stored_positions(at).values, index());
    const Num apart = floor_div(i, s) - floor_div(j, s);  // chunks
    const Num place = pick(apart == 1, min(mod(i, s) + s, c), std::min(2 * s - 1, c)) - mod(j, s);
    Read read;
    read.places = entry_places(at, pick(apart < 1, j, i - place));
    return read;
  }
};

}  // namespace

Entry dca() {
  Entry e = entry<DualChunk>("dca", "Training-Free Long-Context Scaling of Large Language Models",
                             "An et al., 2024, arXiv 2402.17463", 2024, Role::Plan | Role::Edit | Role::Read);
  e.equation =
      "s = c − w; key at j mod s; query at i mod s for its own chunk, min(i mod s + s, c) for the one before, "
      "min(2s − 1, c) for older ones; one softmax";
  e.needs = "keys kept before rotation; in prompts attention in three parts";
  e.identity = "dca(chunk=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
