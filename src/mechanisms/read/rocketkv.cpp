#include <algorithm>
#include <cmath>

#include "attention/maps.h"
#include "attention/reads.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// RocketKV (Behnam et al., 2025), its second stage: a few channels, those where the group's queries are largest, and the
// bound of a page's keys on the side that the group's summed query points to, stand for the keys of the page; a KV head
// reads the entries whose page its heads pay most. The first stage is snapkv(window=32,kernel=63) beside it. Page and share
// of channels are given (the paper makes both of the ratio to compress by: page x = ⌈√ratio⌉, channels d x / ratio).
struct RocketKV final : Mechanism {
  Budget budget;
  int page, first_dense;
  double channels;

  static std::vector<ParamInfo> params() {
    using M = RocketKV;
    return {
        budget_param(&M::budget, "512",
                     "entries read by each KV head (half of the paper's token budget); a fraction is of the prompt"),
        param(&M::page, "page", 4, 1, 64, "entries of a page: 1, 2, 4, … 64"),
        param(&M::channels, "channels", 0.25, 1e-6, 1, "share of the channels that is looked at"),
        dense_layers_param(&M::first_dense, 0),
    };
  }
  std::string check() const override { return uneven(page, "page"); }

  std::string low() const { return "rocketkv.low" + std::to_string(page); }
  std::string high() const { return "rocketkv.high" + std::to_string(page); }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.columns = {{low(), Column::Keeps::KeyMin, 1, page}, {high(), Column::Keeps::KeyMax, 1, page}};
    return n;
  }

  Read read(LayerView& at) const override {
    if (reads_all(at, first_dense)) return {};
    Queue& queue = at.queue;
    const int64_t d = at.q.values.size[1], group = at.model.group(), groups = at.q.segments() / group;
    Ragged q = at.q, size = at.q;  // the heads of a group, as those of a sequence
    q.heads = size.heads = group;
    size.values = queue.scratch.take(Dtype::F32, {at.q.values.size[0], d});
    const Num x = load(q.values, index());
    compute(queue, q, abs(x), size.values);
    const Ragged sum = spread(queue, q, {.of = Spread::Of::Sum, .over = Spread::Over::Heads}),
                 mean = spread(queue, size, {.of = Spread::Of::Mean, .over = Spread::Over::Heads});
    Ragged importance;
    importance.values = mean.values.reshape({mean.values.numel()}), importance.bound = mean.values.numel();
    const Num first = index() * group;
    importance.offsets = compute(queue, Dtype::I64, {groups + 1}, begin_of(at.q, first) * d);
    importance.ends = compute(queue, Dtype::I64, {groups}, end_of(at.q, first) * d);
    Select largest;
    largest.k = std::max<int64_t>(1, int64_t(channels * double(d)));
    const Lists looked_at = chosen(queue, importance, largest, largest.k);
    const Num looks = looked_at.has(floor_div(segment(), group), channel());
    const auto only = [&](const Num& where, const Num& number) {
      Ragged out = q;
      out.values = queue.scratch.take(Dtype::F32, {at.q.values.size[0], d});
      compute(queue, q, pick(where, number, 0), out.values);
      return out;
    };
    const Num points = load(sum.values, index());
    Ragged up = only(looks && points > 0, x), down = only(looks && points <= 0, x);
    up.heads = down.heads = at.q.heads;
    const Ragged bounds = combine(queue, block_scores(at, up, high(), high(), page),
                                  block_scores(at, down, low(), low(), page), Combine::Add);
    // 1 / √(d · Σ |q| looked at / Σ |q|) in the place of 1 / √d.
    Ragged one = q;
    one.values = ones(queue, at.q.values.size[0], d);
    const Ragged part = row_dots(queue, only(looks, load(size.values, index())), one), whole = row_dots(queue, size, one);
    const float scale = at.scale();
    const Num row = begin_of(at.q, segment());
    compute(queue, bounds, scale * load(bounds.values, index()) * sqrt(load(whole.values, row) / load(part.values, row)),
            bounds.values);
    const Ragged paid = over_group(at, softmax(queue, bounds), Spread::Of::Mean), scores = at.per_entry();
    compute(queue, scores, load(paid.values, begin_of(paid, segment()) + floor_div(place(), page)), scores.values);
    std::vector<int64_t> counts;
    for (int64_t length : at.prompt) counts.push_back(budget.entries(length));
    return best_entries(at, Plan::Scope::KvHead, scores, counts);
  }
};

}  // namespace

Entry rocketkv() {
  Entry e = entry<RocketKV>("rocketkv",
                            "RocketKV: Accelerating Long-Context LLM Inference via Two-Stage KV Cache Compression",
                            "Behnam et al., 2025, arXiv 2502.14051", 2025, uint8_t(Role::Read));
  e.equation =
      "a = softmax over pages of Σ_{c ∈ C} q_c max_page(s_c k_c) s_c / √(d Σ_C |q| / Σ |q|), s the sign of Σ over "
      "the group of q, C its largest channels; read the top of mean a";
  e.needs = "two columns of bounds: 2 / page of the keys";
  e.identity = "rocketkv(budget=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
