#include <algorithm>

#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Trimmed Llama (Lee et al., 2025): every query head of the first layer names the keys that all queries together pay most,
// and all layers keep what any head has named, so that how much stays follows the text. Written for image features that
// cross-attention layers read; here it trims whatever a prompt's queries attend to.
struct TrimmedLlama final : KeepPolicy {
  static std::vector<ParamInfo> params() { return keep_params<TrimmedLlama>("0.25", "prompt"); }
  std::string check() const override { return heads.all() ? "" : "heads=" + heads.text + ": all heads keep the same"; }

  Needs needs(const ModelInfo& model) const override {
    Needs n;
    n.columns = {{.name = "trimmed.paid", .width = model.group()}};
    return n;
  }
  /// What the first layer keeps: a flag for each of its entries. Written anew, never changed: forks share it.
  struct Named final : State {
    std::shared_ptr<const Buffer> flags;
    std::unique_ptr<State> clone() const override { return std::make_unique<Named>(*this); }
  };
  std::unique_ptr<State> open(const ModelInfo&) const override { return std::make_unique<Named>(); }

  bool first(const LayerView& at) const { return at.layer == 0 || !layers.holds(at.layer - 1, at.model.layers); }

  void observe(LayerView& at) const override {
    if (at.phase == Phase::Replay || !first(at)) return;
    Observe how;
    how.rows = Observe::Rows::Sum, how.heads = Observe::Heads::Each;
    const Ragged now = at.observe(at.q, how, at.decoding() ? &at.read.plan : &at.plan);
    at.set_column("trimmed.paid", combine(at.queue, at.column("trimmed.paid"), now, Combine::Add));
  }

  Ragged score(LayerView& at) const override {
    Queue& queue = at.queue;
    auto& named = static_cast<Named&>(at.state());
    Ragged flags = at.per_entry();
    if (!first(at)) {
      compute(queue, flags, load(*named.flags, index()), flags.values);
      return flags;
    }
    const int64_t group = at.model.group();
    const Ragged paid = by_query_head(queue, at.column("trimmed.paid"), group);
    Select best;
    best.count = compute(queue, Dtype::I32, {paid.segments()}, granted(budget, length_of(paid, index())));
    const Lists lists = chosen(queue, paid, best, std::max<int64_t>(1, at.store->longest()));
    const Ragged wanted = paid;
    compute(queue, wanted, lists.has(segment(), place()), wanted.values);
    const Ragged any = spread(queue, wanted, {.of = Spread::Of::Max, .over = Spread::Over::Heads});
    compute(queue, flags, load(any.values, begin_of(any, segment() * group) + place()), flags.values);
    auto kept = std::make_shared<Buffer>(Dtype::F32, std::initializer_list<int64_t>{flags.bound}, *queue.memory);
    queue.move(flags.values, *kept);
    named.flags = std::move(kept);
    return flags;
  }
  bool unbounded() const override { return true; }
  Tensor allocate(const Allocation& a) const override { return passing(a, 1); }
};

}  // namespace

Entry trimmed_llama() {
  Entry e = entry<TrimmedLlama>("trimmed-llama", "Efficient LLaMA-3.2-Vision by Trimming Cross-attended Visual Features",
                                "Lee et al., 2025, arXiv 2504.00557", 2025, uint8_t(Role::Keep));
  e.equation = "all layers keep the union over the first layer's query heads of the top ρ of Σ_i P_ij";
  e.needs = "a number beside each entry for each query head";
  e.identity = "trimmed-llama(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
