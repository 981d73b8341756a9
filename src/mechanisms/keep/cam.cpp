#include "base/random.h"

#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// CaM (Zhang et al., 2024), as in kvpress: of what goes while decoding, the values of entries that decoded tokens
// paid much are spread over the next entries that stay. Whether one is merged is drawn: with the share of what it was
// paid in what the entries of its window were paid on average. All heads keep the same. Nothing is merged behind a
// prompt, whose own queries do not count, so every entry that goes between cuts is a candidate.
struct Cam final : KeepWrapper {
  int window;
  int64_t seed;

  static std::vector<ParamInfo> params() {
    using M = Cam;
    return {
        param(&M::window, "window", 32, 1, 1 << 16, "next entries that stay, over which a value is spread"),
        param(&M::seed, "seed", 0, 0, 1000000000, "of the draws; layers and steps draw on their own"),
    };
  }

  Needs needs(const ModelInfo& model) const override {
    Needs n = inner->needs(model);
    n.columns.push_back({"cam.paid"});
    return n;
  }

  void observe(LayerView& at) const override {
    inner->observe(at);
    if (!at.decoding()) return;
    Observe how;
    how.rows = Observe::Rows::Sum, how.heads = Observe::Heads::GroupMean;
    at.set_column("cam.paid", combine(at.queue, at.column("cam.paid"), at.observe(at.q, how, &at.read.plan), Combine::Add));
  }

  Ragged score(LayerView& at) const override {
    return spread(at.queue, inner->score(at), {.of = Spread::Of::Mean, .over = Spread::Over::Heads});
  }

  void fold(LayerView& at, const Lists& kept) const override {
    inner->fold(at, kept);
    if (!at.decoding()) return;
    Queue& queue = at.queue;
    const int64_t d_v = at.store->shape().d_v;
    const Ragged paid = at.column("cam.paid"), values = stored_values(at), held = at.per_entry(), merged = at.per_entry();
    const auto written = [&](const Num& what) {
      const Tensor out = queue.scratch.take(Dtype::F32, {held.bound});
      compute(queue, held, what, out);
      return out;
    };
    // How many entries before each stay, and how many its window holds.
    const Num list = segment() * kept.capacity, count = load(kept.count, segment());
    const Tensor before = written(find(kept.index, list, list + count, place()) - list),
                 stays = written(kept.has(segment(), place()));
    const Num rank = load(before, index());
    const Tensor size = written(min(window, count - rank));

    compute(queue, held, load(stays, index()) * load(paid.values, index()), held.values);
    const Num end = pick(load(size, index()) > 0, load(kept.index, list + rank + load(size, index()) - 1) + 1, 0);
    const Tensor last = written(end);
    const Ragged mean = range_means(queue, held, held, place(), load(last, index()));
    const Num among_them = (load(last, index()) - place()) / max(1, load(size, index()));  // of all entries to those that stay
    const Tensor own = written(load(mean.values, index()) * among_them);
    const Num a = load(paid.values, index()), m = load(own, index());
    const Num p = pick(m > 0, min(1, a / m), a > 0), goes = load(stays, index()) == 0 && load(size, index()) > 0;
    compute(queue, merged, pick(goes && load(draws(at, held.bound), index()) < p, 1 / load(size, index()), 0), merged.values);

    const Ragged spread_out = combine(queue, values, merged, Combine::Multiply);
    const Tensor first = written(pick(rank >= window, load(kept.index, list + max(0, rank - window)) + 1, 0));
    const Num begin = load(first, index()), until = place() * load(stays, index());
    const Ragged more = range_means(queue, held, spread_out, begin, until);
    const Num row = floor_div(index(), d_v);
    compute(queue, values,
            load(values.values, index()) + load(more.values, index()) * (place() - load(first, row)) * load(stays, row),
            values.values);
    set_values(at, values);
  }

  /// Uniform numbers, one for each entry of each head.
  Tensor draws(LayerView& at, int64_t count) const {
    constexpr uint64_t own = 0xCA3;  // apart from what the inner policy may draw
    Random random(mixed({own, uint64_t(seed), uint64_t(at.layer), uint64_t(at.step())}));
    Buffer drawn(Dtype::F32, {count});
    for (float& x : drawn->span<float>()) x = float(random.uniform());
    return at.queue.upload(drawn);
  }
};

}  // namespace

Entry cam() {
  Entry e = entry<Cam>("cam", "CaM: Cache Merging for Memory-efficient LLMs Inference", "Zhang et al., 2024, ICML",
                       2024, uint8_t(Role::Keep));
  e.equation =
      "an entry i that goes adds v_i / w to the next w entries that stay, with probability A_i / mean of their A; A"
      " = Σ over decoded tokens of P";
  e.needs = "a keep policy inside that cuts while decoding: when=every(512)";
  e.identity = "cam(snapkv(budget=1.0))";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
