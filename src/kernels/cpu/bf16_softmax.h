// The online softmax of 16 queries against one or two units of keys, lane = query, without a pass for the maximum: weights
// are 2^(x − m) with the m of earlier keys, and only a sum above kLargestSum makes a lane look for its true maximum. Each
// lane decides for itself, so a row's result does not depend on the rows beside it.
#pragma once
#include "kernels/cpu/bf16_products.h"

namespace heed::HEED_ISA {

#if defined(HEED_BF16_DOT)

inline constexpr float kLargestSum = 4096;  // far from overflow; bf16 weights keep their relative precision up to it

/// The keys of a unit that each of 16 lanes sees, bit j for key j; `all`: every lane sees every key.
struct Seen {
  __m512i words;
  bool all;
};

/// s [unit][key tile][group][16][16] of one group; calls body(x, place) for each key, x = score · factor − shift.
template <bool Masked>
HEED_INLINE F weigh(const float* s, int units, const Seen* seen, F factor, F shift, uint32_t* p) {
  F even_sum = zero(), odd_sum = zero();
  const F less_shift = zero() - shift;
  for (int u = 0; u < units; ++u, s += 4 * kTileFloats, p += 2 * kTileWords) {
    __m512i words = Masked ? seen[u].words : _mm512_setzero_si512();
    for (int t = 0; t < 2; ++t)
#pragma GCC unroll 4
      for (int r = 0; r < 16; r += 2) {
        const float* at = s + t * 2 * kTileFloats + r * 16;
        F even = exp2<3>(fma(load(at), factor, less_shift)), odd = exp2<3>(fma(load(at + 16), factor, less_shift));
        if constexpr (Masked) {
          even = _mm512_maskz_mov_ps(_mm512_test_epi32_mask(words, _mm512_set1_epi32(1)), even);
          odd = _mm512_maskz_mov_ps(_mm512_test_epi32_mask(words, _mm512_set1_epi32(2)), odd);
          words = _mm512_srli_epi32(words, 2);
        }
        even_sum = even_sum + even;
        odd_sum = odd_sum + odd;
        _mm512_storeu_si512(p + (t * 8 + r / 2) * 16, pair_bf16(even, odd));
      }
  }
  return even_sum + odd_sum;
}

/// The largest logit (log2) that each lane sees, −∞ where none.
inline F largest(const float* s, int units, const Seen* seen, F factor) {
  F top = set(-INFINITY);
  for (int u = 0; u < units; ++u, s += 4 * kTileFloats)
    for (int j = 0; j < kUnit; ++j) {
      const F x = load(s + j / 16 * 2 * kTileFloats + j % 16 * 16) * factor;
      const M sees = seen[u].all ? M(0xffff) : _mm512_test_epi32_mask(seen[u].words, _mm512_set1_epi32(int32_t(1u << j)));
      top = _mm512_mask_max_ps(top, sees, top, x);
    }
  return top;
}

/// Adds one or two units to a group's softmax: p receives their weights; high and sum are the lanes' state in log2.
/// rescale(by) is called when what was summed before is worth `by` of itself from now on.
template <class Rescale>
HEED_INLINE void soften(const float* s, int units, const Seen* seen, F factor, uint32_t* p, float* high, float* sum,
                        Rescale&& rescale) {
  const bool masked = !seen[0].all || (units > 1 && !seen[1].all);
  Seen each[2] = {seen[0], seen[units - 1]};
  if (masked)
    for (Seen& e : each)
      if (e.all) e.words = _mm512_set1_epi32(-1);
  const F unset = set(-INFINITY);
  F m = load(high);
  M fresh = less_equal(m, unset);
  if (any(fresh)) {
    m = where(fresh, largest(s, units, seen, factor), m);
    store(high, m);
    fresh = less_equal(m, unset);
  }
  const auto total = [&] {
    const F shift = any(fresh) ? where(fresh, zero(), m) : m;
    return masked ? weigh<true>(s, units, each, factor, shift, p) : weigh<false>(s, units, each, factor, shift, p);
  };
  F added = total();
  const M fits = less_equal(added, set(kLargestSum));
  F before = load(sum);
  if (fits != M(0xffff)) [[unlikely]] {
    const F raised = where(fits, m, max(m, largest(s, units, seen, factor)));
    const F by = where(fits, set(1), exp2(m - raised));
    rescale(by);
    before = before * by;
    m = raised;
    store(high, m);
    added = total();
  }
  store(sum, before + added);
}

#endif

}  // namespace heed::HEED_ISA
