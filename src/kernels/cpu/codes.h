// 32 codes of quantised weights, or 32 activations of 8 bits, at a time: the integer half of the SIMD layer.
//
// A quantised format differs from another only in how its codes lie (quants.h); everything that reads weights, the
// product of one token as well as the unpacking of a panel for many, is written once over these few operations.
#pragma once
#include "kernels/cpu/simd.h"

namespace heed::HEED_ISA {

#if defined(__x86_64__)

using Codes = __m256i;
using Sums = __m256i;  // eight sums of four products: the lower four of codes 0–15, the upper four of 16–31
using Acc = __m256;    // eight f32
inline constexpr int kSums = 8;

HEED_INLINE Codes load_codes(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
/// 16 bytes → 32 codes: the low halves, then the high halves.
HEED_INLINE Codes load_halves(const void* p) {
  const __m128i b = _mm_loadu_si128((const __m128i*)p);
  return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(b, 4), b), _mm256_set1_epi8(15));
}
/// Bits Shift … of every code, as far as mask reaches; mask < 2^(8 − Shift).
template <int Shift>
HEED_INLINE Codes field(Codes c, uint8_t mask) {
  return _mm256_and_si256(_mm256_srli_epi16(c, Shift), _mm256_set1_epi8(char(mask)));
}
/// low + 2^Shift · high, for high < 2^(8 − Shift).
template <int Shift>
HEED_INLINE Codes join(Codes low, Codes high) {
  return _mm256_or_si256(low, _mm256_slli_epi16(high, Shift));
}
/// Adds 16 to code i when bit i is set.
HEED_INLINE Codes add_fifth(Codes c, uint32_t bits) {
#if defined(__AVX512VL__)
  return _mm256_mask_add_epi8(c, bits, c, _mm256_set1_epi8(16));
#else
  const __m256i spread = _mm256_shuffle_epi8(
      _mm256_set1_epi32(int(bits)), _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
  const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
  const __m256i is_set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
  return _mm256_or_si256(c, _mm256_and_si256(is_set, _mm256_set1_epi8(16)));
#endif
}
HEED_INLINE Codes look_up(const int8_t table[16], Codes c) {
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table)), c);
}

#if defined(__AVX512VNNI__)
/// vpdpbusd wants one side without sign: signed codes go in with 128 added, and whoever sums takes it off again.
inline constexpr int kSignedBias = 128;
#else
inline constexpr int kSignedBias = 0;
#endif

/// Products of codes (0 … 127, or Signed) and activations (−127 … 127), summed by fours.
template <bool Signed>
HEED_INLINE Sums dot(Codes w, Codes x) {
#if defined(__AVX512VNNI__)
  if constexpr (Signed) w = _mm256_xor_si256(w, _mm256_set1_epi8(char(0x80)));
  return _mm256_dpbusd_epi32(_mm256_setzero_si256(), w, x);
#else
  if constexpr (Signed) {
    x = _mm256_sign_epi8(x, w);
    w = _mm256_abs_epi8(w);
  }
  return _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1));
#endif
}
/// acc + scale · sums, one scale for all 32 codes (Group 32) or for each 16.
template <int Group>
HEED_INLINE Acc accumulate(Acc acc, Sums sums, const float* scale) {
  __m256 s;
  if constexpr (Group == 32) {
    s = _mm256_broadcast_ss(scale);
  } else {
    const __m256i spread = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    s = _mm256_permutevar8x32_ps(_mm256_castpd_ps(_mm256_broadcast_sd((const double*)scale)), spread);
  }
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), s, acc);
}
HEED_INLINE Acc no_sum() { return _mm256_setzero_ps(); }
HEED_INLINE Acc load_sums(const float* p) { return _mm256_loadu_ps(p); }
HEED_INLINE void store_sums(float* p, Acc x) { _mm256_storeu_ps(p, x); }
HEED_INLINE Acc add_product(Acc acc, Acc a, Acc b) { return _mm256_fmadd_ps(a, b, acc); }
/// x with its first n lanes 0.
HEED_INLINE Acc without_first(Acc x, int n) {
  const __m256i kept = _mm256_cmpgt_epi32(_mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 8), _mm256_set1_epi32(n));
  return _mm256_and_ps(x, _mm256_castsi256_ps(kept));
}
HEED_INLINE float total(Acc a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

/// The codes as numbers: f[i] holds codes i · kLanes ….
template <bool Signed>
HEED_INLINE void widen(Codes c, F f[32 / kLanes]) {
  const __m128i half[2] = {_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1)};
#if defined(__AVX512F__)
  for (int i = 0; i < 2; ++i)
    f[i] = _mm512_cvtepi32_ps(Signed ? _mm512_cvtepi8_epi32(half[i]) : _mm512_cvtepu8_epi32(half[i]));
#else
  for (int i = 0; i < 4; ++i) {
    const __m128i eight = i % 2 ? _mm_srli_si128(half[i / 2], 8) : half[i / 2];
    f[i] = _mm256_cvtepi32_ps(Signed ? _mm256_cvtepi8_epi32(eight) : _mm256_cvtepu8_epi32(eight));
  }
#endif
}

