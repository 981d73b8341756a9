// Rotary embedding of one row, with angles as good as f64's.
#pragma once
#include <vector>

#include "kernels/cpu/simd.h"
#include "kernels/kernels.h"

namespace heed::HEED_ISA {

/// sin and cos of x turns, |x| ≤ 1/2; absolute error 1e-7.
HEED_INLINE void sin_cos_turns(F x, F& sine, F& cosine) {
  // Half turns away: both change sign together, and a quarter turn is left.
  const F halves = round(x + x);
  const F t = fma(halves, set(-0.5f), x) * set(6.28318531f), t2 = t * t;
  F s = set(-2.50521084e-8f), c = set(2.08767570e-9f);
  s = fma(s, t2, set(2.75573192e-6f));
  s = fma(s, t2, set(-1.98412698e-4f));
  s = fma(s, t2, set(8.33333333e-3f));
  s = fma(s, t2, set(-1.66666667e-1f));
  c = fma(c, t2, set(-2.75573192e-7f));
  c = fma(c, t2, set(2.48015873e-5f));
  c = fma(c, t2, set(-1.38888889e-3f));
  c = fma(c, t2, set(4.16666667e-2f));
  c = fma(c, t2, set(-0.5f));
  const F sign = set(1) - set(2) * abs(halves);  // halves is −1, 0 or 1
  sine = fma(s * t2, t, t) * sign;
  cosine = fma(c, t2, set(1)) * sign;
}

/// Turns of each pair at position 1, in f64: the angle of position 10^6 keeps 9 digits after it is reduced.
struct Turns {
  const Rope* rope = nullptr;
  const double* each = nullptr;  // [dims / 2]
};

inline void turns_of(const Rope& rope, double* each) {
  for (int i = 0; i < rope.dims / 2; ++i)
    each[i] = double(rope.inv_freq.as<float>()[i * rope.inv_freq.stride[0]]) / 6.283185307179586;
}

/// Turns the first dims numbers of x.
inline void rotate_row(const Turns& turns, int64_t position, float* x) {
  const int half = turns.rope->dims / 2;
  for (int i = 0; i < half; i += kLanes) {
    const int n = half - i < kLanes ? half - i : kLanes;
    alignas(64) float angle[kLanes] = {}, sine[kLanes], cosine[kLanes];
    for (int j = 0; j < n; ++j) {
      const double t = double(position) * turns.each[i + j];
      angle[j] = float(t - std::rint(t));
    }
    F s, c;
    sin_cos_turns(load(angle), s, c);
    if (turns.rope->neox) {
      const F a = load_part(x + i, n), b = load_part(x + half + i, n);
      store_part(x + i, a * c - b * s, n);
      store_part(x + half + i, a * s + b * c, n);
      continue;
    }
    store(sine, s);
    store(cosine, c);
    for (int j = 0; j < n; ++j) {
      float& a = x[2 * (i + j)];
      float& b = x[2 * (i + j) + 1];
      const float turned = a * cosine[j] - b * sine[j];
      b = a * sine[j] + b * cosine[j];
      a = turned;
    }
  }
}

}  // namespace heed::HEED_ISA
