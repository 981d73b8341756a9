#include <algorithm>
#include <map>
#include <optional>

#include "attention/clusters.h"
#include "attention/reads.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

/// A prompt's keys in clusters by cosine, each entry with its cluster's number beside it. What is generated joins
/// none.
struct Clustered : Mechanism {
  int tokens, rounds, first_dense;
  int64_t apart = 0;  // latest entries of the prompt that join none

  virtual std::string label() const = 0;
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.columns = {{.name = label(), .fill = -1}};
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
    const Ragged keys = stored_keys(at), labels = at.column(label());
    for (int s = 0; s < at.sequences(); ++s) {
      if (at.rows[size_t(s)] == 0) continue;
      const auto inside = [&](int64_t head) { return std::max<int64_t>(0, at.key_rows[size_t(s * g + head)] - apart); };
      int64_t longest = 0;
      for (int64_t head = 0; head < g; ++head) longest = std::max(longest, inside(head));
      const int64_t count = std::max<int64_t>(1, longest / tokens);
      auto found = std::make_shared<Buffer>(Dtype::F32, std::initializer_list<int64_t>{g * count, d}, *queue.memory);
      for (int64_t head = 0; head < g; ++head) {
        const Scratch scratch(queue.scratch);
        const Ragged segment = segments(keys, s * g + head, s * g + head + 1, 1),
                     rows = segments(labels, s * g + head, s * g + head + 1, 1);
        const int64_t length = inside(head);
        if (length == 0) {
          compute(queue, rows, -1, labels.values);
          continue;
        }
        const Clusters made = clustered(queue, segment, length, count, rounds, true);
        queue.move(made.centroids, found->view().slice(0, head * count, (head + 1) * count));
        compute(queue, rows, pick(place() < length, load(made.labels, place()), -1), labels.values);
      }
      centroids[{at.layer, s}] = found;
    }
    at.set_column(label(), labels);
  }

  /// q · centroid of every query head of a sequence with those of its KV head, [h, 1, count]; nothing when there are
  /// none.
  std::optional<Grids> products(LayerView& at, int s) const {
    const int64_t g = at.model.g, h = at.q.heads;
    const auto& centroids = static_cast<Centroids&>(at.state()).of;
    const auto found = centroids.find({at.layer, s});
    if (at.rows[size_t(s)] == 0 || found == centroids.end()) return std::nullopt;
    const int64_t count = (*found->second)->size[0] / g;
    Ragged keys = numbers(at.queue, g, count, g, g * count);
    keys.values = *found->second;
    const Grids grid = grids(at.queue, h, 1, count);
    Proxy dot;
    dot.scale = 1, dot.causal = false;
    at.run().proxy(at.queue, segments(at.q, s * h, (s + 1) * h, h), keys, dot, grid);
    return grid;
  }
};

// ClusterKV (Liu et al., 2024): a prompt's keys are clustered by cosine, and a query reads the clusters whose
// centroid scores highest until the budget is full, the last one in part; sinks and generated entries besides. One
// choice for each KV head, from the sum over its group (the released code has one for each query head). What is
// generated forms no new clusters.
struct ClusterKV final : Clustered {
  Budget budget;
  int sinks;

  static std::vector<ParamInfo> params() {
    using M = ClusterKV;
    return {
        budget_param(&M::budget, "1024",
                     "prompt entries that a KV head reads, sinks among them; a fraction is of the prompt"),
        param(&M::sinks, "sinks", 16, 0, 1 << 20, "first entries that are always read"),
        param<M, int>(&M::tokens, "tokens", 80, 1, 1 << 20, "entries for each cluster, on average"),
        param<M, int>(&M::rounds, "rounds", 10, 0, 1000, "of k-means"),
        dense_layers_param<M>(&M::first_dense, 2),
    };
  }
  std::string label() const override { return "clusterkv.label"; }

  Read read(LayerView& at) const override {
    if (reads_all(at, first_dense)) return {};
    Queue& queue = at.queue;
    const int64_t g = at.model.g;
    const Ragged scores = at.column(label());
    for (int s = 0; s < at.sequences(); ++s) {
      const auto grid = products(at, s);
      if (!grid) continue;
      const Ragged summed = over_group(at, grid->cells, Spread::Of::Sum), entries = segments(scores, s * g, (s + 1) * g, g);
      const Num cluster = load(scores.values, index());
      compute(queue, entries,
              pick(place() < sinks || cluster < 0, kInfinity, load(summed.values, begin_of(summed, segment()) + cluster)),
              scores.values);
    }
    std::vector<int64_t> counts;
    for (int64_t length : at.prompt) counts.push_back(budget.entries(length) + at.step() + 1);
    return best_entries(at, Plan::Scope::KvHead, scores, counts);
  }
};

// Squeezed Attention (Hooper et al., 2024): a text that many questions share is clustered once. A centroid says what
// a query would pay each of its keys if they all stood there, and a query head reads the clusters whose keys get a
// threshold or more; the latest entries of the prompt and what was generated besides. k-means begins with keys spread
// evenly, the threshold is given, not found on a calibration text, and there is one level of clusters.
struct SqueezedAttention final : Clustered {
  double threshold;

  static std::vector<ParamInfo> params() {
    using M = SqueezedAttention;
    return {
        param(&M::threshold, "threshold", 1e-4, 0, 1, "share of a query's weight from which an entry's cluster is read"),
        param<M, int>(&M::tokens, "tokens", 20, 1, 1 << 20, "entries for each cluster, on average"),
        param<M, int64_t>(&M::apart, "recent", 100, 0, 1 << 30, "latest entries of the prompt, which are always read"),
        param<M, int>(&M::rounds, "rounds", 10, 0, 1000, "of k-means"),
        dense_layers_param<M>(&M::first_dense, 0),
    };
  }
  std::string label() const override { return "squeezed-attention.label"; }

  Read read(LayerView& at) const override {
    if (reads_all(at, first_dense)) return {};
    Queue& queue = at.queue;
    const int64_t g = at.model.g, h = at.q.heads, group = at.model.group();
    const float scale = at.scale();
    const Ragged labels = at.column(label());
    const auto cluster = [&](const Num& kv) { return load(labels.values, begin_of(labels, kv) + place()); };
    const Ragged logits = numbers(queue, at.q.segments(), length_of(labels, floor_div(index(), group)), h,
                                  labels.bound * group);
    compute(queue, logits, -kInfinity, logits.values);
    for (int s = 0; s < at.sequences(); ++s) {
      const auto grid = products(at, s);
      if (!grid) continue;
      const Num own = cluster(s * g + floor_div(segment(), group));
      compute(queue, segments(logits, s * h, (s + 1) * h, h),
              pick(own < 0, -kInfinity, scale * load(grid->cells.values, begin_of(grid->cells, segment()) + own)),
              logits.values);
    }
    const Ragged paid = softmax(queue, logits);
    return named_entries(at, Plan::Scope::QueryHead, logits,
                         cluster(floor_div(segment(), group)) < 0 || load(paid.values, index()) >= threshold);
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
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

Entry squeezed_attention() {
  Entry e = entry<SqueezedAttention>("squeezed-attention",
                                     "Squeezed Attention: Accelerating Long Context Length LLM Inference",
                                     "Hooper et al., 2024, arXiv 2411.09688", 2024, uint8_t(Role::Read));
  e.equation = "S_i = e^(q·c_i s) / Σ_j N_j e^(q·c_j s); read the clusters with S_i ≥ T, and the latest";
  e.needs = "a number beside each entry, and a centroid for every 20";
  e.identity = "squeezed-attention(threshold=0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
