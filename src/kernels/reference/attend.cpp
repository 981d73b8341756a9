#include "base/threads.h"
#include "kernels/check.h"
#include "kernels/reference/attention.h"

namespace heed::reference {

void attend(Queue&, const Ragged& q, const Ragged& k, const Ragged& v, const Plan& plan, const Mods& mods, Tensor out,
            Tensor lse) {
  const int64_t rows = q.values.size[0], d_v = v.values.rank == 2 ? v.values.size[1] : 0;
  const bool split = plan.parts > 1;
  const Attention attention("attend", q, k, v, &plan, mods);
  require(bool(v.values), "attend", "there are no values");
  if (split) {
    check_tensor("attend", "out", out, {plan.parts, rows, d_v});
    check_tensor("attend", "lse", lse, {plan.parts, rows}, true);
  } else {
    check_tensor("attend", "out", out, {rows, d_v});
    check_tensor("attend", "lse", lse, {rows}, true);
  }
  parallel_for(attention.sequences() * attention.heads(), [&](int64_t segment) {
    for (const QueryRow& at : attention.rows(segment / q.heads, segment % q.heads)) {
      const double gain = attention.gain(at);
      const std::vector<Seen> seen = gain == 0 ? std::vector<Seen>() : attention.seen(at);
      for (int part = 0; part < plan.parts; ++part) {
        const double log_sum = gain == 0 ? -infinity : attention.lse(at, seen, part);
        std::vector<double> sum(size_t(d_v), 0.0);
        for (const Seen& key : seen) {
          if (key.part != part) continue;
          const double p = attention.weight(key, log_sum);
          for (int64_t c = 0; c < d_v; ++c) sum[size_t(c)] += gain * p * number(v.values, at.v_first + key.key, c);
        }
        set_row(split ? out.select(0, part) : out, at.row, sum);
        if (lse) store(lse, split ? offset(lse, part, at.row) : offset(lse, at.row), log_sum);
      }
    }
  });
}

}  // namespace heed::reference
