#include <algorithm>
#include <cmath>
#include <map>

#include "attention/clusters.h"
#include "attention/reads.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// PQCache (Zhang et al., 2024): product quantisation of a prompt's keys. Each half of a key's channels is a code, the
// nearest of a few centroids; logits are sums of two looked-up products, and a KV head reads the entries that its group
// pays most by them, besides sinks and a window. Entries that were generated have no code until the next prompt, and
// are always read.
struct PqCache final : Mechanism {
  double topk, recent;
  int sinks, centroids, rounds, first_dense;
  static constexpr int kHalves = 2;

  static std::vector<ParamInfo> params() {
    using M = PqCache;
    return {
        param(&M::topk, "topk", 0.05, 0, 1,
              "share of the prompt behind the sinks that is read by score, for each KV head"),
        param(&M::recent, "recent", 0.05, 0, 1, "and that is read as the latest entries"),
        param(&M::sinks, "sinks", 32, 0, 1 << 20, "first entries that are always read"),
        param(&M::centroids, "centroids", 64, 1, 1 << 16, "codes of each half"),
        param(&M::rounds, "rounds", 10, 0, 1000, "of k-means"),
        dense_layers_param(&M::first_dense, 0),
    };
  }

  Needs needs(const ModelInfo& model) const override {
    if (model.d % kHalves)
      throw Error(Code::Unsupported, "pqcache", "a head dim of " + std::to_string(model.d) + " has no halves");
    Needs n;
    n.columns = {{.name = "pqcache.code", .width = kHalves, .fill = -1}};
    return n;
  }

  /// Centroids of each sequence and layer, [halves · KV heads · centroids, d / 2]. Forks share them.
  struct Books final : State {
    std::map<std::pair<int, int>, std::shared_ptr<const Buffer>> of;  // by layer and sequence
    std::unique_ptr<State> clone() const override { return std::make_unique<Books>(*this); }
  };
  std::unique_ptr<State> open(const ModelInfo&) const override { return std::make_unique<Books>(); }

  /// One half of the channels of every row.
  static Ragged half(Queue& queue, const Ragged& x, int which) {
    const int64_t d = x.values.size[1], width = d / kHalves;
    Ragged out = x;
    out.values = queue.scratch.take(Dtype::F32, {x.values.size[0], width});
    compute(queue, load(x.values, place() * d + which * width + channel()), out.values);
    return out;
  }

  void observe(LayerView& at) const override {
    if (at.decoding() || at.phase == Phase::Replay || reads_all(at, first_dense)) return;
    Queue& queue = at.queue;
    const int64_t g = at.model.g, width = at.store->shape().d / kHalves;
    auto& books = static_cast<Books&>(at.state()).of;
    const Ragged keys = stored_keys(at), codes = at.column("pqcache.code");
    for (int s = 0; s < at.sequences(); ++s)
      if (at.rows[size_t(s)] > 0)
        books[{at.layer, s}] = std::make_shared<Buffer>(
            Dtype::F32, std::initializer_list<int64_t>{kHalves * g * centroids, width}, *queue.memory);
    for (int which = 0; which < kHalves; ++which) {
      const Scratch scratch(queue.scratch);
      const Ragged part = half(queue, keys, which);
      for (int64_t segment = 0; segment < keys.segments(); ++segment) {
        const int s = int(segment / g);
        if (at.rows[size_t(s)] == 0) continue;
        const Scratch inner(queue.scratch);
        const Clusters made = clustered(queue, segments(part, segment, segment + 1, 1), at.key_rows[size_t(segment)],
                                        centroids, rounds, false);
        const int64_t first = (which * g + segment % g) * centroids;
        const Tensor book = *books[{at.layer, s}];
        queue.move(made.centroids, book.slice(0, first, first + centroids));
        compute(queue, segments(codes, segment, segment + 1, 1),
                pick(channel() == which, load(made.labels, place()), load(codes.values, index())), codes.values);
      }
    }
    at.set_column("pqcache.code", codes);
  }

