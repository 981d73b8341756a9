// attend: which form takes a call.
#include "kernels/cuda/attend.cuh"
#include "kernels/cuda/attend_sm90.h"

namespace heed::cuda {

AttendOut attend_out(const char* where, const Plan& plan, int64_t rows, int64_t d_v, const Tensor& out, const Tensor& lse) {
  const bool split = plan.parts > 1;
  if (split) {
    check_tensor(where, "out", out, {plan.parts, rows, d_v});
    check_tensor(where, "lse", lse, {plan.parts, rows}, true);
  } else {
    check_tensor(where, "out", out, {rows, d_v});
    check_tensor(where, "lse", lse, {rows}, true);
  }
  return {out.as<float>(), split ? out.stride[0] : 0,        out.stride[size_t(split)],
          lse.as<float>(), lse && split ? lse.stride[0] : 0, lse ? lse.stride[size_t(split)] : 0};
}

void attend(Queue& queue, const Ragged& q, const Ragged& k, const Ragged& v, const Plan& plan, const Mods& mods,
            Tensor out, Tensor lse) {
  constexpr const char* where = "attend";
  require(bool(v.values), where, "there are no values");
  const AttentionView a = attention_view(where, q, k, v, &plan, mods);
  const AttendOut to = attend_out(where, plan, a.q_rows, a.d_v, out, lse);
  if (attend_sm90(queue, a, q, k, v, plan, mods, out, lse)) return;
  attend_plain(queue, a, to);
}

}  // namespace heed::cuda
