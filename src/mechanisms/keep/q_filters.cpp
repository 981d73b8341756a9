#include "attention/inputs.h"
#include "attention/maps.h"
#include "attention/rotation.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Q-Filters (Godey et al., 2025): queries of a KV head's group lie along one direction, and a key is worth its
// product with it. The direction is that of the prompt's own queries, their first right singular vector, unless `heed
// apply --input filters=…` gives one found on a calibration text. Its sign is the one that queries have on average
// (the released filters have the opposite one).
struct QFilters final : KeepPolicy {
  int sinks, rounds;

  static std::vector<ParamInfo> params() {
    using M = QFilters;
    return keep_params<M>("1024", "prompt",
                          {
                              param(&M::sinks, "sinks", 0, 0, 1 << 20, "first entries that always stay"),
                              param(&M::rounds, "rounds", 30, 0, 1000, "of power iteration"),
                          });
  }
  std::string check() const override {
    if (when.decodes())
      return "when=every(n) cuts while decoding, but the filter is a prompt's: when=prompt or when=chunk";
    return too_small(budget, sinks, "sinks");
  }

  Ragged score(LayerView& at) const override {
    Queue& queue = at.queue;
    const int64_t g = at.store->shape().kv_heads, group = at.model.group(), d = at.q.values.size[1];
    Ragged filter;
    if (is_given(at, "filters")) {
      filter = heads_of(queue, given(at, "filters", "[g, d]", {g, d}), g, 1);
    } else {
      Ragged q = at.q;  // the queries of a group as one segment
      q.heads = g;
      q.offsets = compute(queue, Dtype::I64, {at.store->segments() + 1}, load(at.q.offsets, index() * group));
      filter = transformed(queue, mean_rows(queue, q), main_directions(queue, q, 1, rounds));
    }
    return force(queue, dots(queue, filter, stored_keys(at)), sinks, 0);
  }
};

}  // namespace

Entry q_filters() {
  Entry e = entry<QFilters>("q-filters", "Q-Filters: Leveraging QK Geometry for Efficient KV Cache Compression",
                            "Godey et al., 2025, arXiv 2503.02812", 2025, uint8_t(Role::Keep));
  e.equation = "s_j = f·k_j, f the first right singular vector of the group's queries, f · mean q > 0";
  e.needs = "queries of the prompt";
  e.identity = "q-filters(budget=1.0)";
  e.apply_inputs = {"filters [g, d]: directions, in place of those of the prompt's queries"};
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