/// kSums half-precision numbers, `stride` bytes apart: inserted one by one, because scalar stores and a wide load in
/// their place would be a failed store forwarding.
template <int stride>
HEED_INLINE Acc load_strided(const void* first) {
  const auto half = [&](int i) {
    uint16_t bits;
    std::memcpy(&bits, static_cast<const char*>(first) + i * stride, 2);
    return int(bits);
  };
  __m128i x = _mm_cvtsi32_si128(half(0));
  x = _mm_insert_epi16(x, half(1), 1);
  x = _mm_insert_epi16(x, half(2), 2);
  x = _mm_insert_epi16(x, half(3), 3);
  x = _mm_insert_epi16(x, half(4), 4);
  x = _mm_insert_epi16(x, half(5), 5);
  x = _mm_insert_epi16(x, half(6), 6);
  return _mm256_cvtph_ps(_mm_insert_epi16(x, half(7), 7));
}

/// kSums pairs of half-precision numbers, `stride` bytes apart: all first ones, then all second ones.
template <int stride>
HEED_INLINE void load_strided_pairs(const void* pairs, Acc& first, Acc& second) {
  const auto four = [&](int from) {
    const auto pair = [&](int i) {
      int bits;
      std::memcpy(&bits, static_cast<const char*>(pairs) + (from + i) * stride, 4);
      return bits;
    };
    __m128i x = _mm_cvtsi32_si128(pair(0));
    x = _mm_insert_epi32(x, pair(1), 1);
    x = _mm_insert_epi32(x, pair(2), 2);
    return _mm_insert_epi32(x, pair(3), 3);
  };
  const __m128i a = four(0), b = four(4), half = _mm_set1_epi32(0xffff);
  first = _mm256_cvtph_ps(_mm_packus_epi32(_mm_and_si128(a, half), _mm_and_si128(b, half)));
  second = _mm256_cvtph_ps(_mm_packus_epi32(_mm_srli_epi32(a, 16), _mm_srli_epi32(b, 16)));
}

/// out[i] = by · byte i.
HEED_INLINE void scale_bytes(uint64_t bytes, float by, float out[8]) {
  const __m256 x = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(bytes))));
  _mm256_storeu_ps(out, _mm256_mul_ps(x, _mm256_set1_ps(by)));
}

/// Rounds kLanes numbers of −127 … 127 to the nearest integers.
HEED_INLINE void store_rounded(int8_t* p, F x) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
#else
  const __m256i i = _mm256_cvtps_epi32(x);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
#endif
}

#else

struct Codes {
  uint8x16_t low, high;
};
struct Sums {
  int32x4_t low, high;
};
using Acc = float32x4_t;
inline constexpr int kSums = 4;

HEED_INLINE Codes load_codes(const void* p) {
  const uint8_t* b = static_cast<const uint8_t*>(p);
  return {vld1q_u8(b), vld1q_u8(b + 16)};
}
HEED_INLINE Codes load_halves(const void* p) {
  const uint8x16_t b = vld1q_u8(static_cast<const uint8_t*>(p));
  return {vandq_u8(b, vdupq_n_u8(15)), vshrq_n_u8(b, 4)};
}
template <int Shift>
HEED_INLINE Codes field(Codes c, uint8_t mask) {
  if constexpr (Shift != 0) c = {vshrq_n_u8(c.low, Shift), vshrq_n_u8(c.high, Shift)};
  return {vandq_u8(c.low, vdupq_n_u8(mask)), vandq_u8(c.high, vdupq_n_u8(mask))};
}
template <int Shift>
HEED_INLINE Codes join(Codes low, Codes high) {
  return {vorrq_u8(low.low, vshlq_n_u8(high.low, Shift)), vorrq_u8(low.high, vshlq_n_u8(high.high, Shift))};
}
HEED_INLINE Codes add_fifth(Codes c, uint32_t bits) {
  const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
  const auto sixteen = [&](uint32_t half) {
    const uint8x16_t spread = vcombine_u8(vdup_n_u8(uint8_t(half)), vdup_n_u8(uint8_t(half >> 8)));
    return vandq_u8(vtstq_u8(spread, bit), vdupq_n_u8(16));
  };
  return {vorrq_u8(c.low, sixteen(bits)), vorrq_u8(c.high, sixteen(bits >> 16))};
}
HEED_INLINE Codes look_up(const int8_t table[16], Codes c) {
  const uint8x16_t t = vld1q_u8(reinterpret_cast<const uint8_t*>(table));
  return {vqtbl1q_u8(t, c.low), vqtbl1q_u8(t, c.high)};
}

