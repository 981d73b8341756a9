#include "kernels/check.h"
#include "kernels/reference/recur.h"

namespace heed::reference {
namespace {

double dot(const std::vector<double>& x, const std::vector<double>& y) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) sum += x[i] * y[i];
  return sum;
}

}  // namespace

void recur_backward(Queue&, const RecurInputs& in, const Recur& how, Tensor d_out, Tensor d_state, const RecurGrads& grads) {
  constexpr const char* where = "recur_backward";
  check_recur(where, in, how);
  require(!how.normalise, where, "there is no gradient of the normalised form");
  const int64_t segments = in.q.segments(), rows = in.q.values.size[0], d = width(in.q.values), d_v = width(in.v.values);
  check_tensor(where, "d_out", d_out, {rows, d_v});
  check_tensor(where, "d_state", d_state, {segments, d, d_v}, true);
  for (const Tensor& t : {grads.q, grads.k, grads.a, grads.b}) check_tensor(where, "a gradient", t, {rows, d}, true);
  check_tensor(where, "gradient of v", grads.v, {rows, d_v}, true);
  check_tensor(where, "gradient of beta", grads.beta, {rows}, true);
  check_tensor(where, "gradient of state", grads.state, {segments, d, d_v}, true);
  const bool vector = how.decay == Recur::Decay::Vector;
  if (vector) check_tensor(where, "gradient of g", grads.g, {rows, d}, true);
  else check_tensor(where, "gradient of g", grads.g, {rows}, true);
  const double scale = recur_scale(in, how);

  for (int64_t s = 0; s < segments; ++s) {
    const int64_t n = in.q.length(s);
    std::vector<Matrix> states{initial_state(in, s)};
    for (int64_t t = 0; t < n; ++t) {
      states.push_back(states.back());
      recur_step(recur_row(in, how, s, t), how, states.back());
    }
    Matrix d_s(d, d_v);  // gradient of S_t; of S_{t−1} after the body
    if (d_state)
      for (int64_t r = 0; r < d; ++r)
        for (int64_t c = 0; c < d_v; ++c) d_s(r, c) = number(d_state.select(0, s), r, c);
    for (int64_t t = n - 1; t >= 0; --t) {
      const int64_t r = in.q.begin(s) + t;
      const RecurRow at = recur_row(in, how, s, t);
      const Matrix& before = states[size_t(t)];
      const std::vector<double> g_out = row(d_out, r);
      std::vector<double> d_q = states[size_t(t + 1)].right(g_out);
      for (double& x : d_q) x *= scale;
      d_s.add(scale, at.q, g_out);

      std::vector<double> d_k = d_s.right(at.v), d_value = d_s.left(at.k), d_a, d_b;
      double d_beta = 0;
      Matrix d_decayed = d_s;  // gradient of Diag(e^g) S_{t−1}
      Matrix d_before(d, d_v);
      if (how.correction == Recur::Correction::Delta) {
        Matrix decayed = before;
        for (int64_t i = 0; i < d; ++i)
          for (int64_t c = 0; c < d_v; ++c) decayed(i, c) *= at.decay[size_t(i)];
        const std::vector<double> known = decayed.left(at.k);
        std::vector<double> u = at.v;  // S += β k u^T
        for (size_t c = 0; c < u.size(); ++c) u[c] -= known[c];
        d_beta = dot(d_s.left(at.k), u);
        for (double& x : d_value) x *= at.beta;  // u's gradient, and v's
        d_k = d_s.right(u);
        const std::vector<double> through_known = decayed.right(d_value);
        for (size_t c = 0; c < d_k.size(); ++c) d_k[c] = at.beta * d_k[c] - through_known[c];
        d_decayed.add(-1, at.k, d_value);
      }
      if (how.correction == Recur::Correction::LowRank) {
        const std::vector<double> low_rank = before.left(at.a), d_low_rank = d_s.left(at.b);
        d_b = d_s.right(low_rank);
        d_a = before.right(d_low_rank);
        d_before.add(1, at.a, d_low_rank);
      }
      std::vector<double> d_g(size_t(d), 0.0);
      double d_g_sum = 0;
      for (int64_t i = 0; i < d; ++i)
        for (int64_t c = 0; c < d_v; ++c) {
          const double through = at.decay[size_t(i)] * d_decayed(i, c);
          d_before(i, c) += through;
          d_g[size_t(i)] += through * before(i, c);
          d_g_sum += through * before(i, c);
        }
      if (grads.q) set_row(grads.q, r, d_q);
      if (grads.k) set_row(grads.k, in.k.begin(s) + t, d_k);
      if (grads.v) set_row(grads.v, in.v.begin(s) + t, d_value);
      if (grads.g) vector ? set_row(grads.g, r, d_g) : store(grads.g, offset(grads.g, r), d_g_sum);
      if (grads.beta) store(grads.beta, offset(grads.beta, r), d_beta);
      if (grads.a) set_row(grads.a, r, d_a);
      if (grads.b) set_row(grads.b, r, d_b);
      d_s = d_before;
    }
    if (grads.state)
      for (int64_t i = 0; i < d; ++i)
        for (int64_t c = 0; c < d_v; ++c)
          store(grads.state, s * grads.state.stride[0] + i * grads.state.stride[1] + c * grads.state.stride[2], d_s(i, c));
  }
}

}  // namespace heed::reference
