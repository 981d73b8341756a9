#include <algorithm>

#include "attention/reads.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// TriForce's retrieval cache (Sun et al., 2024), with which a model drafts for itself: behind a prompt each query
// head takes the chunks whose mean key its last query likes best, the first chunk among them, and reads these from
// then on, with what is generated (the released cache overwrites its last chunks with that). Tokens behind the last
// whole chunk are read too. The speculation around it, which makes the whole lossless, is no business of attention.
struct TriForce final : Mechanism {
  Budget budget;
  int chunk, first_dense;

  static std::vector<ParamInfo> params() {
    using M = TriForce;
    return {
        budget_param(&M::budget, "4096", "entries of the chunks that a query head takes; a fraction is of those held"),
        param(&M::chunk, "chunk", 8, 1, 1 << 20, "entries of a chunk"),
        dense_layers_param(&M::first_dense, 0),
    };
  }

  Needs needs(const ModelInfo& model) const override {
    Needs n;
    n.columns = {{.name = "triforce.taken", .width = model.group(), .fill = 1}};
    return n;
  }

  void observe(LayerView& at) const override {
    if (at.decoding() || at.phase == Phase::Replay || reads_all(at, first_dense)) return;
    Queue& queue = at.queue;
    const int64_t group = at.model.group();
    const Ragged keys = stored_keys(at), last = at.last_queries(1),
                 mean = spread(queue, keys, {.of = Spread::Of::Mean, .block = chunk});
    Ragged likes = at.per_entry(group);
    likes.values = likes.values.reshape({likes.bound, group});
    for (int64_t member = 0; member < group; ++member) {
      const Scratch scratch(queue.scratch);
      const Ragged like = dots(queue, members(queue, last, group, member), mean);
      compute(queue, keys, load(like.values, index()), likes.values.select(1, member));
    }
    const Ragged runs = by_query_head(queue, likes, group);
    const Ragged score = numbers(queue, runs.segments(), floor_div(length_of(runs, index()), chunk), runs.heads, runs.bound);
    compute(queue, score, load(runs.values, begin_of(runs, segment()) + place() * chunk), score.values);
    Select best;
    best.count = compute(queue, Dtype::I32, {runs.segments()},
                         max(1, floor_div(granted(budget, length_of(runs, index())), chunk)));
    const Lists found = chosen(queue, force(queue, score, 1, 0), best, at.store->longest() / chunk + 1);
    const Ragged taken = at.column("triforce.taken");
    const Num fed = length_of(at.q, segment() * group) > 0, behind = place() >= floor_div(length(), chunk) * chunk,
              own = found.has(segment() * group + channel(), floor_div(place(), chunk));
    compute(queue, taken, pick(fed, own || behind, load(taken.values, index())), taken.values);
    at.set_column("triforce.taken", taken);
  }

  Read read(LayerView& at) const override {
    if (reads_all(at, first_dense)) return {};
    const Ragged taken = by_query_head(at.queue, at.column("triforce.taken"), at.model.group());
    return named_entries(at, Plan::Scope::QueryHead, taken, load(taken.values, index()) > 0.5);
  }
};

}  // namespace

Entry triforce() {
  Entry e = entry<TriForce>(
      "triforce", "TriForce: Lossless Acceleration of Long Sequence Generation with Hierarchical Speculative Decoding",
      "Sun et al., 2024, arXiv 2404.11912", 2024, uint8_t(Role::Read));
  e.equation = "behind the prompt: chunk 0 and the top B / 8 − 1 of q_last · mean key; read those and what came since";
  e.needs = "a number beside each entry for each query head";
  e.identity = "triforce(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
