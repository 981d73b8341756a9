// From heed's views to the Hopper kernels: which calls they take.
#include <algorithm>
#include <cmath>

#include "kernels/cuda/attend_sm90.h"
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/device.cuh"

namespace heed::cuda {
namespace {

/// Mods that all these kernels lack.
bool plain(const Mods& m) {
  return m.softcap == 0 && !m.temperature && !m.gain && m.weight == WeightFunction::Softmax && m.scale >= 0;
}
/// A logit is a dot product, seen by cause and window alone.
bool of_products(const Mods& m) { return !m.key_bias && !m.row_factor && !m.key_factor && !m.until; }
/// There are rows, keys and values in bf16; queries are in bf16 or may be rounded.
bool bf16_keys(const Ragged& q, const Ragged& k, const Ragged& v) {
  return k.values.type == Dtype::BF16 && v.values.type == Dtype::BF16 &&
         (q.values.type == Dtype::BF16 || q.values.type == Dtype::F32) && q.values.size[0] > 0 &&
         k.values.size[0] > 0 && v.values.size[0] > 0;
}
const int64_t* ends(const Ragged& r) { return r.ends ? r.ends.as<int64_t>() : r.offsets.as<int64_t>() + 1; }
Tensor rounded(Queue& queue, const char* where, const Ragged& q) {
  const Tensor to = queue.scratch.take(Dtype::BF16, {q.values.size[0], q.values.size[1]});
  round_rows(queue, where, matrix(q.values), q.values.size[0], matrix(to));
  return to;
}
bool blocks_alone(const Plan& p) {
  return p.parts == 1 && (p.form == Plan::Form::Dense || p.form == Plan::Form::Blocks);
}
/// Key ranges of tiles that the kernel's 128 rows are one, two halves or a part of.
bool ranges_of_tiles(const Plan& p) {
  return p.parts == 1 && p.form == Plan::Form::Interval && (p.q_tile == 64 || p.q_tile % 128 == 0);
}

}  // namespace

bool attend_sm90(Queue& queue, const AttentionView& view, const Ragged& q, const Ragged& k, const Ragged& v,
                 const Plan& plan, const Mods& mods, Tensor out, Tensor lse) {
  const bool ranges = ranges_of_tiles(plan) && !mods.k_map;
  if (!plain(mods) || !(blocks_alone(plan) || ranges) || !of_products(mods) || !bf16_keys(q, k, v) || !hopper())
    return false;
  sm90::Attend a;
  a.d = int(q.values.size[1]), a.d_v = int(v.values.size[1]);
  a.q_rows = q.values.size[0], a.k_rows = k.values.size[0], a.v_rows = v.values.size[0];
  const bool round = q.values.type == Dtype::F32;
  if (round && a.d % 8 != 0) return false;
  a.q = q.values.as<__nv_bfloat16>(), a.k = k.values.as<__nv_bfloat16>(), a.v = v.values.as<__nv_bfloat16>();
  a.q_stride = round ? a.d : q.values.stride[0], a.k_stride = k.values.stride[0], a.v_stride = v.values.stride[0];
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
    a.halves = plan.q_tile == 64 && !plan.mask && plan.k_tile <= 128;
  } else if (ranges) {
    a.q_tile = plan.q_tile, a.k_tile = 64, a.plan_heads = view.plan.scope_heads, a.halves = true;
  }
  if (!sm90::attend_fits(a)) return false;
  Scratch scope(queue.scratch);
  if (ranges) {
    if (!blocks_of_ranges(queue, view, plan, a)) return false;
  } else if (a.halves) {
    pair_rows(queue, plan.rows(), plan.index.size[0], a);
  }
  const cudaStream_t stream = static_cast<cudaStream_t>(queue.stream);
  if (round) a.q = rounded(queue, "attend", q).as<__nv_bfloat16>();
  check(sm90::attend_launch(a, queue.scratch.take(Dtype::U8, {sm90::attend_scratch(a)}).data, stream), "attend");
  return true;
}

