// The SIMD layer: one native f32 vector and the few operations that kernels need, the same on every instruction set.
//
// F is kLanes floats; +, −, *, / work on it as on a float. M is a lane mask. `_part` forms touch only the first n lanes
// of memory (0 ≤ n ≤ kLanes) and read the rest as 0. Nothing here needs alignment.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "base/dtype.h"

#if defined(__x86_64__)
// g++ 12 calls its own intrinsics' undefined operands uninitialised.
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#else
#include <arm_neon.h>
#endif

namespace heed::HEED_ISA {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

#define HEED_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)

using F = __m512;
using M = __mmask16;
inline constexpr int kLanes = 16;

HEED_INLINE F set(float x) { return _mm512_set1_ps(x); }
HEED_INLINE F zero() { return _mm512_setzero_ps(); }
HEED_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
HEED_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
HEED_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
HEED_INLINE F abs(F a) { return _mm512_abs_ps(a); }
HEED_INLINE F sqrt(F a) { return _mm512_sqrt_ps(a); }
HEED_INLINE F round(F a) { return _mm512_roundscale_ps(a, 0x08); }
HEED_INLINE float hsum(F a) { return _mm512_reduce_add_ps(a); }
HEED_INLINE float hmax(F a) { return _mm512_reduce_max_ps(a); }
HEED_INLINE float hmin(F a) { return _mm512_reduce_min_ps(a); }

HEED_INLINE M first(int n) { return M((1u << n) - 1); }
HEED_INLINE M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
HEED_INLINE M less_equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
HEED_INLINE M both(M a, M b) { return M(a & b); }
HEED_INLINE F where(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
HEED_INLINE bool any(M m) { return m != 0; }

HEED_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
HEED_INLINE F load(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
HEED_INLINE F load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
HEED_INLINE F load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
HEED_INLINE F load(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
HEED_INLINE F load(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
HEED_INLINE F load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }

HEED_INLINE __m256i to_bf16(F x) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i near = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), near, quiet));
#endif
}
HEED_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
HEED_INLINE void store(bf16* p, F x) { _mm256_storeu_si256((__m256i*)p, to_bf16(x)); }
HEED_INLINE void store(f16* p, F x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, 0x08)); }
HEED_INLINE void store_part(float* p, F x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }

/// 2^floor(x) · y, and x − floor(x): the two halves of an exponential. −∞ gives 0.
HEED_INLINE F fraction(F x) { return _mm512_reduce_ps(x, 0x09); }
HEED_INLINE F scale_exponent(F y, F x) { return _mm512_scalef_ps(y, x); }

HEED_INLINE F sum_quads(F a, F b, F c, F d) {
  const F ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b),
          cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
  return _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
}
HEED_INLINE F sum_fours(const F x[4]) {
  const F ab = _mm512_shuffle_f32x4(x[0], x[1], 0x88) + _mm512_shuffle_f32x4(x[0], x[1], 0xdd);
  const F cd = _mm512_shuffle_f32x4(x[2], x[3], 0x88) + _mm512_shuffle_f32x4(x[2], x[3], 0xdd);
  return _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);
}
HEED_INLINE void interleave(F even, F odd, F& low, F& high) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  low = _mm512_permutex2var_ps(even, first, odd);
  high = _mm512_permutex2var_ps(even, _mm512_add_epi32(first, _mm512_set1_epi32(8)), odd);
}
HEED_INLINE void load_even_odd(const bf16* p, F& even, F& odd) {
  const __m512i x = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000))));
}
HEED_INLINE void load_nibbles(const uint8_t* p, F& even, F& odd) {
  const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  even = _mm512_cvtepi32_ps(_mm512_and_si512(x, _mm512_set1_epi32(15)));
  odd = _mm512_cvtepi32_ps(_mm512_srli_epi32(x, 4));
}
HEED_INLINE void load_quarters(const uint8_t* p, F& even, F& odd) {
  const __m128i b = _mm_loadl_epi64((const __m128i*)p);
  const __m512i x = _mm512_srlv_epi32(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(b, b)), _mm512_set1_epi64(int64_t(4) << 32));
  even = _mm512_cvtepi32_ps(_mm512_and_si512(x, _mm512_set1_epi32(3)));
  odd = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(x, 2), _mm512_set1_epi32(3)));
}

