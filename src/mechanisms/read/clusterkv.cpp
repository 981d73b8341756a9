#include <algorithm>
#include <map>

#include "attention/clusters.h"
#include "attention/reads.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// ClusterKV (Liu et al., 2024): a prompt's keys are clustered by cosine, and a query reads the clusters whose centroid
// scores highest until the budget is full, the last one in part; sinks and generated entries besides. One choice for
// each KV head, from the sum over its group (the released code has one for each query head). What is generated forms no
// new clusters.
struct ClusterKV final : Mechanism {
  Budget budget;
  int sinks, tokens, rounds, first_dense;

  static std::vector<ParamInfo> params() {
    using M = ClusterKV;
    return {
        budget_param(&M::budget, "1024",
                     "prompt entries that a KV head reads, sinks among them; a fraction is of the prompt"),
        param(&M::sinks, "sinks", 16, 0, 1 << 20, "first entries that are always read"),
        param(&M::tokens, "tokens", 80, 1, 1 << 20, "entries for each cluster, on average"),
        param(&M::rounds, "rounds", 10, 0, 1000, "of k-means"),
        dense_layers_param(&M::first_dense, 2),
    };
  }

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.columns = {{.name = "clusterkv.label", .fill = -1}};
    return n;
  }

  /// Centroids of each sequence and layer, [KV heads · count, d]. Forks share them.
  struct Centroids final : State {
    std::map<std::pair<int, int>, std::shared_ptr<const Buffer>> of;  // by layer and sequence
    std::unique_ptr<State> clone() const override { return std::make_unique<Centroids>(*this); }
  };
  std::unique_ptr<State> open(const ModelInfo&) const override { return std::make_unique<Centroids>(); }

  void observe(LayerView& at) const override {
    if (at.decoding() || at.phase == Phase::Replay || reads_all(at, first_dense)) return;
    Queue& queue = at.queue;
    const int64_t g = at.model.g, d = at.store->shape().d;
    auto& centroids = static_cast<Centroids&>(at.state()).of;
    const Ragged keys = stored_keys(at), labels = at.column("clusterkv.label");
    for (int s = 0; s < at.sequences(); ++s) {
      if (at.rows[size_t(s)] == 0) continue;
      const int64_t longest = *std::max_element(at.key_rows.begin() + s * g, at.key_rows.begin() + (s + 1) * g),
                    count = std::max<int64_t>(1, longest / tokens);
      auto found = std::make_shared<Buffer>(Dtype::F32, std::initializer_list<int64_t>{g * count, d}, *queue.memory);
      for (int64_t head = 0; head < g; ++head) {
        const Scratch scratch(queue.scratch);
        const Ragged segment = segments(keys, s * g + head, s * g + head + 1, 1);
        const Clusters made = clustered(queue, segment, at.key_rows[size_t(s * g + head)], count, rounds, true);
        queue.move(made.centroids, found->view().slice(0, head * count, (head + 1) * count));
        const Ragged rows = segments(labels, s * g + head, s * g + head + 1, 1);
        compute(queue, rows, load(made.labels, place()), labels.values);
      }
      centroids[{at.layer, s}] = found;
    }
    at.set_column("clusterkv.label", labels);
  }

  Read read(LayerView& at) const override {
    if (reads_all(at, first_dense)) return {};
    Queue& queue = at.queue;
    const int64_t g = at.model.g, h = at.q.heads;
    const auto& centroids = static_cast<Centroids&>(at.state()).of;
    const Ragged scores = at.column("clusterkv.label");
    for (int s = 0; s < at.sequences(); ++s) {
      const auto found = centroids.find({at.layer, s});
      if (at.rows[size_t(s)] == 0 || found == centroids.end()) continue;
      const int64_t count = (*found->second)->size[0] / g;
      Ragged keys = numbers(queue, g, count, g, g * count);
      keys.values = *found->second;
      const Grids grid = grids(queue, h, 1, count);
      Proxy dot;
      dot.scale = 1, dot.causal = false;
      at.run().proxy(queue, segments(at.q, s * h, (s + 1) * h, h), keys, dot, grid);
      const Ragged summed = over_group(at, grid.cells, Spread::Of::Sum), entries = segments(scores, s * g, (s + 1) * g, g);
      const Num label = load(scores.values, index());
      compute(queue, entries,
              pick(place() < sinks || label < 0, kInfinity, load(summed.values, begin_of(summed, segment()) + label)),
              scores.values);
    }
    std::vector<int64_t> counts;
    for (int64_t length : at.prompt) counts.push_back(budget.entries(length) + at.step() + 1);
    return best_entries(at, Plan::Scope::KvHead, scores, counts);
  }
};

}  // namespace

Entry clusterkv() {
  Entry e = entry<ClusterKV>("clusterkv",
                             "ClusterKV: Manipulating LLM KV Cache in Semantic Space for Recallable Compression",
                             "Liu et al., 2024, arXiv 2412.03213", 2024, uint8_t(Role::Read));
  e.equation = "clusters of cosine k-means in order of Σ over the group of q · centroid, until B entries are read";
  e.needs = "a number beside each entry, and a centroid for every 80";
  e.identity = "clusterkv(budget=1.0)";
  e.verified = {"identity", "formula", "model"};
  return e;
}

}  // namespace heed::mechanisms
