#include <algorithm>
#include <limits>

#include "kernels/check.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/workers.h"

namespace heed::HEED_ISA {

void merge(Queue& queue, Tensor outs, Tensor weights, Tensor out, Tensor lse) {
  require(outs.rank == 3, "merge", "outs is [parts, rows, d_v], got " + outs.shape());
  const int64_t parts = outs.size[0], rows = outs.size[1], d_v = outs.size[2];
  check_tensor("merge", "outs", outs, {parts, rows, d_v});
  check_tensor("merge", "weights", weights, {parts, rows});
  check_tensor("merge", "out", out, {rows, d_v});
  check_tensor("merge", "lse", lse, {rows}, true);
  constexpr float infinity = std::numeric_limits<float>::infinity();
  constexpr int64_t run = 64;  // rows of one piece of work
  const Scratch scratch(queue.scratch);
  parallel_with(queue, parts * int64_t(sizeof(float)), (rows + run - 1) / run, [&](char* memory, int64_t i) {
    auto* share = reinterpret_cast<float*>(memory);
    for (int64_t r = i * run; r < std::min(rows, (i + 1) * run); ++r) {
      float high = -infinity, sum = 0;
      for (int64_t p = 0; p < parts; ++p) high = std::max(high, weights.as<float>()[p * weights.stride[0] + r]);
      const float shift = high == -infinity ? 0 : high;
      for (int64_t p = 0; p < parts; ++p) {
        share[p] = std::exp(weights.as<float>()[p * weights.stride[0] + r] - shift);
        sum += share[p];
      }
      float* to = out.as<float>() + r * out.stride[0];
      std::fill_n(to, d_v, 0.0f);
      for (int64_t p = 0; p < parts; ++p) {
        if (share[p] == 0) continue;  // its out may hold anything
        const F scale = set(share[p] / sum);
        const float* from = outs.as<float>() + p * outs.stride[0] + r * outs.stride[1];
        for (int64_t c = 0; c < d_v; c += kLanes) {
          const int n = int(std::min<int64_t>(kLanes, d_v - c));
          store_part(to + c, fma(load_part(from + c, n), scale, load_part(to + c, n)), n);
        }
      }
      if (lse) lse.as<float>()[r * lse.stride[0]] = high + (sum > 0 ? std::log(sum) : 0);
    }
  });
}

}  // namespace heed::HEED_ISA
