#include "kernels/cpu/tile_tasks.h"

#include <algorithm>

#include "kernels/cpu/products.h"

namespace heed::HEED_ISA {

std::vector<TileTask> tile_tasks(const Plan& plan, const Ragged& q, int64_t kv_heads, int64_t v_heads, const Mods& mods,
                                 bool share, int64_t most) {
  const bool dense = plan.form == Plan::Form::Dense;
  const PlanRows plan_rows(plan, q, kv_heads);
  if (!dense) plan_rows.check(plan, "attend");
  const int64_t h = q.heads, group = std::max<int64_t>(1, h / kv_heads);
  share = share && !mods.k_map && !mods.v_map && v_heads == kv_heads && (dense || plan.scope != Plan::Scope::QueryHead);
  std::vector<TileTask> out;
  for (int64_t sequence = 0; sequence < q.sequences(); ++sequence)
    for (int64_t head = 0; head < h;) {
      const int64_t n = q.length(sequence * h + head), q_tile = dense ? std::max<int64_t>(n, 1) : plan.q_tile;
      const int64_t rows = std::min<int64_t>({most, n, q_tile});
      int64_t heads = 1;
      if (share && rows > 0) heads = std::min(most / rows, group - head % group);
      for (int64_t i = 1; i < heads; ++i)
        if (q.length(sequence * h + head + i) != n) heads = 1;
      TileTask task;
      task.sequence = sequence;
      task.head = head;
      task.heads = heads;
      task.k_segment = sequence * kv_heads + (mods.k_map ? mods.k_map.as<int32_t>()[head] : head * kv_heads / h);
      task.v_segment = sequence * v_heads + (mods.v_map ? mods.v_map.as<int32_t>()[head] : head * v_heads / h);
      for (int64_t first = 0; first < n; first += task.rows) {
        task.first = first;
        task.rows = std::min({rows, n - first, q_tile - first % q_tile});
        task.plan_row = dense ? 0 : plan_rows.row(sequence, head, h, first, plan.q_tile);
        out.push_back(task);
      }
      head += heads;
    }
  return out;
}

int64_t longest(const Ragged& x) {
  int64_t most = 0;
  for (int64_t s = 0; s < x.segments(); ++s) most = std::max(most, x.length(s));
  return most;
}

bool gathers_queries(const Plan& plan, const Ragged& q, int64_t kv_heads, const Mods& mods) {
  const bool shared = !mods.k_map && !mods.v_map && plan.scope != Plan::Scope::QueryHead;
  return plan.form == Plan::Form::Blocks && !plan.mask && plan.parts == 1 &&
         plan.q_tile * (shared ? std::max<int64_t>(1, q.heads / kv_heads) : 1) < 16;
}

Lanes lanes_of(const TileTask& task, const Ragged& q, int64_t keys, const Mods& mods, bool causal,
               std::span<const int> chosen) {
  Lanes lanes;
  lanes.count = chosen.empty() ? int(task.heads * task.rows) : int(chosen.size());
  lanes.width = (lanes.count + kLanes - 1) / kLanes * kLanes;
  const float scale = mods.scale != 0 ? mods.scale : float(1 / std::sqrt(double(q.values.size[1])));
  for (int lane = 0; lane < lanes.width; ++lane) {
    const int64_t at = lane < lanes.count ? lane : 0;
    const int64_t head = chosen.empty() ? task.head + at / task.rows : task.head,
                  i = task.first + (chosen.empty() ? at % task.rows : chosen[size_t(at)]),
                  segment = task.sequence * q.heads + head;
    const int64_t row = q.begin(segment) + i, last = keys - q.length(segment) + i;
    lanes.row[lane] = row;
    lanes.head[lane] = int32_t(head);
    lanes.query[lane] = int32_t(i);
    lanes.limit[lane] = float(causal ? std::min(last, keys - 1) : keys - 1);
    lanes.position[lane] = float(mods.q_pos ? mods.q_pos.as<int32_t>()[row] : last);
    lanes.factor[lane] = mods.temperature ? scale * mods.temperature.as<float>()[row] : scale;
    if (lane == 0) {
      lanes.limit_low = lanes.limit_high = lanes.limit[0];
      lanes.position_low = lanes.position_high = lanes.position[0];
      lanes.positive = true;
    }
    lanes.limit_low = std::min(lanes.limit_low, lanes.limit[lane]);
    lanes.limit_high = std::max(lanes.limit_high, lanes.limit[lane]);
    lanes.position_low = std::min(lanes.position_low, lanes.position[lane]);
    lanes.position_high = std::max(lanes.position_high, lanes.position[lane]);
    lanes.positive = lanes.positive && lanes.factor[lane] > 0;
  }
  return lanes;
}

KeyRange visible(const Lanes& lanes, const KeyView& keys, const Mods& mods, bool causal) {
  KeyRange range{0, keys.size()};
  if (causal) range.high = std::clamp<int64_t>(int64_t(lanes.limit_high) + 1, 0, keys.size());
  if (mods.window > 0) range.low = keys.window_begin(lanes.position_low, mods.window);
  return range;
}

LogitRule logit_rule(const Plan& plan, const Mods& mods, const KeyView& keys, bool causal) {
  LogitRule rule{};
  rule.mods = &mods;
  rule.causal = causal;
  rule.q_tile = plan.q_tile;
  rule.bits_stride = plan.bits ? plan.bits.stride[1] : 0;
  rule.keyed_bias = keys.has_bias();
  rule.keyed_until = keys.has_until();
  return rule;
}

bool KeySource::dots(Dtype queries, int d) const {
#if defined(HEED_BF16_DOT)
  if (queries != Dtype::BF16 || d % 2 || !bf16_dots_pay()) return false;
  if (!pages) return k->values.type == Dtype::BF16 && (!v || v->values.type == Dtype::BF16);
  if (turns.rope) return false;
  for (const PageLayout& layout : pages->layouts)
    if (layout.k.kind != PageType::Kind::BF16 || layout.v.kind != PageType::Kind::BF16 || layout.v_transposed ||
        layout.k.pair)
      return false;
  return !pages->layouts.empty();
#else
  (void)queries, (void)d;
  return false;
#endif
}

}  // namespace heed::HEED_ISA
