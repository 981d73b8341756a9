// attend: which form takes a call.
#include "kernels/cuda/attend.cuh"

namespace heed::cuda {

void attend(Queue& queue, const Ragged& q, const Ragged& k, const Ragged& v, const Plan& plan, const Mods& mods, Tensor out,
            Tensor lse) {
  constexpr const char* where = "attend";
  const int64_t rows = q.values.size[0], d_v = v.values.rank == 2 ? v.values.size[1] : 0;
  const AttentionView a = attention_view(where, q, k, v, &plan, mods);
  require(bool(v.values), where, "there are no values");
  const bool split = plan.parts > 1;
  if (split) {
    check_tensor(where, "out", out, {plan.parts, rows, d_v});
    check_tensor(where, "lse", lse, {plan.parts, rows}, true);
  } else {
    check_tensor(where, "out", out, {rows, d_v});
    check_tensor(where, "lse", lse, {rows}, true);
  }
  const AttendOut to{out.as<float>(), split ? out.stride[0] : 0, out.stride[size_t(split)], lse.as<float>(),
                     lse && split ? lse.stride[0] : 0, lse ? lse.stride[size_t(split)] : 0};
  attend_plain(queue, a, to);
}

}  // namespace heed::cuda
