// The recurrence one row after another, shared by recur and its gradient.
#pragma once
#include "kernels/reference/reference.h"

namespace heed::reference {

/// A d × d_v matrix of f64.
struct Matrix {
  int64_t rows, cols;
  std::vector<double> values;
  Matrix(int64_t rows, int64_t cols) : rows(rows), cols(cols), values(size_t(rows * cols), 0.0) {}
  double& operator()(int64_t r, int64_t c) { return values[size_t(r * cols + c)]; }
  double operator()(int64_t r, int64_t c) const { return values[size_t(r * cols + c)]; }
  /// x^T M and M y.
  std::vector<double> left(const std::vector<double>& x) const;
  std::vector<double> right(const std::vector<double>& y) const;
  /// += factor · x y^T.
  void add(double factor, const std::vector<double>& x, const std::vector<double>& y);
};

/// The inputs of row `at`, which counts the rows of one segment.
struct RecurRow {
  std::vector<double> q, k, v, decay, a, b;  // decay: e^g, one for each channel
  double beta = 1;
};

void check_recur(const char* where, const RecurInputs& in, const Recur& how);
RecurRow recur_row(const RecurInputs& in, const Recur& how, int64_t segment, int64_t at);
Matrix initial_state(const RecurInputs& in, int64_t segment);
/// S_{t−1} becomes S_t.
void recur_step(const RecurRow& row, const Recur& how, Matrix& state);
double recur_scale(const RecurInputs& in, const Recur& how);

}  // namespace heed::reference
