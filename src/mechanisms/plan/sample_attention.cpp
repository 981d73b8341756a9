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
    const Ragged mass = sampled_mass(at);
    Select most;
    most.by = Select::By::TopP, most.p = float(alpha), most.at_least = 1;
    const Lists keys = chosen(at.queue, mass, most, longest_keys(at));
    return marked_keys(at, tile, longest_keys(at), [&](const Slice& s, const Ragged& flags) {
      const int64_t first_head = s.sequence * at.q.heads + s.kv_head * s.q.heads,
                    local = std::max<int64_t>(1, int64_t(std::ceil(window * double(s.m))));
      mark(at.queue, flags, 1, in_band(s, tile, 0, local));
      mark(at.queue, flags, 1, keys.has(first_head + head_of_tile(s), place()));
    });
  }

  /// Σ of the exact weights of every stride-th query, counted back from the last, for each key and query head.
  Ragged sampled_mass(LayerView& at) const {
    const int64_t stride = std::max<int64_t>(1, std::llround(1 / rows)), h = at.q.heads, g = at.k.heads,
                  d = at.q.values.size[1];
    std::vector<int64_t> taken;  // of each segment
    std::vector<int64_t> rowptr{0};
    std::vector<int32_t> seen;
    for (int64_t s = 0; s < at.sequences(); ++s) {
      const int64_t count = (at.rows[size_t(s)] + stride - 1) / stride;
      taken.insert(taken.end(), size_t(h), count);
      for (int64_t head = 0; head < g; ++head)
        for (int64_t i = 0; i < count; ++i) {
          seen.push_back(0), seen.push_back(int32_t(at.key_rows[size_t(s * g + head)] - (count - 1 - i) * stride));
          rowptr.push_back(int64_t(seen.size()) / 2);
        }
    }
    const Ragged sample = numbers(at.queue, taken, h, d);
    const Num row = end_of(at.q, segment()) - 1 - (length() - 1 - place()) * stride;
    compute(at.queue, sample, load(at.q.values, row * d + channel()), sample.values);
    Plan each;  // a query sees the keys up to its own
    each.form = Plan::Form::Interval, each.scope = Plan::Scope::KvHead, each.causal = false;
    each.nnz_bound = rowptr.back();
    each.rowptr = at.queue.upload(rowptr), each.index = at.queue.upload(seen).reshape({each.nnz_bound, 2});
    Mods mods = at.mods;
    mods.q_pos = {};
    Observe sum;
    sum.rows = Observe::Rows::Sum, sum.heads = Observe::Heads::Each;
    Ragged paid = at.k;
    paid.values = at.queue.scratch.take(Dtype::F32, {at.k.bound, h / g});
    at.run().observe(at.queue, sample, {.panel = &at.k, .pages = nullptr, .read = nullptr}, &each, mods, sum, paid);
    return by_query_head(at.queue, paid, h / g);
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
  e.verified = {"identity", "formula", "model"};
  return e;
}

}  // namespace heed::mechanisms
