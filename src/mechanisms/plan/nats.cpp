#include "attention/inputs.h"
#include "attention/maps.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Neural Attention Search (Deng, 2025): a token is global for a KV head and seen by all that follow, local and seen
// up to the next global token, which sees it still, or sliding and seen by the next `window`. The type is the largest
// of three numbers that a trained layer gives it; the first token is global. A cache that drops what nobody will see
// gives the same.
struct Nats final : Mechanism {
  int64_t window;

  static std::vector<ParamInfo> params() {
    using M = Nats;
    return {param<M, int64_t>(&M::window, "window", 256, 0, 1000000000, "tokens behind a sliding one that see it")};
  }
  std::string check() const override { return heads.all() ? "" : "types are those of KV heads: leave out heads"; }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = n.same_entries = true;
    n.inputs = {"types [g, m, 3]: how global, local and sliding each token is"};
    return n;
  }

  Plan plan(LayerView& at) const override {
    causal_only(at, "nats");
    Queue& queue = at.queue;
    const int64_t rows = at.k.values.size[0], longest = longest_keys(at);
    const Tensor types = given(at, "types", "[g, m, 3]", {rows * 3});
    const auto type = [&](int64_t which) { return load(types, index() * 3 + which); };
    Ragged global = at.k;
    global.values = queue.scratch.take(Dtype::F32, {rows});
    compute(queue, at.k, place() == 0 || type(0) >= max(type(1), type(2)), global.values);
    const Lists globals = chosen(queue, global, flagged(), longest);
    const Num first = segment() * globals.capacity, end = first + load(globals.count, segment()),
              next = find(globals.index, first, end, place() + 1);
    const Tensor following = compute(queue, Dtype::I32, {rows}, 0);
    compute(queue, at.k, pick(next < end, load(globals.index, next), length() - 1), following);
    const Num local = load(at.k_pos, begin_of(at.k, segment()) + load(following, index())),
              sliding = load(at.k_pos, index()) + window;
    at.mods.until = queue.scratch.take(Dtype::I32, {rows});
    compute(queue, at.k, min(pick(load(global.values, index()), 1 << 30, pick(type(1) >= type(2), local, sliding)), 1 << 30),
            at.mods.until);
    return dense_plan(1, 1);
  }
};

}  // namespace

Entry nats() {
  Entry e = entry<Nats>("nats", "Neural Attention Search", "Deng, 2025, arXiv 2502.13251", 2025, uint8_t(Role::Plan));
  e.equation = "i sees j ≤ i iff j is global, or local and i ≤ the next global token, or sliding and i ≤ j + W";
  e.needs = "types of tokens from a trained projection: --input types=…";
  e.no_identity = "the types are an input; with all of them global it is dense";
  e.verified = {"formula", "bench"};
  return e;
}

}  // namespace heed::mechanisms
