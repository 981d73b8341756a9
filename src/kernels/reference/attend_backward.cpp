#include "kernels/check.h"
#include "kernels/reference/attention.h"

namespace heed::reference {

void attend_backward(Queue&, const Ragged& q, const Ragged& k, const Ragged& v, const Plan& plan, const Mods& mods,
                     Tensor out, Tensor lse, Tensor d_out, Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_key_bias,
                     Tensor d_gain) {
  constexpr const char* where = "attend_backward";
  const Attention attention(where, q, k, v, &plan, mods);
  const int64_t rows = q.values.size[0], keys = k.values.size[0], width_k = q.values.size[1], width_v = v.values.size[1];
  check_tensor(where, "out", out, {rows, width_v});
  check_tensor(where, "lse", lse, {rows});
  check_tensor(where, "d_out", d_out, {rows, width_v});
  check_tensor(where, "d_q", d_q, {rows, width_k});
  check_tensor(where, "d_k", d_k, {keys, width_k});
  check_tensor(where, "d_v", d_v, {v.values.size[0], width_v});
  check_tensor(where, "d_key_bias", d_key_bias, {keys}, true);
  check_tensor(where, "d_gain", d_gain, {rows}, true);

  // Summed in f64, rounded once.
  std::vector<double> sum_k(size_t(keys * width_k), 0.0), sum_v(size_t(v.values.size[0] * width_v), 0.0),
      sum_bias(size_t(keys), 0.0);
  for (int64_t sequence = 0; sequence < attention.sequences(); ++sequence)
    for (int64_t head = 0; head < attention.heads(); ++head)
      for (const QueryRow& at : attention.rows(sequence, head)) {
        const double gain = attention.gain(at), log_sum = number(lse, at.row);
        const std::vector<double> query = row(q.values, at.row), g = row(d_out, at.row);
        std::vector<double> sum_q(size_t(width_k), 0.0);
        double out_dot = 0;  // Σ out · d_out, which is Σ_j P_j dP_j
        for (int64_t c = 0; c < width_v; ++c) out_dot += number(out, at.row, c) * g[size_t(c)];
        if (gain != 0)
          for (const Seen& key : attention.seen(at)) {
            const int64_t k_row = at.k_first + key.key, v_row = at.v_first + key.key;
            const double p = attention.weight(key, log_sum);
            double d_p = 0;
            for (int64_t c = 0; c < width_v; ++c) {
              d_p += gain * g[size_t(c)] * number(v.values, v_row, c);
              sum_v[size_t(v_row * width_v + c)] += gain * p * g[size_t(c)];
            }
            const double d_logit = mods.weight == WeightFunction::Softmax ? p * (d_p - out_dot) : p * (1 - p) * d_p;
            sum_bias[size_t(k_row)] += d_logit;
            for (int64_t c = 0; c < width_k; ++c) {
              sum_q[size_t(c)] += d_logit * key.slope * number(k.values, k_row, c);
              sum_k[size_t(k_row * width_k + c)] += d_logit * key.slope * query[size_t(c)];
            }
          }
        set_row(d_q, at.row, sum_q);
        if (d_gain) store(d_gain, offset(d_gain, at.row), gain == 0 ? 0 : out_dot / gain);
      }

  auto each_row = [](const Ragged& of, auto&& body) {
    for (int64_t s = 0; s < of.segments(); ++s)
      for (int64_t r = of.begin(s); r < of.end(s); ++r) body(r);
  };
  each_row(k, [&](int64_t r) {
    for (int64_t c = 0; c < width_k; ++c) store(d_k, offset(d_k, r, c), sum_k[size_t(r * width_k + c)]);
    if (d_key_bias) store(d_key_bias, offset(d_key_bias, r), sum_bias[size_t(r)]);
  });
  each_row(v, [&](int64_t r) {
    for (int64_t c = 0; c < width_v; ++c) store(d_v, offset(d_v, r, c), sum_v[size_t(r * width_v + c)]);
  });
}

}  // namespace heed::reference
