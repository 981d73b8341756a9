#include <map>
#include <numbers>

#include "attention/clusters.h"
#include "attention/inputs.h"
#include "attention/reads.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "base/random.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// MagicPIG (Chen et al., 2024): attention estimated from a sample. Each of L tables hashes keys and queries by the
// sides of K random planes that they lie on, keys of the prompt's middle less their mean; a query head reads the keys
// that meet it in two tables or more, and since that happens with a probability w that their angle says, log w is
// taken off their logits. First entries, the latest of the prompt and what was generated are read as they are. As
// released, w counts 1e-4 more. The output is made by edit(): pages know no logit bias that depends on the query.
struct MagicPig final : Mechanism {
  int64_t sinks, local, seed;
  int tables, bits, every;

  static std::vector<ParamInfo> params() {
    using M = MagicPig;
    return {
        param(&M::tables, "tables", 150, 2, 4096, "hash tables"),
        param(&M::bits, "bits", 10, 1, 24, "random planes of each table"),
        param<M, int64_t>(&M::sinks, "sinks", 4, 0, 1 << 30, "first entries, which are always read"),
        param<M, int64_t>(&M::local, "local", 64, 0, 1 << 30, "latest entries of the prompt, which are always read"),
        param(&M::every, "dense", 16, 0, 1 << 20, "layers 0, n, 2n … read everything (in a model of several); 0: none"),
        param<M, int64_t>(&M::seed, "seed", 0, 0, 1000000000, "of the planes"),
    };
  }

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.columns = {{.name = "magicpig.codes", .width = tables, .fill = -1}, {.name = "magicpig.size"}};
    return n;
  }

  struct Hashes final : State {
    std::shared_ptr<const Buffer> planes;                // [tables · bits, d]
    std::map<int, std::shared_ptr<const Buffer>> means;  // for each layer: what keys were centred by, [segments, d]
    Buffer met;                                          // of this layer of this step: tables, [entries · group]
    std::unique_ptr<State> clone() const override {
      auto out = std::make_unique<Hashes>();
      out->planes = planes, out->means = means;
      return out;
    }
  };
  std::unique_ptr<State> open(const ModelInfo&) const override { return std::make_unique<Hashes>(); }

  bool whole(const LayerView& at) const {
    return reads_all(at, 0) || (every > 0 && at.layer % every == 0 && at.model.layers > 1);
  }

  void observe(LayerView& at) const override {
    if (at.decoding() || at.phase == Phase::Replay || whole(at)) return;
    Queue& queue = at.queue;
    const int64_t d = at.store->shape().d, all = at.store->segments();
    auto& own = static_cast<Hashes&>(at.state());
    if (!own.planes) {
      Random random{uint64_t(seed)};
      Buffer drawn(Dtype::F32, {int64_t(tables) * bits, d});
      for (float& x : drawn->span<float>()) x = float(random.normal());
      const auto planes = std::make_shared<Buffer>(
          Dtype::F32, std::initializer_list<int64_t>{int64_t(tables) * bits, d}, *queue.memory);
      queue.upload(drawn, *planes);
      own.planes = planes;
    }
    const Ragged keys = stored_keys(at), codes = at.column("magicpig.codes");
    const std::vector<int64_t> latest(at.rows.size(), local);
    const Ragged mean = mean_rows(queue, without_last(queue, without_first(queue, keys, sinks), latest));
    const auto fed = [&](const Num& s) { return length_of(at.q, s * at.model.group()) > 0; };
    auto& held = own.means[at.layer];
    const auto now = std::make_shared<Buffer>(Dtype::F32, std::initializer_list<int64_t>{all * d}, *queue.memory);
    compute(queue, pick(fed(floor_div(index(), d)), load(mean.values, index()), held ? load(*held, index()) : Num(0)), *now);
    held = now;
    Ragged centred = keys;
    centred.values = queue.scratch.take(Dtype::F32, {keys.values.size[0], d});
    compute(queue, keys, load(keys.values, index()) - load(*now, segment() * d + channel()), centred.values);
    const Tensor code = hashed(queue, centred.values, *own.planes, bits);
    const Num read_anyway = place() < sinks || place() >= length() - local;
    compute(queue, codes, pick(fed(segment()), pick(read_anyway, -1, load(code, index())), load(codes.values, index())),
            codes.values);
    at.set_column("magicpig.codes", codes);
    at.set_column("magicpig.size", row_norms(queue, centred));
  }

  Read read(LayerView& at) const override {
    auto& own = static_cast<Hashes&>(at.state());
    if (whole(at) || !own.means.contains(at.layer)) return {};
    Queue& queue = at.queue;
    const int64_t d = at.q.values.size[1], group = at.model.group();
    const Ragged codes = at.column("magicpig.codes");
    const Tensor rows = compute(queue, Dtype::F32, {at.q.segments(), d},
                                load(at.q.values, begin_of(at.q, place()) * d + channel()));
    // Codes of entries, and behind them those of the queries.
    const int64_t entries = codes.bound;
    const Tensor both = queue.scratch.take(Dtype::F32, {entries + at.q.segments(), tables});
    queue.move(codes.values, both.slice(0, 0, entries));
    queue.move(hashed(queue, rows, *own.planes, bits), both.slice(0, entries, both.size[0]));
    if (!own.met || own.met->numel() < entries * group)
      own.met = Buffer(Dtype::F32, {(entries + entries / 4) * group}, *queue.memory);
    Ragged met = codes;
    met.values = own.met->slice(0, 0, entries * group).reshape({entries, group});
    const Num entry = floor_div(index(), group) * tables, query = (entries + segment() * group + channel()) * tables;
    compute(queue, met, pick(load(both, entry) < 0, kInfinity, matches(both, entry, query, tables)), met.values);
    left_to_edit(at, heads);
    const Ragged tokens = by_query_head(queue, met, group);
    return named_entries(at, Plan::Scope::QueryHead, tokens, load(tokens.values, index()) >= 2);
  }

  Tensor edit(LayerView& at) const override {
    const auto& own = static_cast<Hashes&>(at.state());
    if (!at.decoding() || whole(at) || !own.means.contains(at.layer)) return at.out;
    Queue& queue = at.queue;
    const int64_t group = at.model.group();
    const Ragged keys = stored_keys(at), sizes = at.column("magicpig.size"), lengths = row_norms(queue, at.q);
    Ragged mean = heads_of(queue, *own.means.at(at.layer), keys.segments(), 1);
    mean.heads = keys.heads;
    // In one table they meet with probability p = (1 − θ/π)^K; w is that of two tables or more.
    const auto beside = [&](Ragged rows, Dtype type) {  // numbers for each query head
      rows.values = queue.scratch.take(type, {rows.values.size[0] * group}).reshape({rows.values.size[0], group});
      return rows;
    };
    const auto products = [&](const Ragged& rows) {
      const Ragged out = beside(rows, Dtype::F32);
      Observe how;
      how.rows = Observe::Rows::Last, how.heads = Observe::Heads::Each, how.logits = true;
      Mods dot;
      dot.scale = 1;
      at.run().observe(queue, at.q, {.panel = &rows, .pages = nullptr, .read = nullptr}, nullptr, dot, how, out);
      return out;
    };
    const Ragged with_keys = products(keys), with_mean = products(mean), once = beside(keys, Dtype::F64),
                 twice = beside(keys, Dtype::F64), bias = beside(keys, Dtype::F32);
    const Num size = load(sizes.values, floor_div(index(), group)) *
                     load(lengths.values, begin_of(at.q, segment() * group + channel()));
    const Num product = load(with_keys.values, index()) - load(with_mean.values, segment() * group + channel()),
              cosine = clamp(product / max(size, 1e-30), -1, 1);
    compute(queue, once, exp(bits * log(1 - acos(cosine) / std::numbers::pi)), once.values);
    const Num p = load(once.values, index()), never = log1p(0 - p), met = load(own.met, index());
    compute(queue, twice, 1 - exp(tables * never) - tables * p * exp((tables - 1) * never), twice.values);
    const Num off = 0 - log(load(twice.values, index()) + 1e-4);
    compute(queue, bias, pick(met == kInfinity, 0, pick(met >= 2, off, -kInfinity)), bias.values);
    return biased_output(at, heads, keys, bias.values);
  }
};

}  // namespace

Entry magicpig() {
  Entry e = entry<MagicPig>("magicpig", "MagicPIG: LSH Sampling for Efficient LLM Generation",
                            "Chen et al., 2024, arXiv 2410.16179", 2024, Role::Read | Role::Edit);
  e.equation =
      "read j that meets q in two of L tables; logit q·k_j s − log w, p = (1 − θ/π)^K, w = 1 − (1 − p)^L − L p (1 − "
      "p)^(L−1)";
  e.needs = "a number beside each entry for each table, and one more";
  e.identity = "magicpig(local=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
