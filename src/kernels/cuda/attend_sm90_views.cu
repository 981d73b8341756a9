// From heed's views to the Hopper kernels: which calls they take.
#include <algorithm>
#include <cmath>

#include "kernels/cuda/attend_sm90.h"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/device.cuh"

namespace heed::cuda {
namespace {

/// Mods that both kernels lack.
bool plain(const Mods& m) {
  return m.softcap == 0 && !m.temperature && !m.gain && m.weight == WeightFunction::Softmax && m.scale >= 0;
}
bool blocks_alone(const Plan& p) {
  return p.parts == 1 && (p.form == Plan::Form::Dense || p.form == Plan::Form::Blocks);
}

}  // namespace

bool attend_sm90(Queue& queue, const Ragged& q, const Ragged& k, const Ragged& v, const Plan& plan, const Mods& mods,
                 Tensor out, Tensor lse) {
  if (!plain(mods) || !blocks_alone(plan) || mods.key_bias || mods.row_factor || mods.key_factor || mods.until)
    return false;
  if (k.values.type != Dtype::BF16 || v.values.type != Dtype::BF16 ||
      (q.values.type != Dtype::BF16 && q.values.type != Dtype::F32))
    return false;
  if (q.values.size[0] == 0 || k.values.size[0] == 0 || v.values.size[0] == 0 || !hopper()) return false;
  sm90::Attend a;
  a.d = int(q.values.size[1]), a.d_v = int(v.values.size[1]);
  a.q_rows = q.values.size[0], a.k_rows = k.values.size[0], a.v_rows = v.values.size[0];
  const bool round = q.values.type == Dtype::F32;
  if (round && a.d % 8 != 0) return false;
  a.q = q.values.as<__nv_bfloat16>(), a.k = k.values.as<__nv_bfloat16>(), a.v = v.values.as<__nv_bfloat16>();
  a.q_stride = round ? a.d : q.values.stride[0], a.k_stride = k.values.stride[0], a.v_stride = v.values.stride[0];
  auto ends = [](const Ragged& r) { return r.ends ? r.ends.as<int64_t>() : r.offsets.as<int64_t>() + 1; };
  a.q_begin = q.offsets.as<int64_t>(), a.q_end = ends(q), a.k_begin = k.offsets.as<int64_t>(), a.k_end = ends(k),
  a.v_begin = v.offsets.as<int64_t>();
  a.segments = int(q.segments()), a.heads = int(q.heads), a.kv_heads = int(k.heads), a.v_heads = int(v.heads);
  a.scale = mods.scale > 0 ? mods.scale : 1 / std::sqrt(float(a.d));
  a.causal = plan.causal, a.window = int(std::min<int64_t>(mods.window, 1 << 29));
  a.q_pos = mods.q_pos.as<int32_t>(), a.k_pos = mods.k_pos.as<int32_t>();
  a.k_map = mods.k_map.as<int32_t>(), a.v_map = mods.v_map.as<int32_t>(), a.sink = mods.sink_logits.as<float>();
  a.out = out.as<float>(), a.out_stride = out.stride[0], a.lse = lse.as<float>();
  if (plan.form == Plan::Form::Blocks) {
    a.q_tile = plan.q_tile, a.k_tile = plan.k_tile, a.plan_heads = int(scope_heads(plan.scope, q.heads, k.heads));
    a.rowptr = plan.rowptr.as<int64_t>(), a.count = plan.count.as<int32_t>(), a.index = plan.index.as<int32_t>();
    a.mask = plan.mask.as<int32_t>(), a.bits = plan.bits.as<uint64_t>();
    a.paired = plan.q_tile == 64 && !plan.mask && plan.k_tile <= 128;
  }
  if (!sm90::attend_fits(a)) return false;
  Scratch scope(queue.scratch);
  if (a.paired) pair_rows(queue, plan.rows(), plan.index.size[0], a);
  const cudaStream_t stream = static_cast<cudaStream_t>(queue.stream);
  if (round) {
    const Tensor rounded = queue.scratch.take(Dtype::BF16, {a.q_rows, int64_t(a.d)});
    round_rows(queue, "attend", matrix(q.values), a.q_rows, matrix(rounded));
    a.q = rounded.as<__nv_bfloat16>();
  }
  check(sm90::attend_launch(a, queue.scratch.take(Dtype::U8, {sm90::attend_scratch(a)}).data, stream), "attend");
  return true;
}

bool attend_store_sm90(Queue& queue, const Ragged& q, const Pages& pages, const Read& read, const Mods& mods,
                       Tensor out, Tensor lse) {
  const Plan& plan = read.plan;
  if (!plain(mods) || !blocks_alone(plan) || plan.mask || mods.k_map || mods.v_map || pages.plain_keys ||
      pages.layouts.size() != 1)
    return false;
  const PageLayout& layout = pages.layouts[0];
  if (q.values.rank != 2 || q.values.size[1] != layout.d || q.heads % pages.kv_heads != 0 ||
      q.sequences() * pages.kv_heads != pages.segments())
    return false;
  if (layout.k.kind != PageType::Kind::BF16 || layout.v.kind != PageType::Kind::BF16 || layout.v_transposed)
    return false;
  if ((q.values.type != Dtype::BF16 && q.values.type != Dtype::F32) || q.values.size[0] == 0 || pages.segments() == 0 ||
      !hopper())
    return false;
  sm90::AttendStore a;
  a.q = q.values.data, a.q_f32 = q.values.type == Dtype::F32, a.q_stride = q.values.stride[0];
  a.q_begin = q.offsets.as<int64_t>(), a.q_end = q.ends ? q.ends.as<int64_t>() : q.offsets.as<int64_t>() + 1;
  a.sequences = int(q.sequences()), a.heads = int(q.heads), a.kv_heads = int(pages.kv_heads), a.d = layout.d,
  a.d_v = layout.d_v;
  a.table = pages.table.as<uint64_t>(), a.capacity = pages.table.stride[0], a.length = pages.length.as<int32_t>();
  a.k_at = layout.k_at, a.v_at = layout.v_at, a.bias_at = layout.bias_at, a.position_at = layout.position_at;
  a.scale = mods.scale > 0 ? mods.scale : 1 / std::sqrt(float(a.d));
  a.causal = plan.causal, a.window = int(std::min<int64_t>(mods.window, 1 << 29)), a.q_pos = mods.q_pos.as<int32_t>(),
  a.sink = mods.sink_logits.as<float>();
  a.out = out.as<float>(), a.out_stride = out.stride[0], a.lse = lse.as<float>();
  if (plan.form == Plan::Form::Blocks) {
    a.k_tile = plan.k_tile, a.plan_heads = int(scope_heads(plan.scope, q.heads, pages.kv_heads));
    a.rowptr = plan.rowptr.as<int64_t>(), a.count = plan.count.as<int32_t>(), a.index = plan.index.as<int32_t>();
  }
  if (!sm90::attend_store_fits(a)) return false;
  Scratch scope(queue.scratch);
  check(sm90::attend_store_launch(a, queue.scratch.take(Dtype::U8, {sm90::attend_store_scratch(a)}).data,
                                  static_cast<cudaStream_t>(queue.stream)),
        "attend_store");
  return true;
}

}  // namespace heed::cuda
