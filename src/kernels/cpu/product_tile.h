// The register tile of the product with many tokens: rows of weights × groups of 16 tokens, summed over a part of k.
//
// Lanes are tokens, so a weight is a broadcast and a panel of weights is used as it was unpacked, row by row; only the
// activations, packed once for a whole call, are transposed. A "word" is what one lane multiplies in one step: an f32,
// or a pair of bf16 where the machine has a dot of pairs.
//
// A tile type has
//   Number, pair     what panels hold; numbers in a word
//   part, align      numbers of k that a panel holds at once (1 KB of each row); what k is padded to with zeros
//   panel_stride     numbers from one row of a panel to the next: rows a power of two apart would share one cache set
//   rows, groups     of weights; of tokens, at most: the width of a strip of packed activations
//   most_rows        of a panel: it stays in the second cache beside its sums
//   group_stride     words from one word of a group to its next, in a strip of so many groups
//   group_at         words from the start of 16 words of a strip to a group's
//   Registers        what a worker sets up before and gives back after
//   multiply<n>(w, x, words, c, c_stride, first)  c[rows][n · 16] (+)= w[rows][words] · x[words][n · 16]
#pragma once
#include "kernels/cpu/simd.h"

namespace heed::HEED_ISA {

/// Tokens of a group: the columns of an AMX tile, one 512-bit vector, two or four lesser ones.
inline constexpr int kGroup = 16;

/// Sums in vector registers. AVX2 has 16, so 12 sums; the others 32, so 24: what is left holds activations and a weight.
template <class N>
struct VectorTile {
  using Number = N;
  static constexpr int pair = 4 / sizeof(Number), part = 1024 / sizeof(Number), align = pair;
  static constexpr int panel_stride = part + 64 / int(sizeof(Number));
  static constexpr int rows = 6, groups = kLanes == 16 ? 4 : 1, most_rows = 96;
  static constexpr int64_t group_stride(int strip_groups) { return strip_groups * kGroup; }
  static constexpr int64_t group_at(int group) { return group * kGroup; }
  struct Registers {
    Registers() {}  // a constructor, so that an object nobody uses draws no warning
  };

  HEED_INLINE static F step(F acc, F x, const float* w) { return fma(x, set(*w), acc); }
#if defined(HEED_BF16_DOT)
  HEED_INLINE static F step(F acc, F x, const bf16* w) {
    int32_t word;
    std::memcpy(&word, w, 4);
    return dot_bf16(acc, (__m512i)x, _mm512_set1_epi32(word));
  }
#endif

  template <int Groups>
  HEED_INLINE static void multiply(const Number* w, const float* x, int64_t words, float* c, int64_t c_stride, bool first) {
    constexpr int vectors = Groups * kGroup / kLanes;
    F acc[rows][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) acc[r][v] = first ? zero() : load(c + r * c_stride + v * kLanes);
    for (int64_t i = 0; i < words; ++i, w += pair, x += Groups * kGroup) {
      F a[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) a[v] = load(x + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) acc[r][v] = step(acc[r][v], a[v], w + r * panel_stride);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) store(c + r * c_stride + v * kLanes, acc[r][v]);
  }
};

#if defined(__AMX_BF16__)
/// Sums in tile registers. Sixteen words of each group of a strip lie together, as one tile.
struct MatrixTile {
  using Number = bf16;
  static constexpr int pair = 2, part = 512, align = 32, panel_stride = part + 32;
  static constexpr int rows = 32, groups = 2, most_rows = 128;
  static constexpr int64_t group_stride(int) { return kGroup; }
  static constexpr int64_t group_at(int group) { return group * 16 * kGroup; }

  /// Tile registers of one worker: 0–3 sums, 4–5 weights, 6–7 activations, each 16 rows of 64 bytes.
  class Registers {
   public:
    Registers() {
      alignas(64) struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
    }
    ~Registers() { asm volatile("tilerelease" ::: "memory"); }
    Registers(const Registers&) = delete;
    Registers& operator=(const Registers&) = delete;
  };

  template <int Groups>
  HEED_INLINE static void multiply(const Number* w, const float* x, int64_t words, float* c, int64_t c_stride, bool first) {
    const int64_t c_bytes = c_stride * 4, w_bytes = panel_stride * int64_t(sizeof(Number)), line = 64;
    float *c0 = c, *c1 = c + 16 * c_stride;
    if (first) {
      asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" ::: "memory");
    } else {
      asm volatile("tileloadd (%0,%2,1), %%tmm0\n\ttileloadd (%1,%2,1), %%tmm2" ::"r"(c0), "r"(c1), "r"(c_bytes)
                   : "memory");
      if constexpr (Groups == 2)
        asm volatile("tileloadd 64(%0,%2,1), %%tmm1\n\ttileloadd 64(%1,%2,1), %%tmm3" ::"r"(c0), "r"(c1), "r"(c_bytes)
                     : "memory");
    }
    const Number *w0 = w, *w1 = w + 16 * panel_stride;
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
            "tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::"r"(w0),
            "r"(w1), "r"(x), "r"(w_bytes), "r"(line)
            : "memory");
      } else {
        asm volatile(
            "tileloadd (%0,%3,1), %%tmm4\n\t"
            "tileloadd (%2,%4,1), %%tmm6\n\t"
            "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\t"
            "tileloadd (%1,%3,1), %%tmm5\n\t"
            "tdpbf16ps %%tmm6, %%tmm5, %%tmm2" ::"r"(w0),
            "r"(w1), "r"(x), "r"(w_bytes), "r"(line)
            : "memory");
      }
    }
    asm volatile("tilestored %%tmm0, (%0,%2,1)\n\ttilestored %%tmm2, (%1,%2,1)" ::"r"(c0), "r"(c1), "r"(c_bytes)
                 : "memory");
    if constexpr (Groups == 2)
      asm volatile("tilestored %%tmm1, 64(%0,%2,1)\n\ttilestored %%tmm3, 64(%1,%2,1)" ::"r"(c0), "r"(c1), "r"(c_bytes)
                   : "memory");
  }
};
using BestTile = MatrixTile;
#elif defined(HEED_BF16_DOT)
using BestTile = VectorTile<bf16>;
#else
using BestTile = VectorTile<float>;
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
