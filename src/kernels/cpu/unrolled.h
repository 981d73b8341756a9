// Loops over constants.
#pragma once
#include <utility>

namespace heed::HEED_ISA {

#define HEED_LAMBDA __attribute__((always_inline))

/// f(0) … f(N − 1) with constant arguments. Sums indexed by these stay in registers; g++ 12 unrolls loops too late for that
/// and clears, copies and reloads all of them on the stack around every block (a sixth of the time of attention at d = 64).
template <int N, class Fn, int... I>
inline __attribute__((always_inline)) void unrolled(Fn&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>()), ...);
}
template <int N, class Fn>
inline __attribute__((always_inline)) void unrolled(Fn&& f) {
  unrolled<N>(f, std::make_integer_sequence<int, N>());
}

}  // namespace heed::HEED_ISA
