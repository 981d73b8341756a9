#include <algorithm>
#include <vector>

#include "attention/maps.h"
#include "attention/reads.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// LycheeDecode (Lin et al., 2026): retrieval heads read all and name the entries with the highest mean logit over their
// group; a sparse head reads what the nearest retrieval head of its number in an earlier layer named. All heads of the
// first layer retrieve; which others do is given (the authors train gates for it). The newest entry is always named.
struct LycheeDecode final : Mechanism {
  Budget budget;
  Range retrieval;

  static std::vector<ParamInfo> params() {
    using M = LycheeDecode;
    return {
        budget_param(&M::budget, "1024", "entries that a sparse KV head reads; a fraction is of the prompt"),
        param(&M::retrieval, "retrieval", "range", "", "0-3, 2-, [0,4-7], last",
              "KV heads that retrieve, by number: layer · KV heads + head; none but the first layer's if empty"),
    };
  }

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.same_entries = true;
    return n;
  }

  struct Named final : State {
    std::shared_ptr<Buffer> index, count;  // I32 [segments · capacity], [segments]: made anew in every step
    int64_t capacity = 0;
    std::unique_ptr<State> clone() const override { return std::make_unique<Named>(); }
  };
  std::unique_ptr<State> open(const ModelInfo&) const override { return std::make_unique<Named>(); }

  /// Layers with a sliding window neither name nor read.
  static int first_layer(const ModelInfo& model) { return seeing_all(model, 0); }
  std::vector<int32_t> retrieving(const LayerView& at) const {
    std::vector<int32_t> out;
    const int g = at.model.g, first = first_layer(at.model);
    for (int head = 0; head < g; ++head)
      out.push_back((at.layer == first && at.model.layers > 1) ||
                    (!retrieval.all() && retrieval.holds(at.layer * g + head, at.model.layers * g)));
    return out;
  }

  Read read(LayerView& at) const override {
    if (at.mods.window > 0) return {};
    auto& named = static_cast<Named&>(at.state());
    const std::vector<int32_t> which = retrieving(at);
    const bool all = std::find(which.begin(), which.end(), 0) == which.end(), fresh = at.layer == first_layer(at.model),
               some = fresh || std::find(which.begin(), which.end(), 1) != which.end();
    const Tensor retrieves = at.queue.upload(which);
    if (some) name(at, named, retrieves, fresh);
    if (all) return {};
    // Sparse heads have what was named in their row, retrieval heads every entry.
    const int64_t g = at.model.g, capacity = some ? std::max(named.capacity, at.store->longest()) : named.capacity;
    const int64_t rows = plan_rows(at, 1) / at.model.group();
    const Tensor segments = compute(at.queue, Dtype::I32, {rows}, query_segment(at, index(), g));
    const auto segment_of = [&](const Num& row) { return load(segments, row); };
    const auto whole = [&](const Num& row) { return load(retrieves, mod(segment_of(row), g)); };
    const Lists read = lists(at.queue, rows, capacity);
    const Num row = floor_div(index(), capacity), entry = mod(index(), capacity);
    compute(at.queue,
            pick(whole(row), entry, load(*named.index, segment_of(row) * named.capacity + min(entry, named.capacity - 1))),
            read.index);
    compute(at.queue,
            pick(whole(index()), held_entries(at, segment_of(index()), g), load(*named.count, segment_of(index()))),
            read.count);
    Read out;
    out.plan = tokens_plan(at.queue, Plan::Scope::KvHead, 1, read.index, read.count, capacity);
    return out;
  }

  void name(LayerView& at, Named& named, const Tensor& retrieves, bool fresh) const {
    Queue& queue = at.queue;
    Observe how;
    how.rows = Observe::Rows::Last, how.heads = Observe::Heads::GroupMean, how.logits = true;
    const Ragged logits = force(queue, at.observe(at.q, how), 0, 1);
    const int64_t all = logits.segments(), g = at.model.g;
    if (fresh) {
      int64_t most = 1;
      for (int64_t length : at.prompt) most = std::max(most, budget.entries(length));
      named.capacity = std::min(most, at.store->longest());
      named.index = std::make_shared<Buffer>(Dtype::I32, std::initializer_list<int64_t>{all * named.capacity}, *queue.memory);
      named.count = std::make_shared<Buffer>(Dtype::I32, std::initializer_list<int64_t>{all}, *queue.memory);
    }
    std::vector<int64_t> counts;
    for (int64_t length : at.prompt) counts.push_back(budget.entries(length));
    Select best;
    best.count = compute(queue, Dtype::I32, {all}, of_sequence(queue, counts, index(), g));
    const Lists now = chosen(queue, logits, best, named.capacity);
    const auto takes = [&](const Num& segment) { return fresh ? Num(1) : load(retrieves, mod(segment, g)); };
    const Num at_entry = load(now.index, index()), at_count = load(now.count, index());
    compute(queue, pick(takes(floor_div(index(), named.capacity)), at_entry, load(*named.index, index())), *named.index);
    compute(queue, pick(takes(index()), at_count, load(*named.count, index())), *named.count);
  }
};

}  // namespace

Entry lychee_decode() {
  Entry e = entry<LycheeDecode>("lychee-decode",
                                "LycheeDecode: Accelerating Long-Context LLM Inference via Hybrid-Head Sparse Decoding",
                                "Lin et al., 2026, arXiv 2602.04541", 2026, uint8_t(Role::Read));
  e.equation = "retrieval heads: dense, I_h = top-k_j of mean over the group of q · k_j; sparse heads: attend over I_h";
  e.needs = "all entries in all layers, and which heads retrieve";
  e.identity = "lychee-decode(budget=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
