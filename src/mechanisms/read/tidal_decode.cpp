#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// TidalDecode (Yang et al., 2024): one early layer finds each head's best keys, one later layer finds them anew, and all
// other layers read what the last of these found. The newest token is always read and counts in the budget, as in the
// authors' kernels (their evaluation code lets it compete). A fraction is of the entries held.
struct TidalDecode final : Mechanism {
  Budget budget;
  int selection, correction;

  static std::vector<ParamInfo> params() {
    using M = TidalDecode;
    return {
        param(&M::budget, "budget", "budget", "1024", "entries ≥ 1, or a fraction: 0.1, 10%", "entries read by each query head"),
        param(&M::selection, "selection", 2, 0, 1 << 20, "layer that selects; those before it are dense"),
        param(&M::correction, "correction", 13, 0, 1 << 20, "later layer that selects anew (13 suits 32 layers); none if the model has no such layer"),
    };
  }

  struct Chosen final : State {
    Buffer index, count;
    int64_t capacity = 0;
    std::unique_ptr<State> clone() const override {
      auto out = std::make_unique<Chosen>();
      if (capacity > 0) {
        out->index = Buffer(Dtype::I32, {index->numel()}), out->count = Buffer(Dtype::I32, {count->numel()});
        copy(index, out->index), copy(count, out->count);
      }
      out->capacity = capacity;
      return out;
    }
  };

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.same_entries = true;
    return n;
  }
  std::unique_ptr<State> open(const ModelInfo&) const override { return std::make_unique<Chosen>(); }

  Read read(LayerView& at) const override {
    auto& chosen = static_cast<Chosen&>(*at.state);
    // A model too shallow to hand selections on selects in every layer and reads what it selected.
    const bool shallow = at.model.layers <= selection + 1;
    if (!shallow && at.layer < selection) return {};
    const bool selects = shallow || at.layer == selection || at.layer == correction;
    if (selects) choose(at, chosen);
    if ((selects && !shallow) || at.mods.window > 0) return {};
    Read read;
    read.plan = tokens_plan(at.queue, Plan::Scope::QueryHead, 1, chosen.index, chosen.count, chosen.capacity);
    return read;
  }

  void choose(LayerView& at, Chosen& chosen) const {
    const int64_t group = at.model.group();
    std::vector<int64_t> lengths;
    for (int64_t s = 0; s < at.q.segments(); ++s) lengths.push_back(at.store->length(s / group));
    Observe how;
    how.rows = Observe::Rows::Last, how.heads = Observe::Heads::Each, how.logits = true;
    const Ragged columns = at.observe(at.q, how);
    // [entries, group] of each KV head → one run of entries for each query head.
    const Ragged logits = numbers(at.queue, lengths, at.q.heads);
    for (int64_t s = 0; s < at.q.segments(); ++s) {
      const Tensor entries = columns.values.reshape({columns.bound, group}).slice(0, columns.begin(s / group), columns.end(s / group));
      copy(entries.select(1, s % group), logits.segment(s));
    }
    const Ragged rows = with_queries(at.queue, force(at.queue, logits, 0, 1), at.q);
    Select best;
    best.count = at.queue.scratch.take(Dtype::I32, {rows.segments()});
    chosen.capacity = 1;
    for (int64_t s = 0, row = 0; s < at.q.segments(); ++s) {
      if (at.q.length(s) == 0) continue;
      const int64_t count = std::min(budget.entries(lengths[size_t(s)]), lengths[size_t(s)]);
      best.count.at<int32_t>(row++) = int32_t(count);
      chosen.capacity = std::max(chosen.capacity, count);
    }
    chosen.index = Buffer(Dtype::I32, {rows.segments() * chosen.capacity}), chosen.count = Buffer(Dtype::I32, {rows.segments()});
    at.run().select(at.queue, rows, best, chosen.capacity, chosen.index, chosen.count);
  }
};

}  // namespace

Entry tidal_decode() {
  Entry e = entry<TidalDecode>("tidal-decode", "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention", "Yang et al., 2024, arXiv 2410.05076", 2024, uint8_t(Role::Read));
  e.equation = "layer 2 and a correction layer: dense, and I_h = top-B_j of q·k_j; other layers: attend over I_h";
  e.needs = "all entries in all layers: goes with no policy that drops some";
  e.identity = "tidal-decode(budget=1.0)";
  e.verified = {"identity", "formula", "model"};
  return e;
}

}  // namespace heed::mechanisms
