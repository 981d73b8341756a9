#include <limits>

#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// LagKV (Liang et al., 2025): how far an entry's channels scatter when measured by the range of the next partition. Ranks
// within a partition compete, so that each loses alike; raw scores suit adakv. The last whole partition and what follows
// have no next one: they stay, the latest first when even they do not fit, and with them all of a prompt of less than two
// partitions (kvpress; ties there are the sort's).
struct LagKV final : KeepPolicy {
  int sinks, lag;
  bool cross;

  static std::vector<ParamInfo> params() {
    using M = LagKV;
    return keep_params<M>(
        "1024", "prompt",
        {
            param(&M::sinks, "sinks", 4, 0, 1 << 20, "first entries that always stay"),
            param(&M::lag, "lag", 128, 1, 1 << 20, "entries of a partition"),
            param(&M::cross, "cross", false, "raw scores compete over all partitions instead of ranks"),
        });
  }
  std::string check() const override { return too_small(budget, sinks, "sinks"); }

  Spread partitions(Spread::Of of, int ahead) const {
    return {.of = of, .over = Spread::Over::Block, .block = lag, .first = sinks, .ahead = ahead};
  }

  /// softmax over a partition of the deviation over channels of (x − min) / (max − min), both of the partition ahead.
  Ragged scatter(Queue& queue, const Ragged& x) const {
    const Ragged low = spread(queue, x, partitions(Spread::Of::Min, 1)),
                 high = spread(queue, x, partitions(Spread::Of::Max, 1));
    const Ragged y = combine(queue, combine(queue, x, low, Combine::Add, -1),
                             combine(queue, high, low, Combine::Add, -1), Combine::Divide);
    Ragged one = y;
    const int64_t d = y.values.size[1];
    one.values = ones(queue, y.values.size[0], d);
    const Ragged mean = row_dots(queue, y, one, 1 / float(d));
    const Ragged centred = combine(queue, y, combine(queue, one, mean, Combine::Multiply), Combine::Add, -1);
    const Ragged deviation = combine(queue, row_dots(queue, centred, centred, 1 / float(std::max<int64_t>(1, d - 1))),
                                     Combine::Power, 0.5);
    return softmax(queue, deviation, partitions(Spread::Of::Sum, 0));
  }

  Ragged score(LayerView& at) const override {
    Ragged scores = combine(at.queue, scatter(at.queue, stored_keys(at)), scatter(at.queue, stored_values(at)), Combine::Add);
    const Ragged unmeasured = combine(at.queue, scores, Combine::Multiply, 0);  // NaN without a partition ahead, else 0
    if (!cross) scores = spread(at.queue, scores, partitions(Spread::Of::Rank, 0));
    else scores = combine(at.queue, scores, Combine::Multiply, 0.5);
    scores = combine(at.queue, scores, unmeasured, Combine::Add, 1);
    // Above every rank and every score, and above each other by age.
    const Ragged later = combine(at.queue, stored_positions(at), Combine::Add, float(1 << 20));
    return force(at.queue, combine(at.queue, scores, later, Combine::Finite), sinks, 0);
  }
};

}  // namespace

Entry lagkv() {
  Entry e = entry<LagKV>("lagkv", "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important",
                         "Liang et al., 2025, arXiv 2504.04704", 2025, uint8_t(Role::Keep));
  e.equation =
      "u_j = std_c((x_jc − min_c) / (max_c − min_c)), ranges of the next partition; s = softmax u of keys + of "
      "values, ranked in its partition";
  e.needs = "nothing";
  e.identity = "lagkv(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
