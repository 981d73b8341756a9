// Loops over the numbers of one row.
#pragma once
#include "kernels/cpu/simd.h"
#include "kernels/kernels.h"

namespace heed::HEED_ISA {

/// A whole vector of a row, or the first n lanes of one.
struct Whole {
  template <class T> HEED_INLINE F get(const T* p) const { return load(p); }
  template <class T> HEED_INLINE void put(T* p, F x) const { store(p, x); }
};
struct Part {
  int n;
  template <class T> HEED_INLINE F get(const T* p) const { return load_part(p, n); }
  template <class T> HEED_INLINE void put(T* p, F x) const { store_part(p, x, n); }
};

/// Calls f(i, part) for i = 0, kLanes, … below count: part is Whole, at the end maybe a Part.
template <class Fn>
HEED_INLINE void over_lanes(int64_t count, Fn&& f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(i, Whole{});
  if (i < count) f(i, Part{int(count - i)});
}

/// 1 / √(mean x² + eps).
HEED_INLINE float rms_factor(const float* x, int64_t count, float eps) {
  F squares[2] = {zero(), zero()};
  over_lanes(count, [&](int64_t i, auto part) {
    const F v = part.get(x + i);
    F& sum = squares[i / kLanes % 2];
    sum = fma(v, v, sum);
  });
  return 1 / std::sqrt(hsum(squares[0] + squares[1]) / float(count) + eps);
}

/// out = act(gate) · up; out may be gate.
inline void glu_row(const float* gate, const float* up, int64_t count, Activation activation, float* out) {
  const auto apply = [&](auto&& active) {
    over_lanes(count, [&](int64_t i, auto part) { part.put(out + i, active(part.get(gate + i)) * part.get(up + i)); });
  };
  if (activation == Activation::Silu) return apply([](F x) { return x * sigmoid(x); });
  // x/2 · (1 + tanh z) = x · σ(2z), with z = √(2/π) · (x + 0.044715 x³).
  apply([](F x) { return x * sigmoid(x * fma(x * x, set(0.071354813f), set(1.5957691f))); });
}

}  // namespace heed::HEED_ISA