#elif defined(__AVX2__)

using F = __m256;
using M = __m256;
inline constexpr int kLanes = 8;

HEED_INLINE F set(float x) { return _mm256_set1_ps(x); }
HEED_INLINE F zero() { return _mm256_setzero_ps(); }
HEED_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
HEED_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
HEED_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
HEED_INLINE F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
HEED_INLINE F sqrt(F a) { return _mm256_sqrt_ps(a); }
HEED_INLINE F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
HEED_INLINE float hsum(F a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
HEED_INLINE float hmax(F a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
HEED_INLINE float hmin(F a) {
  __m128 x = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_min_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_min_ss(x, _mm_movehdup_ps(x)));
}

HEED_INLINE M first(int n) {
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
}
HEED_INLINE M less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
HEED_INLINE M less_equal(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
HEED_INLINE M both(M a, M b) { return _mm256_and_ps(a, b); }
HEED_INLINE F where(M m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
HEED_INLINE bool any(M m) { return _mm256_movemask_ps(m) != 0; }

HEED_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
HEED_INLINE F load(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
HEED_INLINE F load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
HEED_INLINE F load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
HEED_INLINE F load(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
HEED_INLINE F load(const int32_t* p) { return _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i*)p)); }
HEED_INLINE F load_part(const float* p, int n) { return _mm256_maskload_ps(p, _mm256_castps_si256(first(n))); }

HEED_INLINE __m128i to_bf16(F x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i near = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  const __m256i w = _mm256_blendv_epi8(near, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  return _mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
}
HEED_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
HEED_INLINE void store(bf16* p, F x) { _mm_storeu_si128((__m128i*)p, to_bf16(x)); }
HEED_INLINE void store(f16* p, F x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
HEED_INLINE void store_part(float* p, F x, int n) { _mm256_maskstore_ps(p, _mm256_castps_si256(first(n)), x); }

HEED_INLINE F fraction(F x) {
  x = min(set(128), max(set(-127), x));
  return x - _mm256_floor_ps(x);
}
HEED_INLINE F scale_exponent(F y, F x) {
  const F inside = min(set(128), max(set(-127), x));
  const __m256i e = _mm256_cvtps_epi32(_mm256_floor_ps(inside));
  const F scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), _mm256_slli_epi32(e, 23)));
  return _mm256_and_ps(scaled, _mm256_cmp_ps(x, set(-126), _CMP_NLT_UQ));
}

HEED_INLINE F sum_quads(F a, F b, F c, F d) {
  const F ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b),
          cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
  return _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xee);
}
HEED_INLINE F sum_fours(const F x[2]) {
  return _mm256_permute2f128_ps(x[0], x[1], 0x20) + _mm256_permute2f128_ps(x[0], x[1], 0x31);
}
HEED_INLINE void interleave(F even, F odd, F& low, F& high) {
  const F a = _mm256_unpacklo_ps(even, odd), b = _mm256_unpackhi_ps(even, odd);
  low = _mm256_permute2f128_ps(a, b, 0x20);
  high = _mm256_permute2f128_ps(a, b, 0x31);
}
HEED_INLINE void load_even_odd(const bf16* p, F& even, F& odd) {
  const __m256i x = _mm256_loadu_si256((const __m256i*)p);
  even = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
  odd = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(int(0xffff0000))));
}
HEED_INLINE void load_nibbles(const uint8_t* p, F& even, F& odd) {
  const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  even = _mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(15)));
  odd = _mm256_cvtepi32_ps(_mm256_srli_epi32(x, 4));
}
HEED_INLINE void load_quarters(const uint8_t* p, F& even, F& odd) {
  int32_t four;
  std::memcpy(&four, p, 4);
  const __m128i b = _mm_cvtsi32_si128(four);
  const __m256i x = _mm256_srlv_epi32(_mm256_cvtepu8_epi32(_mm_unpacklo_epi8(b, b)), _mm256_set1_epi64x(int64_t(4) << 32));
  even = _mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(3)));
  odd = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(x, 2), _mm256_set1_epi32(3)));
}

