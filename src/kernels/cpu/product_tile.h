// The register tile of the product with many tokens: rows of weights × groups of 16 tokens, summed over a part of k.
//
// Lanes are tokens, so a weight is a broadcast and a panel of weights is used as it was unpacked, row by row; only the
// activations, packed once for a whole call, are transposed. A "word" is what one lane multiplies in one step: an f32,
// or a pair of bf16 where the machine has a dot of pairs.
#pragma once
#include "kernels/cpu/simd.h"

namespace heed::HEED_ISA {

/// Tokens of a group: the columns of an AMX tile, one 512-bit vector, two or four lesser ones.
inline constexpr int kGroup = 16;

#if defined(__AMX_BF16__) || defined(HEED_BF16_DOT)
using Number = bf16;
inline constexpr int kPair = 2;   // numbers in a word
inline constexpr int kPart = 512;  // numbers of k that a panel holds at once: 1 KB of each row
inline constexpr int kAlign = 32;  // k is padded with zeros to a multiple of this
#else
using Number = float;
inline constexpr int kPair = 1;
inline constexpr int kPart = 256;
inline constexpr int kAlign = 1;
#endif
/// Numbers from one row of a panel to the next: rows a power of two apart would share the few places of one cache set.
inline constexpr int kPanelStride = kPart + 64 / int(sizeof(Number));

#if defined(__AMX_BF16__)

inline constexpr int kTileRows = 32, kStripGroups = 2, kMaxPanel = 128;

/// Tile registers of one worker: 0–3 sums, 4–5 weights, 6–7 activations, each 16 rows of 64 bytes.
class TileRegisters {
 public:
  TileRegisters() {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  ~TileRegisters() { asm volatile("tilerelease" ::: "memory"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

/// c[32][Groups · 16] (+)= w[32][2 words] · x. A pair of rows of x's tiles lies as words[word / 16][group][word % 16][16].
template <int Groups>
HEED_INLINE void tile(const Number* w, const float* x, int64_t words, float* c, int64_t c_stride, bool first) {
  const int64_t c_bytes = c_stride * 4, w_bytes = kPanelStride * int64_t(sizeof(Number)), line = 64;
  float *c0 = c, *c1 = c + 16 * c_stride;
  if (first) {
    asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" ::: "memory");
  } else {
    asm volatile("tileloadd (%0,%2,1), %%tmm0\n\ttileloadd (%1,%2,1), %%tmm2" ::"r"(c0), "r"(c1), "r"(c_bytes) : "memory");
    if constexpr (Groups == 2)
      asm volatile("tileloadd 64(%0,%2,1), %%tmm1\n\ttileloadd 64(%1,%2,1), %%tmm3" ::"r"(c0), "r"(c1), "r"(c_bytes) : "memory");
  }
  const Number *w0 = w, *w1 = w + 16 * kPanelStride;
  for (int64_t i = 0; i < words; i += 16, w0 += 32, w1 += 32, x += Groups * 256) {
    if constexpr (Groups == 2) {
      asm volatile(
          "tileloadd (%0,%3,1), %%tmm4\n\t"
          "tileloadd (%2,%4,1), %%tmm6\n\t"
          "tileloadd 1024(%2,%4,1), %%tmm7\n\t"
          "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\t"
          "tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t"
          "tileloadd (%1,%3,1), %%tmm5\n\t"
          "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\t"
          "tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::"r"(w0), "r"(w1), "r"(x), "r"(w_bytes), "r"(line) : "memory");
    } else {
      asm volatile(
          "tileloadd (%0,%3,1), %%tmm4\n\t"
          "tileloadd (%2,%4,1), %%tmm6\n\t"
          "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\t"
          "tileloadd (%1,%3,1), %%tmm5\n\t"
          "tdpbf16ps %%tmm6, %%tmm5, %%tmm2" ::"r"(w0), "r"(w1), "r"(x), "r"(w_bytes), "r"(line) : "memory");
    }
  }
  asm volatile("tilestored %%tmm0, (%0,%2,1)\n\ttilestored %%tmm2, (%1,%2,1)" ::"r"(c0), "r"(c1), "r"(c_bytes) : "memory");
  if constexpr (Groups == 2)
    asm volatile("tilestored %%tmm1, 64(%0,%2,1)\n\ttilestored %%tmm3, 64(%1,%2,1)" ::"r"(c0), "r"(c1), "r"(c_bytes) : "memory");
}

#else

// 24 sums of 32 vector registers, 12 of AVX2's 16: what is left holds the activations and one weight.
inline constexpr int kTileRows = 6, kStripGroups = kLanes == 16 ? 4 : 1, kMaxPanel = 96;

struct TileRegisters {
  TileRegisters() {}  // nothing to set up; a constructor, so that unused objects draw no warning
};

#if defined(HEED_BF16_DOT)
HEED_INLINE F multiply_word(F acc, F x, const Number* w) {
  int32_t word;
  std::memcpy(&word, w, 4);
  return dot_bf16(acc, (__m512i)x, _mm512_set1_epi32(word));
}
#else
HEED_INLINE F multiply_word(F acc, F x, const Number* w) { return fma(x, set(*w), acc); }
#endif

/// c[6][Groups · 16] (+)= w[6][words] · x[words][Groups · 16].
template <int Groups>
HEED_INLINE void tile(const Number* w, const float* x, int64_t words, float* c, int64_t c_stride, bool first) {
  constexpr int vectors = Groups * kGroup / kLanes;
  F acc[kTileRows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) acc[r][v] = first ? zero() : load(c + r * c_stride + v * kLanes);
  for (int64_t i = 0; i < words; ++i, w += kPair, x += Groups * kGroup) {
    F a[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) a[v] = load(x + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) acc[r][v] = multiply_word(acc[r][v], a[v], w + r * kPanelStride);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store(c + r * c_stride + v * kLanes, acc[r][v]);
}

#endif

#if defined(__x86_64__)
using Lane = __m256;
inline constexpr int kSquare = 8;
HEED_INLINE Lane load_lane(const float* p) { return _mm256_loadu_ps(p); }
HEED_INLINE void store_lane(float* p, Lane x) { _mm256_storeu_ps(p, x); }
HEED_INLINE void transpose(Lane r[kSquare]) {
  Lane t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
#else
using Lane = float32x4_t;
inline constexpr int kSquare = 4;
HEED_INLINE Lane load_lane(const float* p) { return vld1q_f32(p); }
HEED_INLINE void store_lane(float* p, Lane x) { vst1q_f32(p, x); }
HEED_INLINE void transpose(Lane r[kSquare]) {
  const float32x4x2_t a = vtrnq_f32(r[0], r[1]), b = vtrnq_f32(r[2], r[3]);
  r[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
  r[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
  r[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
  r[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}
#endif

}  // namespace heed::HEED_ISA
