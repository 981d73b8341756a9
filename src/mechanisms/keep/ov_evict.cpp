#include <algorithm>

#include "base/random.h"
#include "mechanisms/entries.h"
#include "mechanisms/keep/ov_blocks.h"

namespace heed::mechanisms {

namespace {

// The cache eviction of OpenVINO GenAI by its own score: votes add up, each divided (norm) by how many queries could give
// it.
struct OvEvict : OvBlocks {
  bool norm;

  static ParamInfo norm_param() {
    return param(&OvEvict::norm, "norm", true, "votes divided by how many queries could give them");
  }
  static std::vector<ParamInfo> params() { return block_params<OvEvict>({norm_param()}); }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.columns = {{"ov.votes"}, {"ov.voters"}};
    return n;
  }

  void observe(LayerView& at) const override {
    if (at.phase == Phase::Replay) return;
    Queue& queue = at.queue;
    Observe how;
    how.rows = Observe::Rows::Sum, how.heads = Observe::Heads::LayerMean;
    const Ragged votes = smoothed(at, at.observe(at.last_queries(rows), how, at.decoding() ? &at.read.plan : &at.plan)),
                 voters = at.per_entry();
    std::vector<int64_t> last;
    for (int64_t n : at.rows) last.push_back(std::min<int64_t>(n, rows));
    compute(queue, voters, min(of_sequence(queue, last, segment(), voters.heads), length() - place()), voters.values);
    // What an earlier part of the prompt voted is not of its last rows.
    at.set_column("ov.votes", at.decoding() ? combine(queue, at.column("ov.votes"), votes, Combine::Add) : votes);
    at.set_column("ov.voters", at.decoding() ? combine(queue, at.column("ov.voters"), voters, Combine::Add) : voters);
  }

  Ragged score(LayerView& at) const override {
    Ragged votes = at.column("ov.votes");
    if (norm) votes = combine(at.queue, votes, at.column("ov.voters"), Combine::Divide);
    return held(at, spread(at.queue, votes, {.of = Spread::Of::Sum, .block = block}));
  }
};

// KVCrush (Jha et al., 2025), as in OpenVINO GenAI: a few of the blocks that would go stay after all, so that what
// stays looks like what went. A block's entries are coded by whether they are in the better half, and blocks are
// taken evenly along their order of distance from an anchor. They come on top of the budget, and a cut waits until a
// block more than that is full (the engine cuts at the budget, and rescues none where fewer would go). The paper
// groups single tokens.
struct KvCrush final : OvEvict {
  int rescued;
  Choice anchor;

  static std::vector<ParamInfo> params() {
    using M = KvCrush;
    return block_params<M>({
        norm_param(),
        param(&M::rescued, "rescued", 4, 0, 1 << 16, "blocks that stay on top of the budget"),
        param(&M::anchor, "anchor", {"random", "zeros", "ones", "mean", "alternating"}, 0,
              "the code that blocks are compared with; random: the same draws in every layer and step"),
    });
  }

  Ragged score(LayerView& at) const override {
    const Ragged scores = OvEvict::score(at);
    if (rescued == 0) return scores;
    Queue& queue = at.queue;
    const int64_t all = scores.segments(), most = at.store->longest();
    const Ragged worth = numbers(queue, all, floor_div(length_of(scores, index()), block), scores.heads,
                                 scores.bound / block + all);
    compute(queue, worth, load(scores.values, begin_of(scores, segment()) + place() * block), worth.values);
    Select best;
    best.k = int64_t(budget.amount) / block;
    const Lists stay = chosen(queue, worth, best, std::max<int64_t>(1, most / block));
    const Num goes = stay.has(segment(), place()) == 0;

    // A bit for each entry of each block.
    const Ragged votes = between(queue, at.column("ov.votes"));
    Select half;
    half.count = compute(queue, Dtype::I32, {all}, floor_div(length_of(votes, index()), 2));
    const Lists high = chosen(queue, votes, half, std::max<int64_t>(1, most));
    Ragged code = worth;
    code.values = queue.scratch.take(Dtype::F32, {worth.values.size[0], block});
    compute(queue, code, goes * high.has(segment(), place() * block + channel() - sinks), code.values);
    const Ragged together = spread(queue, code, {.of = Spread::Of::Sum});
    const Num gone = length() - load(stay.count, segment());
    const Num to = anchor.value == 3 ? load(together.values, index()) > 0.5 * gone : load(anchors(queue), channel());
    compute(queue, code, abs(load(code.values, index()) - to), code.values);

    // Blocks that go in their order, the others behind them.
    const Ragged apart = row_dots(queue, code, code), order = apart;
    compute(queue, order, pick(goes, -1 * load(apart.values, index()), -1e30), order.values);
    const Ragged behind = spread(queue, order, {.of = Spread::Of::Rank});
    const Num number = length() - 1 - load(behind.values, index()), step = floor_div(gone, rescued);
    compute(queue, worth, goes && gone >= rescued && mod(number, step) == 0 && number < step * rescued, worth.values);
    const Num taken = load(worth.values,
                           begin_of(worth, segment()) + min(floor_div(place(), block), floor_div(length(), block) - 1));
    compute(queue, scores, pick(taken && load(scores.values, index()) < kInfinity, 1e30, load(scores.values, index())),
            scores.values);
    return scores;
  }

 protected:
  int beside() const override { return rescued * block; }
  Tensor anchors(Queue& queue) const {
    Random random(0);
    std::vector<float> bits;
    for (int i = 0; i < block; ++i) {
      const bool drawn = random.below(2) > 0;
      bits.push_back(anchor.value == 0 ? float(drawn) : anchor.value == 2 ? 1 : anchor.value == 4 ? float(i % 2) : 0);
    }
    return queue.upload(bits);
  }
};

}  // namespace

Entry ov_evict() {
  Entry e = entry<OvEvict>("ov-evict", "Cache eviction, as in OpenVINO GenAI", "Intel, OpenVINO GenAI", 2024,
                           uint8_t(Role::Keep));
  e.equation =
      "A_j += max over j … j + 6 of Σ over heads of P_j; while decoding evict the blocks of 32 with the lowest Σ A "
      "/ age";
  e.needs = "two numbers beside each entry";
  e.identity = "ov-evict(budget=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

Entry kvcrush() {
  Entry e = entry<KvCrush>(
      "kvcrush", "KVCrush: Key Value Cache Size-Reduction Using Similarity in Head-Behaviour, as in OpenVINO GenAI",
      "Jha et al., 2025, arXiv 2503.00022", 2025, uint8_t(Role::Keep));
  e.equation =
      "ov-evict; of the E blocks that go, by Hamming distance of their bits to an anchor, every ⌊E / b⌋-th of the "
      "first stays, b in all";
  e.needs = "two numbers beside each entry";
  e.identity = "kvcrush(budget=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