  Read read(LayerView& at) const override {
    if (reads_all(at, first_dense)) return {};
    Queue& queue = at.queue;
    const int64_t g = at.model.g, h = at.q.heads, group = at.model.group();
    const Ragged codes = at.column("pqcache.code");
    const Ragged logits = numbers(queue, at.q.segments(), length_of(codes, floor_div(index(), group)), h, codes.bound * group);
    compute(queue, logits, 0, logits.values);
    const float scale = at.scale();
    const auto code = [&](int which) {
      return load(codes.values, (begin_of(codes, floor_div(segment(), group)) + place()) * kHalves + which);
    };
    for (int which = 0; which < kHalves; ++which) {
      const Tensor tables = dot_tables(at, half(queue, at.q, which), which, scale);
      compute(queue, logits, load(logits.values, index()) + load(tables, segment() * centroids + code(which)), logits.values);
    }
    std::vector<int64_t> window, counts;
    for (int64_t length : at.prompt) {
      const double rest = double(std::max<int64_t>(0, length - sinks));
      window.push_back(int64_t(recent * rest));
      counts.push_back(sinks + std::max(window.back(), at.step() + 1) + int64_t(std::ceil(topk * rest - 1e-9)));
    }
    const Num latest = of_sequence(queue, window, segment(), h);
    compute(queue, logits,
            pick(code(0) < 0 || place() < sinks || place() >= length() - latest, -kInfinity, load(logits.values, index())),
            logits.values);
    const Ragged paid = over_group(at, softmax(queue, logits), Spread::Of::Sum);
    Ragged scores = codes;
    scores.values = queue.scratch.take(Dtype::F32, {codes.bound});
    const Num own = load(codes.values, index() * kHalves), recently = of_sequence(queue, window, segment(), g);
    compute(queue, scores,
            pick(own < 0 || place() < sinks || place() >= length() - recently, kInfinity,
                 load(paid.values, begin_of(paid, segment()) + place())),
            scores.values);
    return best_entries(at, Plan::Scope::KvHead, scores, counts);
  }

  /// q · c for every query head and centroid of its KV head: [query heads of all sequences · centroids].
  Tensor dot_tables(LayerView& at, const Ragged& q, int which, float scale) const {
    const int64_t g = at.model.g, h = q.heads;
    const auto& books = static_cast<Books&>(at.state()).of;
    const Grids out = grids(at.queue, q.segments(), 1, centroids);
    for (int s = 0; s < at.sequences(); ++s) {
      const auto book = books.find({at.layer, s});
      if (at.rows[size_t(s)] == 0 || book == books.end()) continue;
      Ragged keys = numbers(at.queue, g, centroids, g, g * centroids);
      keys.values = (*book->second)->slice(0, which * g * centroids, (which + 1) * g * centroids);
      Proxy dot;
      dot.scale = scale, dot.causal = false;
      const Grids part{segments(out.cells, s * h, (s + 1) * h, h), out.rows.slice(0, s * h, (s + 1) * h),
                       out.cols.slice(0, s * h, (s + 1) * h)};
      at.run().proxy(at.queue, segments(q, s * h, (s + 1) * h, h), keys, dot, part);
    }
    return out.cells.values;
  }
};

}  // namespace

Entry pqcache() {
  Entry e = entry<PqCache>("pqcache", "PQCache: Product Quantization-based KVCache for Long Context LLM Inference",
                           "Zhang et al., 2024, arXiv 2407.12820", 2024, uint8_t(Role::Read));
  e.equation =
      "logit_j = Σ over halves of q_s · c_s(code of k_j,s); read the top of Σ over the group of softmax, sinks and "
      "the latest";
  e.needs = "two numbers beside each entry, and 64 centroids for each half of a KV head's channels";
  e.identity = "pqcache(topk=1)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