bool attend_backward_sm90(Queue& queue, const Ragged& q, const Ragged& k, const Ragged& v, const Plan& plan,
                          const Mods& mods, Tensor out, Tensor lse, Tensor d_out, Tensor d_q, Tensor d_k, Tensor d_v,
                          Tensor d_key_bias, Tensor d_gain) {
  if (!plain(mods) || plan.form != Plan::Form::Dense || !of_products(mods) || mods.k_map || mods.v_map || d_key_bias ||
      (mods.window > 0 && (mods.q_pos || mods.k_pos)) || v.heads != k.heads || q.values.size[1] != v.values.size[1])
    return false;
  if (!bf16_keys(q, k, v) || !hopper()) return false;
  sm90::AttendBackward a;
  a.d = int(q.values.size[1]);
  a.q_rows = q.values.size[0], a.k_rows = k.values.size[0], a.v_rows = v.values.size[0];
  const bool round = q.values.type == Dtype::F32;
  if (round && a.d % 8 != 0) return false;
  a.q = q.values.as<__nv_bfloat16>(), a.k = k.values.as<__nv_bfloat16>(), a.v = v.values.as<__nv_bfloat16>();
  a.q_stride = round ? a.d : q.values.stride[0], a.k_stride = k.values.stride[0], a.v_stride = v.values.stride[0];
  a.out = out.as<float>(), a.lse = lse.as<float>(), a.d_out = d_out.as<float>();
  a.out_stride = out.stride[0], a.d_out_stride = d_out.stride[0];
  a.q_begin = q.offsets.as<int64_t>(), a.q_end = ends(q), a.k_begin = k.offsets.as<int64_t>(), a.k_end = ends(k),
  a.v_begin = v.offsets.as<int64_t>();
  a.segments = int(q.segments()), a.heads = int(q.heads), a.kv_heads = int(k.heads);
  a.scale = mods.scale > 0 ? mods.scale : 1 / std::sqrt(float(a.d));
  a.causal = plan.causal, a.window = int(std::min<int64_t>(mods.window, 1 << 29));
  a.d_q = d_q.as<float>(), a.d_k = d_k.as<float>(), a.d_v = d_v.as<float>(), a.out_dot = d_gain.as<float>();
  a.d_q_stride = d_q.stride[0], a.d_k_stride = d_k.stride[0], a.d_v_stride = d_v.stride[0];
  if (!sm90::attend_backward_fits(a)) return false;
  Scratch scope(queue.scratch);
  if (round) a.q = rounded(queue, "attend_backward", q).as<__nv_bfloat16>();
  check(sm90::attend_backward_launch(a, queue.scratch.take(Dtype::U8, {sm90::attend_backward_scratch(a)}).data,
                                     static_cast<cudaStream_t>(queue.stream)),
        "attend_backward");
  return true;
}

bool attend_store_sm90(Queue& queue, const Ragged& q, const Pages& pages, const Read& read, const Mods& mods,
                       Tensor out, Tensor lse) {
  const Plan& plan = read.plan;
  const bool tokens = plan.form == Plan::Form::Tokens && plan.parts == 1;
  if (!plain(mods) || !(blocks_alone(plan) || tokens) || plan.mask || mods.k_map || mods.v_map || pages.plain_keys ||
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
  if (plan.form != Plan::Form::Dense) {
    a.k_tile = tokens ? 1 : plan.k_tile, a.plan_heads = int(scope_heads(plan.scope, q.heads, pages.kv_heads));
    a.rowptr = plan.rowptr.as<int64_t>(), a.count = plan.count.as<int32_t>(), a.index = plan.index.as<int32_t>();
  }
  if (!sm90::attend_store_fits(a)) return false;
  a.arrived = counters(queue);
  Scratch scope(queue.scratch);
  check(sm90::attend_store_launch(a, queue.scratch.take(Dtype::U8, {sm90::attend_store_scratch(a)}).data,
                                  static_cast<cudaStream_t>(queue.stream)),
        "attend_store");
  return true;
}

}  // namespace heed::cuda
