#include "attention/maps.h"
#include "attention/plans.h"
#include "attention/reads.h"
#include "attention/rotation.h"
#include "attention/scores.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Self-Extend (Jin et al., 2024), in its exact form: keys within the window stand at their true distance, those
// beyond it at positions divided by the group's size, so that no distance leaves the range that the model was trained
// for; one softmax over both. In prompts the two parts are read apart and merged. (llama.cpp's form divides positions
// in place, once for good.) Layers with a sliding window are left alone, and what others gather of attention is that
// of true distances.
struct SelfExtend final : Mechanism {
  int group;
  int64_t window;

  static std::vector<ParamInfo> params() {
    using M = SelfExtend;
    return {
        param(&M::group, "group", 8, 1, 1 << 16, "positions that become one beyond the window; 1: the model itself"),
        param<M, int64_t>(&M::window, "window", 1024, 1, 1 << 30, "latest keys, which stand where they do"),
    };
  }
  std::string check() const override { return whole_groups(heads); }
  Needs needs(const ModelInfo& m) const override {
    Needs n;
    n.plain_keys = true;
    if (layers.all() && m.context > window) n.reach = window + (m.context - window) * group;
    return n;
  }

  bool leaves_alone(const LayerView& at) const { return group == 1 || at.model.window(at.layer) > 0; }
  /// Where a query stands for keys beyond the window.
  Num query_place(const Num& i) const { return floor_div(i, group) + window - window / group; }

  Plan plan(LayerView& at) const override {
    Plan dense;
    dense.causal = at.plan.causal;
    if (leaves_alone(at)) return dense;
    causal_only(at, "self-extend");
    return replaced(at, heads, 1, 1);
  }

  Tensor edit(LayerView& at) const override {
    if (at.decoding() || leaves_alone(at)) return at.out;
    Queue& queue = at.queue;
    const int64_t rows = at.out.size[0], d_v = at.out.size[1], keys = at.k.values.size[0], per = at.q.heads / at.k.heads;
    const Tensor outs = queue.scratch.take(Dtype::F32, {2, rows, d_v}),
                 sums = queue.scratch.take(Dtype::F32, {2, rows}), out = queue.scratch.take(Dtype::F32, {rows, d_v});
    Mods near = at.mods;
    near.gain = {};
    Mods far = near;
    near.window = window, far.sink_logits = {};
    at.run().attend(queue, at.q, at.k, at.v, Plan(), near, outs.select(0, 0), sums.select(0, 0));

    Ragged q = at.q, k = in_f32(queue, at.k);
    if (const Rope* rope = at.model.rope(at.layer)) {
      const Num i = load(at.q_pos, index()), j = load(at.k_pos, index());
      q = turned(queue, q, *rope, compute(queue, Dtype::I32, {rows}, query_place(i) - i));
      k = turned(queue, k, *rope, compute(queue, Dtype::I32, {keys}, floor_div(j, group) - j));
    }
    const Tensor seen = queue.scratch.take(Dtype::I32, {rows});
    const Num kv = floor_div(segment(), per), first = begin_of(k, kv);
    compute(queue, q, find(at.k_pos, first, end_of(k, kv), load(at.q_pos, index()) - window + 1) - first, seen);
    const Plan beyond = ranges_plan(queue, Plan::Scope::QueryHead, 1, rows, {0, load(seen, index())});
    at.run().attend(queue, q, k, at.v, beyond, far, outs.select(0, 1), sums.select(0, 1));
    queue.run->merge(queue, outs, sums, out, {});
    return out;
  }

  Read read(LayerView& at) const override {
    if (leaves_alone(at)) return {};
    const Num i = query_position(at), j = load(stored_positions(at).values, index());
    Read read;
    read.places = entry_places(at, pick(i - j < window, j, i - query_place(i) + floor_div(j, group)));
    return read;
  }
};

}  // namespace

Entry self_extend() {
  Entry e = entry<SelfExtend>("self-extend", "LLM Maybe LongLM: Self-Extend LLM Context Window Without Tuning",
                              "Jin et al., 2024, arXiv 2401.01325", 2024, Role::Plan | Role::Edit | Role::Read);
  e.equation = "j with i − j < w at distance i − j, others at ⌊i / g⌋ + w − ⌊w / g⌋ − ⌊j / g⌋; one softmax";
  e.needs = "keys kept before rotation; in prompts attention twice";
  e.identity = "self-extend(window=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
