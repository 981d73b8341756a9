#include <limits>

#include "attention/inputs.h"
#include "attention/plans.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Gist tokens (Mu et al., 2023): a model is trained so that what follows `count` special tokens sees these and nothing that
// stands before them; a prompt in front of them is then worth no more entries than they are. The mask is that of training; behind
// the prompt what nobody sees any more goes, and gists keep their positions. One run of gists to a sequence: the first
// `count` tokens with the given number. `heed apply` knows no tokens and takes marks. With a model that was not trained for it
// the prompt is simply lost.
struct Gist final : KeepPolicy {
  int token, count;

  static std::vector<ParamInfo> params() {
    using M = Gist;
    return {
        param(&M::token, "token", -1, -1, std::numeric_limits<int>::max(),
              "number of the gist token; -1: there is none"),
        param(&M::count, "count", 1, 1, 1 << 20, "gists that stand for a prompt"),
        param(&M::when, "when", "when", "prompt", "prompt, chunk", "when what stands before them goes"),
    };
  }
  std::string check() const override {
    return when.decodes() ? "when=every(n) cuts while decoding, but gists stand in a prompt: when=prompt or when=chunk" : "";
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.columns = {{.name = "gist.mark"}};
    return n;
  }

  /// 1 for the gists among the entries.
  Ragged marks(LayerView& at) const {
    const Ragged out = at.column("gist.mark");
    const Num s = floor_div(segment(), at.store->shape().kv_heads), rows = load(at.first, s + 1) - load(at.first, s),
              fresh = place() - (length() - rows);
    if (at.ids)
      compute(at.queue, out,
              pick(fresh >= 0, load(at.ids, load(at.first, s) + max(0, fresh)) == token, load(out.values, index())),
              out.values);
    else if (is_given(at, "marks"))
      compute(at.queue, out, load(given(at, "marks", "[m]", {at.prompt[0]}), place()), out.values);
    return out;
  }
  /// For each entry, the places of its segment's first and last gist, where all of them are there; else −1.
  std::pair<Ragged, Ragged> ends(LayerView& at, const Ragged& marks) const {
    constexpr double kNone = 1e9;
    Queue& queue = at.queue;
    const Ragged so_far = at.per_entry(), first = at.per_entry(), last = at.per_entry();
    queue.run->scan(queue, marks, ones(queue, marks.values.size[0]), ScanKind::Linear, so_far.values);
    const Num gist = load(marks.values, index()) > 0.5, number = load(so_far.values, index());
    compute(queue, first, pick(gist, place(), kNone), first.values);
    compute(queue, last, pick(gist && number >= count, place(), kNone), last.values);
    const Ragged from = spread(queue, first, {.of = Spread::Of::Min}), to = spread(queue, last, {.of = Spread::Of::Min});
    const Num all = load(to.values, index()) < kNone;
    compute(queue, first, pick(all, load(from.values, index()), -1), first.values);
    compute(queue, last, pick(all, load(to.values, index()), -1), last.values);
    return {first, last};
  }

  Plan plan(LayerView& at) const override {
    const Ragged now = marks(at);
    at.set_column("gist.mark", now);
    const auto [first, last] = ends(at, now);
    const Num entry = begin_of(first, segment()) + place();
    see_until(at, heads,
              pick(place() < load(first.values, entry),
                   load(at.k_pos, begin_of(at.k, segment()) + load(last.values, entry)), kAlways));
    Plan dense;
    dense.causal = at.plan.causal;
    return dense;
  }

  bool unbounded() const override { return true; }
  Ragged score(LayerView& at) const override {
    const Ragged first = ends(at, at.column("gist.mark")).first;
    compute(at.queue, first, place() >= load(first.values, index()), first.values);
    return first;
  }
  Tensor allocate(const Allocation& a) const override { return passing(a, 0.5f); }
};

}  // namespace

Entry gist() {
  Entry e = entry<Gist>("gist", "Learning to Compress Prompts with Gist Tokens", "Mu et al., 2023, arXiv 2304.08467",
                        2023, Role::Plan | Role::Keep);
  e.equation = "i sees j ≤ i unless j < first gist and last gist < i; behind the prompt entries j < first gist go";
  e.needs = "a model trained with gist tokens, and the number of that token";
  e.identity = "gist";
  e.apply_inputs = {"marks [m]: 1 for a gist token, else 0"};
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
