// The register tile of the product with many tokens: tokens × groups of 16 rows of weights, summed over a part of k.
//
// Lanes are rows of weights: rows that lie side by side in memory are unpacked into panels as they lie, activations stay in
// rows, and sums have the order of y. A "word" is what one lane multiplies in one step: an f32, or a pair of bf16 where the
// machine has a dot of pairs. A panel holds word i of a group's sixteen rows at 16 i words.
//
// A tile type has
//   Number, pair     what panels and packed activations hold; numbers in a word
//   part, align      numbers of k that are multiplied at once, at most; what k is padded to with zeros
//   tokens, groups   of the tile, at most
//   granule          tokens are padded to a multiple of it with zeros
//   row_at           words from the start of the packed activations, each of `depth` words, to a word of a token; a multiple of
//                    16 words of one token lie in one piece
//   Registers        what a worker sets up before and gives back after
//   multiply<n>(w, w_group, x, x_depth, tokens, words, c, c_stride, first)
//                    c[tokens][n · 16] (+)= x[tokens][words] · w[n][words][16]; x and w point to the first word of the part, w_group
//                    words from one group's panel to the next; tokens: a multiple of granule
#pragma once
#include "kernels/cpu/simd.h"

namespace heed::HEED_ISA {

/// Rows of weights in a group: the columns of an AMX tile, one 512-bit vector, two or four lesser ones.
inline constexpr int kGroup = 16;

/// Sums in vector registers. AVX2 has 16, so 12 sums; the others 32, so 24: what is left holds weights and a number of x.
template <class N>
struct VectorTile {
  using Number = N;
  static constexpr int pair = 4 / sizeof(Number), part = 1024 / sizeof(Number), align = pair;
  static constexpr int tokens = 6, groups = kLanes == 16 ? 4 : 1, granule = tokens;
  static constexpr int64_t row_at(int64_t token, int64_t word, int64_t depth) { return token * depth + word; }
  struct Registers {
    Registers() {}  // a constructor, so that an object nobody uses draws no warning
  };

  HEED_INLINE static F step(F acc, F w, const float* x) { return fma(w, set(*x), acc); }
#if defined(HEED_BF16_DOT)
  HEED_INLINE static F step(F acc, F w, const bf16* x) {
    int32_t word;
    std::memcpy(&word, x, 4);
    return dot_bf16(acc, (__m512i)w, _mm512_set1_epi32(word));
  }
#endif

  template <int Groups>
  HEED_INLINE static void multiply(const Number* w, int64_t w_group, const Number* x, int64_t x_depth, int,
                                   int64_t words, float* c, int64_t c_stride, bool first) {
    constexpr int per_group = kGroup / kLanes;
    F acc[tokens][Groups * per_group];
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 8
      for (int v = 0; v < Groups * per_group; ++v) acc[t][v] = first ? zero() : load(c + t * c_stride + v * kLanes);
    for (int64_t i = 0; i < words; ++i, w += kGroup * pair, x += pair) {
      F row[Groups * per_group];
#pragma GCC unroll 8
      for (int v = 0; v < Groups * per_group; ++v)
        row[v] = load(reinterpret_cast<const float*>(w + (v / per_group * w_group + v % per_group * kLanes) * pair));
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 8
        for (int v = 0; v < Groups * per_group; ++v) acc[t][v] = step(acc[t][v], row[v], x + t * x_depth * pair);
    }
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 8
      for (int v = 0; v < Groups * per_group; ++v) store(c + t * c_stride + v * kLanes, acc[t][v]);
  }
};

#if defined(__AMX_BF16__)
/// Sums in tile registers. Sixteen words of sixteen tokens lie together, as one tile, and so do sixteen words of a group.
struct MatrixTile {
  using Number = bf16;
  static constexpr int pair = 2, part = 320, align = 32, tokens = 32, groups = 2, granule = 16;
  static constexpr int64_t row_at(int64_t token, int64_t word, int64_t depth) {
    return token / 16 * 16 * depth + word / 16 * 256 + token % 16 * 16 + word % 16;
  }

