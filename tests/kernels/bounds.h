// How far a kernel may be from the oracle. kernels.h states the units; here they meet each kernel's operands.
#pragma once
#include <cmath>

#include "base/dtype.h"

namespace heed::test {

/// The unit of a result made of operands of this type by sums of `terms` numbers.
inline double unit(Dtype type, double terms) {
  if (type == Dtype::BF16) return 0x1p-7;
  if (type == Dtype::F16) return 0x1p-10;
  return 0x1p-18 * std::sqrt(terms);
}

/// The coarsest of the operands' units.
inline double unit(Dtype a, Dtype b, double terms) { return std::max(unit(a, terms), unit(b, terms)); }

/// Relative error of a probability whose logit is as large as `logit`: products of any type are exact in f32, their sum
/// and scaling lose some last bits.
inline double logit_error(double logit) { return 0x1p-21 * logit; }

/// How much a logit may change when queries are rounded to the BF16 of their keys: five deviations of a sum of d products,
/// each with an error of up to 2^-8 of itself, for queries and keys whose directions have nothing in common.
inline double rounded_query(Dtype q, Dtype k, double logit, double d) {
  return q != Dtype::BF16 && k == Dtype::BF16 ? 0x1p-7 * logit / std::sqrt(d) : 0;
}

/// attend, attend_store: out is a mean of values of at most `value`, lse a logarithm of a sum.
inline double attend_out(double unit, double logit, double value, double rounded = 0) {
  return (unit + 2 * (logit_error(logit) + rounded)) * value;
}
inline double attend_lse(double unit, double logit, double rounded = 0) {
  return unit + logit_error(logit) + 0x1p-22 * logit + rounded;
}

/// attend_backward: P and dS are each rounded to the operands' type once before they are multiplied.
inline double gradient(double unit, double logit, double largest) {
  return (4 * unit + 8 * logit_error(logit)) * largest + 1e-6;
}

/// observe: sums of probabilities.
inline double statistic(double unit, double logit, double largest) {
  return (unit + 2 * logit_error(logit)) * std::max(largest, 1.0);
}

/// Elementwise f32 work and short sums.
inline double plain(double terms, double scale) { return 0x1p-20 * std::sqrt(terms) * scale + 1e-30; }

/// recur: states are f32 whatever the operands; corrections compound over rows.
inline double recurrence(double unit, double rows, double largest) {
  return (unit + 0x1p-18 * std::sqrt(rows)) * std::max(largest, 1e-3);
}

/// matmul: |y − y'| for an activation row of root mean square `x_rms` and a weight row of norm `w_norm`. Quantised weights
/// allow activations of 8 bits with a scale for each 32; bf16 and f16 ones allow activations of that type.
inline double product(Dtype weights, double x_rms, double x_largest, double w_norm, double inputs) {
  if (weights == Dtype::F32) return 0x1p-20 * std::sqrt(inputs) * x_rms * w_norm + 1e-6;
  if (is_block(weights)) return (0x1p-7 * x_rms + 6 * x_largest / 254 / std::sqrt(3.0)) * w_norm + 1e-6;
  return 0x1p-6 * x_rms * w_norm + 1e-6;
}

}  // namespace heed::test