#else

using F = float32x4_t;
using M = uint32x4_t;
inline constexpr int kLanes = 4;

HEED_INLINE F set(float x) { return vdupq_n_f32(x); }
HEED_INLINE F zero() { return vdupq_n_f32(0); }
HEED_INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
HEED_INLINE F max(F a, F b) { return vmaxq_f32(a, b); }
HEED_INLINE F min(F a, F b) { return vminq_f32(a, b); }
HEED_INLINE F abs(F a) { return vabsq_f32(a); }
HEED_INLINE F sqrt(F a) { return vsqrtq_f32(a); }
HEED_INLINE F round(F a) { return vrndnq_f32(a); }
HEED_INLINE float hsum(F a) { return vaddvq_f32(a); }
HEED_INLINE float hmax(F a) { return vmaxvq_f32(a); }
HEED_INLINE float hmin(F a) { return vminvq_f32(a); }

HEED_INLINE M first(int n) {
  constexpr uint32_t lane[4] = {0, 1, 2, 3};
  return vcltq_u32(vld1q_u32(lane), vdupq_n_u32(uint32_t(n)));
}
HEED_INLINE M less(F a, F b) { return vcltq_f32(a, b); }
HEED_INLINE M less_equal(F a, F b) { return vcleq_f32(a, b); }
HEED_INLINE M both(M a, M b) { return vandq_u32(a, b); }
HEED_INLINE F where(M m, F a, F b) { return vbslq_f32(m, a, b); }
HEED_INLINE bool any(M m) { return vmaxvq_u32(m) != 0; }

HEED_INLINE F load(const float* p) { return vld1q_f32(p); }
HEED_INLINE F load(const bf16* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t*)p), 16)); }
HEED_INLINE F load(const f16* p) { return vcvt_f32_f16(vld1_f16((const __fp16*)p)); }
HEED_INLINE F load(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  const int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(four));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
}
HEED_INLINE F load(const uint8_t* p) {
  uint32_t four;
  std::memcpy(&four, p, 4);
  const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(four));
  return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))));
}
HEED_INLINE F load(const int32_t* p) { return vcvtq_f32_s32(vld1q_s32(p)); }
HEED_INLINE F load_part(const float* p, int n) {
  float all[4] = {};
  std::memcpy(all, p, size_t(n) * 4);
  return load(all);
}

HEED_INLINE uint16x4_t to_bf16(F x) {
  const uint32x4_t u = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t near = vshrq_n_u32(vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd), 16);
  const uint32x4_t quiet = vorrq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(0x40));
  return vmovn_u32(vbslq_u32(vceqq_f32(x, x), near, quiet));
}
HEED_INLINE void store(float* p, F x) { vst1q_f32(p, x); }
HEED_INLINE void store(bf16* p, F x) { vst1_u16((uint16_t*)p, to_bf16(x)); }
HEED_INLINE void store(f16* p, F x) { vst1_f16((__fp16*)p, vcvt_f16_f32(x)); }
HEED_INLINE void store_part(float* p, F x, int n) {
  float all[4];
  store(all, x);
  std::memcpy(p, all, size_t(n) * 4);
}

HEED_INLINE F fraction(F x) {
  x = min(set(128), max(set(-127), x));
  return x - vrndmq_f32(x);
}
HEED_INLINE F scale_exponent(F y, F x) {
  const F inside = min(set(128), max(set(-127), x));
  const int32x4_t e = vcvtmq_s32_f32(inside);
  const F scaled = vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(y), vshlq_n_s32(e, 23)));
  return vbslq_f32(vcltq_f32(x, set(-126)), set(0), scaled);
}

