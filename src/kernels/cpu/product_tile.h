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
#include "kernels/cpu/tile_registers.h"

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

  /// 0–3 sums, 4–5 activations, 6–7 weights.
  struct Registers : TileRegisters {
    Registers()
        : TileRegisters(TileShapes{.row_bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}}) {
    }
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
    // Calls f.template operator()<register>(where) for the sums there are.
    const auto each_sum = [&](auto&& f) {
      f.template operator()<0>(c);
      if constexpr (Groups == 2) f.template operator()<1>(c + kGroup);
      if constexpr (Sixteens == 2) f.template operator()<2>(c + 16 * c_stride);
      if constexpr (Sixteens == 2 && Groups == 2) f.template operator()<3>(c + 16 * c_stride + kGroup);
    };
    if (first) each_sum([]<int T>(float*) { tile_zero<T>(); });
    else each_sum([&]<int T>(float* sum) { tile_load<T>(sum, c_bytes); });
    const Number *x0 = x, *x1 = x + 16 * x_depth * pair, *w0 = w, *w1 = w + w_group * pair;
    for (int64_t i = 0; i < words; i += 16, x0 += 512, x1 += 512, w0 += 512, w1 += 512) {
      tile_load<4>(x0, line);
      tile_load<6>(w0, line);
      tile_dot_bf16<0, 4, 6>();
      if constexpr (Groups == 2) {
        tile_load<7>(w1, line);
        tile_dot_bf16<1, 4, 7>();
      }
      if constexpr (Sixteens == 2) {
        tile_load<5>(x1, line);
        tile_dot_bf16<2, 5, 6>();
      }
      if constexpr (Sixteens == 2 && Groups == 2) tile_dot_bf16<3, 5, 7>();
    }
    each_sum([&]<int T>(float* sum) { tile_store<T>(sum, c_bytes); });
  }
};
using BestTile = MatrixTile;
#elif defined(HEED_BF16_DOT)
using BestTile = VectorTile<bf16>;
#else
using BestTile = VectorTile<float>;
#endif

}  // namespace heed::HEED_ISA
