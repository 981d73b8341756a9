#include <cmath>

#include "attention/maps.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// SampleAttention (Zhu et al., 2024), the form of the preprint: a share of the queries, spread evenly over the prompt, pays
// each key so much; the fewest keys that hold `alpha` of it are read by all queries, besides a window that grows with the
// text. What is read of a tile is what any query of it would read.
struct SampleAttention final : Mechanism {
  double alpha, rows, window;
  int tile;

  static std::vector<ParamInfo> params() {
    using M = SampleAttention;
    return {
        param(&M::alpha, "alpha", 0.95, 0, 1, "share of the sampled mass that the chosen keys hold"),
        param(&M::rows, "rows", 0.05, 1e-6, 1, "share of the queries that is sampled, the last one among them"),
        param(&M::window, "window", 0.08, 0, 1, "latest keys that a query sees, as a share of all"),
        param(&M::tile, "tile", 64, 1, 4096, "queries that read together"),
    };
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = true;
    return n;
  }

  Plan plan(LayerView& at) const override {
    causal_only(at, "sample_attention");
    if (at.mods.window > 0 || alpha >= 1) return dense_plan(tile, 1);  // a sliding window already bounds what is read
    Queue& queue = at.queue;
    const int64_t h = at.q.heads, longest = longest_keys(at);
    const Lists keys = lists(queue, at.q.segments(), longest);
    Select most;
    most.by = Select::By::TopP, most.p = float(alpha), most.at_least = 1;
    const auto look = [&](const Slice& s) {
      const int64_t first = s.sequence * h + s.kv_head * s.q.heads;
      choose(queue, sampled_mass(at, s), most, keys.part(first, first + s.q.heads));
    };
    each_slice(at, tile, look, Slices::Either);
    std::vector<int64_t> latest;  // of each sequence
    for (int64_t s = 0; s < at.sequences(); ++s)
      latest.push_back(std::max<int64_t>(1, int64_t(std::ceil(window * double(at.key_rows[size_t(s * at.k.heads)])))));
    KeySets read;
    read.tile = tile, read.keys = keys;
    read.local = compute(queue, Dtype::I32, {at.q.segments()}, of_sequence(queue, latest, index(), h));
    return united_keys(at, read, longest);
  }

  /// Σ of the exact weights of every stride-th query, counted back from the last, for each key and query head.
  Ragged sampled_mass(LayerView& at, const Slice& s) const {
    Queue& queue = at.queue;
    const int64_t stride = std::max<int64_t>(1, std::llround(1 / rows)), count = (s.n + stride - 1) / stride,
                  heads = s.q.heads, d = at.q.values.size[1];
    const Grids sum = grids(queue, heads, 1, s.m);
    const Scratch scratch(queue.scratch);
    const Ragged sample = numbers(queue, std::vector<int64_t>(size_t(heads), count), heads, d);
    const Num row = end_of(s.q, segment()) - 1 - (length() - 1 - place()) * stride;
    compute(queue, sample, load(s.q.values, row * d + channel()), sample.values);
    Proxy exact;  // a sampled query is the last of its tile
    exact.scale = at.mods.scale, exact.softcap = at.mods.softcap, exact.softmax = true, exact.q_tile = int(stride);
    exact.offset = s.m - count * stride;
    sum_columns(queue, sample, count, s.k, s.m, exact, sum);
    return sum.cells;
  }
};

}  // namespace

Entry sample_attention() {
  Entry e = entry<SampleAttention>("sample_attention",
                                   "SampleAttention: Near-Lossless Acceleration of Long Context LLM Inference with "
                                   "Adaptive Structured Sparse Attention",
                                   "Zhu et al., 2024, arXiv 2406.15486", 2024, uint8_t(Role::Plan));
  e.equation = "c_j = Σ over sampled rows of P_ij; read the smallest set with Σ c ≥ α of all, and i − j < ⌈r_w m⌉";
  e.needs = "the whole prompt";
  e.identity = "sample_attention(alpha=1)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
