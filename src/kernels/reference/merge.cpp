#include "kernels/check.h"
#include "kernels/reference/reference.h"

namespace heed::reference {

void merge(Queue&, Tensor outs, Tensor weights, Tensor out, Tensor lse) {
  require(outs.rank == 3, "merge", "outs is [parts, rows, d_v], got " + outs.shape());
  const int64_t parts = outs.size[0], rows = outs.size[1], d_v = outs.size[2];
  check_tensor("merge", "outs", outs, {parts, rows, d_v});
  check_tensor("merge", "weights", weights, {parts, rows});
  check_tensor("merge", "out", out, {rows, d_v});
  check_tensor("merge", "lse", lse, {rows}, true);
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<double> logs, sum(size_t(d_v), 0.0);
    for (int64_t part = 0; part < parts; ++part) logs.push_back(number(weights, part, r));
    const double total = log_sum_exp(logs);
    for (int64_t part = 0; part < parts; ++part) {
      if (logs[size_t(part)] == -infinity) continue;  // its out may hold anything
      const double share = std::exp(logs[size_t(part)] - total);
      for (int64_t c = 0; c < d_v; ++c) sum[size_t(c)] += share * number(outs.select(0, part), r, c);
    }
    set_row(out, r, sum);
    if (lse) store(lse, offset(lse, r), total);
  }
}

}  // namespace heed::reference