HEED_INLINE F sum_quads(F a, F b, F c, F d) { return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)); }
HEED_INLINE F sum_fours(const F x[1]) { return x[0]; }
HEED_INLINE void interleave(F even, F odd, F& low, F& high) {
  low = vzip1q_f32(even, odd);
  high = vzip2q_f32(even, odd);
}
HEED_INLINE void load_even_odd(const bf16* p, F& even, F& odd) {
  const uint32x4_t x = vreinterpretq_u32_u16(vld1q_u16((const uint16_t*)p));
  even = vreinterpretq_f32_u32(vshlq_n_u32(x, 16));
  odd = vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000)));
}
HEED_INLINE void load_nibbles(const uint8_t* p, F& even, F& odd) {
  uint32_t four;
  std::memcpy(&four, p, 4);
  const uint32x4_t x = vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
  even = vcvtq_f32_u32(vandq_u32(x, vdupq_n_u32(15)));
  odd = vcvtq_f32_u32(vshrq_n_u32(x, 4));
}
HEED_INLINE void load_quarters(const uint8_t* p, F& even, F& odd) {
  const uint32_t lanes[4] = {p[0], uint32_t(p[0]) >> 4, p[1], uint32_t(p[1]) >> 4};
  const uint32x4_t x = vld1q_u32(lanes), three = vdupq_n_u32(3);
  even = vcvtq_f32_u32(vandq_u32(x, three));
  odd = vcvtq_f32_u32(vandq_u32(vshrq_n_u32(x, 2), three));
}

#endif

// sum_fours of kLanes / 4 results of sum_quads is a vector of kLanes sums: lane 4 i + j is the sum of the lanes of argument j
// of the i-th sum_quads. interleave: low and high are even[0], odd[0], even[1], …. load_even_odd, load_nibbles (4 bits) and
// load_quarters (2 bits) read 2 · kLanes numbers, the first in the low bits: the even ones and the odd ones.

/// The parts that need no instruction of their own.
template <class T>
HEED_INLINE F load_part(const T* p, int n) {
  T all[kLanes] = {};
  std::memcpy(static_cast<void*>(all), p, size_t(n) * sizeof(T));
  return load(all);
}
template <class T>
HEED_INLINE void store_part(T* p, F x, int n) {
  T all[kLanes];
  store(all, x);
  std::memcpy(static_cast<void*>(p), all, size_t(n) * sizeof(T));
}

/// 2^x by a minimax polynomial of 2^(x − floor x); relative error 8e-8 at degree 5, 3e-6 at 4, 9e-5 at 3 (enough where
/// the result is rounded to bf16 next). Below 2^-126 the result is 0, or a denormal that flushing makes 0.
template <int Degree = 5>
HEED_INLINE F exp2(F x) {
  static_assert(Degree >= 3 && Degree <= 5);
  const F r = fraction(x);
  F p;
  if constexpr (Degree == 5) {
    p = fma(set(0.00186713007f), r, set(0.00901703032f));
    p = fma(p, r, set(0.0557999131f));
    p = fma(p, r, set(0.24016445f));
    p = fma(p, r, set(0.693151312f));
  } else if constexpr (Degree == 4) {
    p = fma(set(0.0134266843f), r, set(0.0522424742f));
    p = fma(p, r, set(0.241280205f));
    p = fma(p, r, set(0.693044845f));
  } else {
    p = fma(set(0.077067042f), r, set(0.227644991f));
    p = fma(p, r, set(0.695116786f));
  }
  return scale_exponent(fma(p, r, set(1)), x);
}

inline constexpr float kLog2e = 1.44269504f;

/// e^x. The product with log2 e rounds, so the relative error grows with |x| · 2^-24.
template <int Degree = 5>
HEED_INLINE F exp(F x) {
  return exp2<Degree>(x * set(kLog2e));
}

