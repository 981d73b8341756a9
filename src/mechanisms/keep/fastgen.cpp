#include "attention/inputs.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// FastGen (Ge et al., 2023): behind a prompt every head is given the smallest of five kinds of cache that holds
// enough of what its rows paid: control tokens; punctuation too; the entries paid most too; the latest too;
// everything. While decoding the kind stays, and what it names is kept. A KV head is given what suffices for every
// query head of its group. Shares are of the prompt, and what an entry was paid is a sum over all queries so far, as
// H2O has it.
struct FastGen final : KeepPolicy {
  double recovered, frequent, local;

  static constexpr int kAll = 5;

  static std::vector<ParamInfo> params() {
    using M = FastGen;
    return {
        param(&M::when, "when", "when", "every(1)", "prompt, chunk, every(n)", "when the policy cuts"),
        param(&M::recovered, "recovered", 0.95, 1e-6, 1,
              "share of what is paid that a head must hold; 1: all entries stay"),
        param(&M::frequent, "frequent", 0.3, 0, 1, "share of the prompt that stays as entries paid most"),
        param(&M::local, "local", 0.3, 0, 1, "share of the prompt that stays as latest entries"),
    };
  }
  Needs needs(const ModelInfo& model) const override {
    Needs n;
    n.columns = {{"fastgen.token"}, {.name = "fastgen.paid", .width = model.group()}, {.name = "fastgen.kind", .fill = -1}};
    return n;
  }

  void observe(LayerView& at) const override {
    if (at.phase == Phase::Replay) return;
    Queue& queue = at.queue;
    Observe how;
    how.rows = Observe::Rows::Sum, how.heads = Observe::Heads::Each;
    const Ragged now = at.observe(at.q, how, at.decoding() ? &at.read.plan : &at.plan);
    at.set_column("fastgen.paid", combine(queue, at.column("fastgen.paid"), now, Combine::Add));
    const Ragged tokens = at.column("fastgen.token");
    if (at.ids && !at.model.token_classes.empty()) {
      const Num s = floor_div(segment(), tokens.heads), first = load(at.first, s), rows = load(at.first, s + 1) - first;
      const Num row = place() - (length() - rows), id = load(at.ids, first + row);
      compute(queue, tokens, pick(row >= 0, load(queue.upload(at.model.token_classes), id), load(tokens.values, index())),
              tokens.values);
    } else if (is_given(at, "tokens")) {
      compute(queue, tokens, load(given(at, "tokens", "[m]", {at.prompt[0]}), place()), tokens.values);
    }
    at.set_column("fastgen.token", tokens);
  }

  Ragged score(LayerView& at) const override {
    Queue& queue = at.queue;
    const int64_t group = at.model.group();
    const Ragged paid = by_query_head(queue, at.column("fastgen.paid"), group), token = at.column("fastgen.token"),
                 least = at.per_entry();  // the smallest kind of cache that holds an entry
    std::vector<int64_t> most, latest;
    for (const int64_t length : at.prompt)
      most.push_back(int64_t(frequent * double(length))), latest.push_back(int64_t(local * double(length)));
    Select best;
    best.count = compute(queue, Dtype::I32, {token.segments()}, of_sequence(queue, most, index(), token.heads));
    const Lists hitters = chosen(queue, over_runs(at, paid, Spread::Of::Sum), best,
                                 std::max<int64_t>(1, at.store->longest()));
    const Num kind = load(token.values, index());
    const Num near = place() >= length() - of_sequence(queue, latest, segment(), least.heads);
    compute(queue, least,
            pick(kind == double(TokenClass::Control), 1,
                 pick(kind == double(TokenClass::Punctuation), 2,
                      pick(hitters.has(segment(), place()), 3, pick(near, 4, kAll)))),
            least.values);
    const Ragged given_to = at.decoding() ? spread(queue, at.column("fastgen.kind"), {.of = Spread::Of::Max})
                                          : decided(at, paid, least);
    at.set_column("fastgen.kind", given_to);
    compute(queue, least, load(least.values, index()) <= load(given_to.values, index()), least.values);
    return least;
  }

  /// For each entry the kind of cache that its head is given.
  Ragged decided(LayerView& at, const Ragged& paid, const Ragged& least) const {
    Queue& queue = at.queue;
    const int64_t group = at.model.group();
    const Ragged part = shares(queue, paid), out = at.per_entry();
    compute(queue, out, kAll, out.values);
    for (int kind = kAll - 1; kind > 0 && recovered < 1; --kind) {
      const Num own = load(least.values, begin_of(least, floor_div(segment(), group)) + place());
      Ragged held = part;
      held.values = queue.scratch.take(Dtype::F32, {part.values.size[0]});
      compute(queue, part, pick(own <= kind, load(part.values, index()), 0), held.values);
      const Ragged lowest = over_runs(at, spread(queue, held, {.of = Spread::Of::Sum}), Spread::Of::Min);
      compute(queue, out, pick(load(lowest.values, index()) >= recovered, kind, load(out.values, index())), out.values);
    }
    return out;
  }

  bool unbounded() const override { return true; }
  Tensor allocate(const Allocation& a) const override { return passing(a, 1); }
};

}  // namespace

Entry fastgen() {
  Entry e = entry<FastGen>("fastgen", "Model Tells You What to Discard: Adaptive KV Cache Compression for LLMs",
                           "Ge et al., 2023, arXiv 2310.01801", 2023, uint8_t(Role::Keep));
  e.equation =
      "each head holds the first of {control} ⊂ … ∪ {punctuation} ⊂ … ∪ {top Σ_i P_ij} ⊂ … ∪ {latest} ⊂ all with Σ "
      "P over it ≥ T Σ P";
  e.needs =
      "the kinds of tokens (a model's vocabulary, or --input tokens=…); sums for each query head beside each entry";
  e.identity = "fastgen(recovered=1)";
  e.apply_inputs = {"tokens [m]: the class of each token"};
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
