#include "kernels/reference/recur.h"

#include "kernels/check.h"

namespace heed::reference {

std::vector<double> Matrix::left(const std::vector<double>& x) const {
  std::vector<double> out(size_t(cols), 0.0);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) out[size_t(c)] += x[size_t(r)] * (*this)(r, c);
  return out;
}

std::vector<double> Matrix::right(const std::vector<double>& y) const {
  std::vector<double> out(size_t(rows), 0.0);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) out[size_t(r)] += (*this)(r, c) * y[size_t(c)];
  return out;
}

void Matrix::add(double factor, const std::vector<double>& x, const std::vector<double>& y) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) (*this)(r, c) += factor * x[size_t(r)] * y[size_t(c)];
}

void check_recur(const char* where, const RecurInputs& in, const Recur& how) {
  const int64_t segments = in.q.segments(), d = width(in.q.values), d_v = width(in.v.values), rows = in.q.values.size[0];
  require(is_float(in.q.values.type) && is_float(in.k.values.type) && is_float(in.v.values.type), where,
          "q, k and v are F32, BF16 or F16");
  require(in.k.segments() == segments && in.v.segments() == segments, where, "q, k and v have the same segments");
  require(width(in.k.values) == d, where, "q and k differ in width");
  require(in.k.values.size[0] == rows && in.v.values.size[0] == rows, where, "q, k and v have the same rows");
  if (how.decay == Recur::Decay::Scalar) check_tensor(where, "g", in.g, {rows});
  if (how.decay == Recur::Decay::Vector) check_tensor(where, "g", in.g, {rows, d});
  if (how.correction == Recur::Correction::Delta) check_tensor(where, "beta", in.beta, {rows});
  if (how.correction == Recur::Correction::LowRank) {
    check_tensor(where, "a", in.a, {rows, d});
    check_tensor(where, "b", in.b, {rows, d});
  }
  check_tensor(where, "state", in.state, {segments, d, d_v}, true);
  check_tensor(where, "z", in.z, {segments, d}, true);
}

RecurRow recur_row(const RecurInputs& in, const Recur& how, int64_t segment, int64_t at) {
  const int64_t r = in.q.begin(segment) + at;  // one number a row is indexed as q's rows are
  RecurRow out{
      row(in.q.values, r), row(in.k.values, in.k.begin(segment) + at), row(in.v.values, in.v.begin(segment) + at), {}, {}, {}};
  out.decay.assign(out.q.size(), 1.0);
  if (how.decay == Recur::Decay::Scalar) out.decay.assign(out.q.size(), std::exp(number(in.g, r)));
  if (how.decay == Recur::Decay::Vector)
    for (size_t c = 0; c < out.decay.size(); ++c) out.decay[c] = std::exp(number(in.g, r, int64_t(c)));
  if (how.correction == Recur::Correction::Delta) out.beta = number(in.beta, r);
  if (how.correction == Recur::Correction::LowRank) {
    out.a = row(in.a, r);
    out.b = row(in.b, r);
  }
  return out;
}

Matrix initial_state(const RecurInputs& in, int64_t segment) {
  Matrix out(width(in.q.values), width(in.v.values));
  if (in.state)
    for (int64_t r = 0; r < out.rows; ++r)
      for (int64_t c = 0; c < out.cols; ++c) out(r, c) = number(in.state.select(0, segment), r, c);
  return out;
}

double recur_scale(const RecurInputs& in, const Recur& how) {
  return how.scale != 0 ? double(how.scale) : 1 / std::sqrt(double(width(in.q.values)));
}

void recur_step(const RecurRow& row, const Recur& how, Matrix& state) {
  std::vector<double> low_rank;
  if (how.correction == Recur::Correction::LowRank) low_rank = state.left(row.a);  // of S_{t−1}, before it decays
  for (int64_t r = 0; r < state.rows; ++r)
    for (int64_t c = 0; c < state.cols; ++c) state(r, c) *= row.decay[size_t(r)];
  std::vector<double> v = row.v;
  if (how.correction == Recur::Correction::LowRank) state.add(1, row.b, low_rank);
  if (how.correction == Recur::Correction::Delta) {
    const std::vector<double> known = state.left(row.k);
    for (size_t c = 0; c < v.size(); ++c) v[c] -= known[c];
  }
  state.add(row.beta, row.k, v);
}

void recur(Queue&, const RecurInputs& in, const Recur& how, Tensor out, Tensor state, Tensor z) {
  constexpr const char* where = "recur";
  check_recur(where, in, how);
  const int64_t segments = in.q.segments(), d = width(in.q.values), d_v = width(in.v.values);
  check_tensor(where, "out", out, {in.q.values.size[0], d_v});
  check_tensor(where, "state", state, {segments, d, d_v}, true);
  check_tensor(where, "z", z, {segments, d}, true);
  const double scale = recur_scale(in, how);
  for (int64_t s = 0; s < segments; ++s) {
    Matrix held = initial_state(in, s);
    std::vector<double> norm(size_t(d), 0.0);
    if (how.normalise && in.z) norm = row(in.z, s);
    for (int64_t t = 0; t < in.q.length(s); ++t) {
      const RecurRow at = recur_row(in, how, s, t);
      recur_step(at, how, held);
      std::vector<double> result = held.left(at.q);
      double divisor = 1;
      if (how.normalise) {
        divisor = 0;
        for (size_t c = 0; c < norm.size(); ++c) {
          norm[c] = at.decay[c] * norm[c] + at.k[c];
          divisor += norm[c] * at.q[c];
        }
      }
      for (double& x : result) x = divisor == 0 ? 0 : scale * x / divisor;
      set_row(out, in.q.begin(s) + t, result);
    }
    if (state)
      for (int64_t r = 0; r < d; ++r)
        for (int64_t c = 0; c < d_v; ++c)
          store(state, s * state.stride[0] + r * state.stride[1] + c * state.stride[2], held(r, c));
    if (z) set_row(z, s, norm);
  }
}

}  // namespace heed::reference
