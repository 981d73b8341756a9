#include "kernels/cuda/attention.cuh"

namespace heed::cuda {

PlanView plan_view(const Plan& plan, int scope_heads) {
  return {plan.form,
          plan.scope,
          plan.q_tile,
          plan.k_tile,
          (plan.k_tile + 63) / 64,
          plan.parts,
          scope_heads,
          plan.causal,
          plan.rowptr.as<int64_t>(),
          plan.count.as<int32_t>(),
          plan.index.as<int32_t>(),
          plan.mask.as<int32_t>(),
          plan.bits.as<uint64_t>(),
          plan.parts > 1 ? plan.part.as<int32_t>() : nullptr};
}

AttentionView attention_view(const char* where, const Ragged& q, const Ragged& k, const Ragged& v, const Plan* plan_in,
                             const Mods& mods) {
  static const Plan dense;
  const Plan& plan = plan_in ? *plan_in : dense;
  check_attention(where, q, k, v, &plan, mods);
  AttentionView a{};
  a.q = matrix(q.values);
  a.k = matrix(k.values);
  a.v = matrix(v.values);
  a.qs = segments(q);
  a.ks = segments(k);
  if (v.values) a.vs = segments(v);
  a.h = int(q.heads);
  a.g = int(k.heads);
  a.g_v = v.values ? int(v.heads) : a.g;
  a.d = int(q.values.size[1]);
  a.d_v = v.values ? int(v.values.size[1]) : 0;
  a.sequences = int(q.sequences());
  a.plan = plan_view(plan, int(scope_heads(plan.scope, q.heads, k.heads)));
  a.mods.scale = mods.scale != 0 ? mods.scale : 1 / std::sqrt(float(a.d));
  a.mods.softcap = mods.softcap;
  a.mods.window = mods.window;
  a.mods.q_pos = mods.q_pos.as<int32_t>();
  a.mods.k_pos = mods.k_pos.as<int32_t>();
  a.mods.until = mods.until.as<int32_t>();
  a.mods.k_map = mods.k_map.as<int32_t>();
  a.mods.v_map = mods.v_map.as<int32_t>();
  a.mods.key_bias = mods.key_bias.as<float>();
  a.mods.temperature = mods.temperature.as<float>();
  a.mods.gain = mods.gain.as<float>();
  a.mods.sink_logits = mods.sink_logits.as<float>();
  a.mods.row_factor = matrix(mods.row_factor);
  a.mods.key_factor = matrix(mods.key_factor);
  a.mods.sigmoid = mods.weight == WeightFunction::Sigmoid;
  a.q_rows = q.values.size[0];
  a.n_bound = a.sequences ? q.values.size[0] / a.h : 0;  // a sequence's heads have equally many rows
  a.m_bound = k.values.size[0];
  return a;
}

RowTiles row_tiles(const AttentionView& a, int rows) {
  RowTiles out{};
  const bool dense = a.plan.form == Plan::Form::Dense;
  const bool packs = !a.mods.k_map && !a.mods.v_map && a.g_v == a.g && (dense || a.plan.scope != Plan::Scope::QueryHead);
  out.pack = packs ? a.h / a.g : 1;
  const int64_t in_tile = int64_t(out.pack) * (dense ? a.n_bound : a.plan.q_tile);
  out.chunks = int(ceil_div(in_tile, rows));
  const int64_t tiles = dense ? 1 : ceil_div(a.n_bound, a.plan.q_tile);
  if (!dense) out.chunks = int(ceil_div(std::min<int64_t>(in_tile, int64_t(out.pack) * a.n_bound), rows));
  out.grid = dim3(unsigned(tiles * out.chunks), unsigned(a.sequences * (a.h / out.pack)));
  return out;
}

}  // namespace heed::cuda