  /// Tile registers of one worker: 0–3 sums, 4–5 activations, 6–7 weights, each 16 rows of 64 bytes.
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
  HEED_INLINE static void multiply(const Number* w, int64_t w_group, const Number* x, int64_t x_depth, int there,
                                   int64_t words, float* c, int64_t c_stride, bool first) {
    if (there == tokens) multiply<2, Groups>(w, w_group, x, x_depth, words, c, c_stride, first);
    else multiply<1, Groups>(w, w_group, x, x_depth, words, c, c_stride, first);
  }

 private:
  template <int Sixteens, int Groups>
  HEED_INLINE static void multiply(const Number* w, int64_t w_group, const Number* x, int64_t x_depth, int64_t words,
                                   float* c, int64_t c_stride, bool first) {
    const int64_t c_bytes = c_stride * 4, line = 64;
    float *c0 = c, *c1 = c + 16 * c_stride;
    if (first) {
      asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" ::: "memory");
    } else {
      asm volatile("tileloadd (%0,%1,1), %%tmm0" ::"r"(c0), "r"(c_bytes) : "memory");
      if constexpr (Groups == 2) asm volatile("tileloadd 64(%0,%1,1), %%tmm1" ::"r"(c0), "r"(c_bytes) : "memory");
      if constexpr (Sixteens == 2) asm volatile("tileloadd (%0,%1,1), %%tmm2" ::"r"(c1), "r"(c_bytes) : "memory");
      if constexpr (Sixteens == 2 && Groups == 2)
        asm volatile("tileloadd 64(%0,%1,1), %%tmm3" ::"r"(c1), "r"(c_bytes) : "memory");
    }
    const Number *x0 = x, *x1 = x + 16 * x_depth * pair, *w0 = w, *w1 = w + w_group * pair;
    for (int64_t i = 0; i < words; i += 16, x0 += 512, x1 += 512, w0 += 512, w1 += 512) {
      asm volatile(
          "tileloadd (%0,%2,1), %%tmm4\n\t"
          "tileloadd (%1,%2,1), %%tmm6\n\t"
          "tdpbf16ps %%tmm6, %%tmm4, %%tmm0" ::"r"(x0),
          "r"(w0), "r"(line)
          : "memory");
      if constexpr (Groups == 2)
        asm volatile(
            "tileloadd (%0,%1,1), %%tmm7\n\t"
            "tdpbf16ps %%tmm7, %%tmm4, %%tmm1" ::"r"(w1),
            "r"(line)
            : "memory");
      if constexpr (Sixteens == 2)
        asm volatile(
            "tileloadd (%0,%1,1), %%tmm5\n\t"
            "tdpbf16ps %%tmm6, %%tmm5, %%tmm2" ::"r"(x1),
            "r"(line)
            : "memory");
      if constexpr (Sixteens == 2 && Groups == 2) asm volatile("tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::: "memory");
    }
    asm volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(c0), "r"(c_bytes) : "memory");
    if constexpr (Groups == 2) asm volatile("tilestored %%tmm1, 64(%0,%1,1)" ::"r"(c0), "r"(c_bytes) : "memory");
    if constexpr (Sixteens == 2) asm volatile("tilestored %%tmm2, (%0,%1,1)" ::"r"(c1), "r"(c_bytes) : "memory");
    if constexpr (Sixteens == 2 && Groups == 2)
      asm volatile("tilestored %%tmm3, 64(%0,%1,1)" ::"r"(c1), "r"(c_bytes) : "memory");
  }
};
using BestTile = MatrixTile;
#elif defined(HEED_BF16_DOT)
using BestTile = VectorTile<bf16>;
#else
using BestTile = VectorTile<float>;
#endif

}  // namespace heed::HEED_ISA