HEED_INLINE F sigmoid(F x) { return set(1) / (set(1) + exp(set(0) - x)); }

/// Absolute error 2^-22.
HEED_INLINE F tanh(F x) {
  const F e = exp2(abs(x) * set(-2 * kLog2e));
  const F t = (set(1) - e) / (set(1) + e);
  return where(less(x, zero()), zero() - t, t);
}

#if defined(__AVX512BF16__)
#define HEED_BF16_DOT 1
/// acc[i] + a[2i]·b[2i] + a[2i+1]·b[2i+1] on 32 bf16 numbers held in a and b. Denormals are flushed.
HEED_INLINE F dot_bf16(F acc, __m512i a, __m512i b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
/// Lanes of `even` and `odd` as bf16 pairs: word 2i from even, 2i + 1 from odd.
HEED_INLINE __m512i pair_bf16(F even, F odd) {
  alignas(64) static constexpr uint16_t riffle[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(riffle), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}
#endif

// Products of 16-bit integers in pairs, where an instruction makes twice as many as FMA makes of f32: a word is a pair, the first
// number in its low half. NEON's long products and AVX-512's without VNNI are no faster than FMA, matrix registers faster.
// half_of: of each pair its first or second number. add_pairs: sum[i] + a[2i]·b[2i] + a[2i+1]·b[2i+1]. store_integers and store_pairs (words of even and odd):
// numbers rounded to the nearest, which must fit.
#if defined(__AVX512VNNI__) && !defined(__AMX_BF16__)
#define HEED_PAIR_DOT 1
using Words = __m512i;
HEED_INLINE Words load_words(const int16_t* p) { return _mm512_loadu_si512(p); }
HEED_INLINE Words set_word(int32_t word) { return _mm512_set1_epi32(word); }
/// Not the intrinsic: g++ 12 keeps its sums in memory (24 of them, each stored in every step).
HEED_INLINE Words add_pairs(Words sum, Words a, Words b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
HEED_INLINE F to_float(Words x) { return _mm512_cvtepi32_ps(x); }
HEED_INLINE Words half_of(Words x, bool high) { return _mm512_srai_epi32(high ? x : _mm512_slli_epi32(x, 16), 16); }
HEED_INLINE void store_integers(int16_t* p, F x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x)));
}
HEED_INLINE void store_pairs(int16_t* p, F even, F odd) {
  const __m512i high = _mm512_slli_epi32(_mm512_cvtps_epi32(odd), 16);
  _mm512_storeu_si512(p, _mm512_mask_mov_epi16(high, 0x55555555, _mm512_cvtps_epi32(even)));
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
#define HEED_PAIR_DOT 1
using Words = __m256i;
HEED_INLINE Words load_words(const int16_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
HEED_INLINE Words set_word(int32_t word) { return _mm256_set1_epi32(word); }
/// Both instructions in one statement: g++ 12 moves the products of a whole step ahead of the additions otherwise, and spills
/// (6 × 2 sums, AMD Zen 3: 96 instead of 152 GFLOP/s a core; f32 FMA 103).
HEED_INLINE Words add_pairs(Words sum, Words a, Words b) {
  Words products;
  asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(a), "x"(b));
  return sum;
}
HEED_INLINE F to_float(Words x) { return _mm256_cvtepi32_ps(x); }
HEED_INLINE Words half_of(Words x, bool high) { return _mm256_srai_epi32(high ? x : _mm256_slli_epi32(x, 16), 16); }
HEED_INLINE void store_integers(int16_t* p, F x) {
  const __m256i n = _mm256_cvtps_epi32(x);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1)));
}
HEED_INLINE void store_pairs(int16_t* p, F even, F odd) {
  const __m256i high = _mm256_slli_epi32(_mm256_cvtps_epi32(odd), 16);
  _mm256_storeu_si256((__m256i*)p, _mm256_blend_epi16(high, _mm256_cvtps_epi32(even), 0x55));
}
#endif

}  // namespace heed::HEED_ISA
