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
        budget_param(&M::budget, "1024", "entries read by each query head"),
        param(&M::selection, "selection", 2, 0, 1 << 20, "layer that selects; those before it are dense"),
        param(&M::correction, "correction", 13, 0, 1 << 20,
              "later layer that selects anew (13 suits 32 layers); none if the model has no such layer"),
    };
  }

  struct Chosen final : State {
    Buffer index, count;
    int64_t capacity = 0;
    std::unique_ptr<State> clone() const override { return std::make_unique<Chosen>(); }  // made anew in every step
  };

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.same_entries = true;
    return n;
  }
  std::unique_ptr<State> open(const ModelInfo&) const override { return std::make_unique<Chosen>(); }

  Read read(LayerView& at) const override {
    auto& chosen = static_cast<Chosen&>(at.state());
    // A model too shallow to hand selections on selects in every layer and reads what it selected.
    const bool shallow = at.model.layers <= selection + 1;
    if (!shallow && at.layer < selection) return {};
    const bool selects = shallow || at.layer == selection || at.layer == correction;
    if (selects) choose(at, chosen);
    if ((selects && !shallow) || at.mods.window > 0) return {};
    Read read;
    const int64_t rows = plan_rows(at, 1);
    read.plan = tokens_plan(at.queue, Plan::Scope::QueryHead, 1, chosen.index->slice(0, 0, rows * chosen.capacity),
                            chosen.count->slice(0, 0, rows), chosen.capacity);
    return read;
  }

  void choose(LayerView& at, Chosen& chosen) const {
    const int64_t group = at.model.group(), longest = at.store->longest();
    Observe how;
    how.rows = Observe::Rows::Last, how.heads = Observe::Heads::Each, how.logits = true;
    const Ragged logits = by_query_head(at.queue, at.observe(at.q, how), group);
    const Ragged rows = with_queries(at, force(at.queue, logits, 0, 1));
    const Num held = load(at.store->pages().length, floor_div(query_segment(at, index()), group));
    Select best;
    best.count = compute(at.queue, Dtype::I32, {rows.segments()}, granted(budget, held));
    chosen.capacity = std::max<int64_t>(1, std::min(budget.entries(longest), longest));
    grow(at, chosen.index, rows.segments() * chosen.capacity), grow(at, chosen.count, rows.segments());
    at.run().select(at.queue, rows, best, chosen.capacity, chosen.index->slice(0, 0, rows.segments() * chosen.capacity),
                    chosen.count->slice(0, 0, rows.segments()));
  }

  static void grow(LayerView& at, Buffer& buffer, int64_t size) {
    if (!buffer || buffer->numel() < size) buffer = Buffer(Dtype::I32, {size + size / 4}, *at.queue.memory);
  }
};

}  // namespace

Entry tidal_decode() {
  Entry e = entry<TidalDecode>("tidal-decode",
                               "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
                               "Yang et al., 2024, arXiv 2410.05076", 2024, uint8_t(Role::Read));
  e.equation = "layer 2 and a correction layer: dense, and I_h = top-B_j of q·k_j; other layers: attend over I_h";
  e.needs = "all entries in all layers: goes with no policy that drops some";
  e.identity = "tidal-decode(budget=1.0)";
  e.verified = {"identity", "formula", "model"};
  return e;
}

}  // namespace heed::mechanisms