inline constexpr int kSignedBias = 0;

HEED_INLINE int32x4_t dot16(uint8x16_t w, uint8x16_t x) {
  const int8x16_t a = vreinterpretq_s8_u8(w), b = vreinterpretq_s8_u8(x);
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(vdupq_n_s32(0), a, b);
#else
  return vpaddlq_s16(vmlal_s8(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vget_high_s8(a), vget_high_s8(b)));
#endif
}
template <bool Signed>
HEED_INLINE Sums dot(Codes w, Codes x) {
  return {dot16(w.low, x.low), dot16(w.high, x.high)};
}
template <int Group>
HEED_INLINE Acc accumulate(Acc acc, Sums sums, const float* scale) {
  if constexpr (Group == 32) return vfmaq_n_f32(acc, vcvtq_f32_s32(vaddq_s32(sums.low, sums.high)), scale[0]);
  acc = vfmaq_n_f32(acc, vcvtq_f32_s32(sums.low), scale[0]);
  return vfmaq_n_f32(acc, vcvtq_f32_s32(sums.high), scale[1]);
}
HEED_INLINE Acc no_sum() { return vdupq_n_f32(0); }
HEED_INLINE Acc load_sums(const float* p) { return vld1q_f32(p); }
HEED_INLINE void store_sums(float* p, Acc x) { vst1q_f32(p, x); }
HEED_INLINE Acc add_product(Acc acc, Acc a, Acc b) { return vfmaq_f32(acc, a, b); }
HEED_INLINE Acc without_first(Acc x, int n) {
  constexpr int32_t lane[4] = {0, 1, 2, 3};
  const uint32x4_t kept = vcgeq_s32(vld1q_s32(lane), vdupq_n_s32(n));
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), kept));
}
HEED_INLINE float total(Acc a) { return vaddvq_f32(a); }

template <bool Signed>
HEED_INLINE void widen(Codes c, F f[32 / kLanes]) {
  const uint8x16_t half[2] = {c.low, c.high};
  for (int i = 0; i < 2; ++i) {
    if constexpr (Signed) {
      const int8x16_t b = vreinterpretq_s8_u8(half[i]);
      const int16x8_t words[2] = {vmovl_s8(vget_low_s8(b)), vmovl_s8(vget_high_s8(b))};
      for (int j = 0; j < 2; ++j) {
        f[4 * i + 2 * j] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(words[j])));
        f[4 * i + 2 * j + 1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(words[j])));
      }
    } else {
      const uint16x8_t words[2] = {vmovl_u8(vget_low_u8(half[i])), vmovl_u8(vget_high_u8(half[i]))};
      for (int j = 0; j < 2; ++j) {
        f[4 * i + 2 * j] = vcvtq_f32_u32(vmovl_u16(vget_low_u16(words[j])));
        f[4 * i + 2 * j + 1] = vcvtq_f32_u32(vmovl_u16(vget_high_u16(words[j])));
      }
    }
  }
}

template <int stride>
HEED_INLINE Acc load_strided(const void* first) {
  const char* p = static_cast<const char*>(first);
  float16x4_t x = vld1_dup_f16(reinterpret_cast<const __fp16*>(p));
  x = vld1_lane_f16(reinterpret_cast<const __fp16*>(p + stride), x, 1);
  x = vld1_lane_f16(reinterpret_cast<const __fp16*>(p + 2 * stride), x, 2);
  x = vld1_lane_f16(reinterpret_cast<const __fp16*>(p + 3 * stride), x, 3);
  return vcvt_f32_f16(x);
}

template <int stride>
HEED_INLINE void load_strided_pairs(const void* pairs, Acc& first, Acc& second) {
  first = load_strided<stride>(pairs);
  second = load_strided<stride>(static_cast<const char*>(pairs) + 2);
}

HEED_INLINE void scale_bytes(uint64_t bytes, float by, float out[8]) {
  const uint16x8_t words = vmovl_u8(vcreate_u8(bytes));
  vst1q_f32(out, vmulq_n_f32(vcvtq_f32_u32(vmovl_u16(vget_low_u16(words))), by));
  vst1q_f32(out + 4, vmulq_n_f32(vcvtq_f32_u32(vmovl_u16(vget_high_u16(words))), by));
}

HEED_INLINE void store_rounded(int8_t* p, F x) {
  const int16x4_t words = vqmovn_s32(vcvtnq_s32_f32(x));
  const int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
  vst1_lane_s32(reinterpret_cast<int32_t*>(p), vreinterpret_s32_s8(bytes), 0);
}

#endif

}  // namespace heed::HEED_ISA
