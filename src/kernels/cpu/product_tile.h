// The register tile of the product with many tokens: tokens × groups of 16 rows of weights, summed over a part of k.
//
// Lanes are rows of weights: rows that lie side by side in memory are unpacked into panels as they lie, activations stay in
// rows, and sums have the order of y. A "word" is what one lane multiplies in one step: an f32, or a pair of bf16 or of 16-bit
// integers where the machine multiplies pairs. A panel holds word i of a group's sixteen rows at 16 i words.
//
// A tile type has
//   Number, pair     what panels and packed activations hold; numbers in a word
//   unit, unit_words numbers of k that are packed together, and the words that they take in a panel or a packed token
//   align            k is padded with zeros to a multiple of it; where that is less than a unit, the last unit may be shorter
//   part             numbers of k that are multiplied at once, at most: whole units
//   tokens, groups   of the tile, at most
//   granule          tokens are padded to a multiple of it with zeros
//   row_at           words from the start of the packed activations, each of `depth` words, to a word of a token; a unit of one
//                    token lies in one piece
//   pack(from, n, all, to, apart)   n numbers of a token, and zeros up to `all`, a unit or what is left of k; returns how many of
//                    them it left out of the unit, to stand apart (at most Tile::apart), counted from the unit's first
//   add_apart(panel, number, c)   where there is such: c[16] += their products with the rows of a group's panel
//   Registers        what a worker sets up before and gives back after
//   multiply<n>(w, w_group, x, x_depth, tokens, words, c, c_stride, first)
//                    c[tokens][n · 16] (+)= x[tokens][words] · w[n][words][16]; x and w point to the first word of the part, w_group
//                    words from one group's panel to the next; tokens: a multiple of granule
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "kernels/cpu/rows.h"
#include "kernels/cpu/tile_registers.h"

namespace heed::HEED_ISA {

/// Rows of weights in a group: the columns of an AMX tile, one 512-bit vector, two or four lesser ones.
inline constexpr int kGroup = 16;

/// A number of a token, `at` numbers of k from a piece's first, that is multiplied in f32.
struct Apart {
  int32_t at;
  float value;
};

/// A token's numbers as they are, or rounded to bf16.
template <class Number>
HEED_INLINE int pack_numbers(const float* from, int64_t n, int64_t all, Number* to) {
  over_lanes(n, [&](int64_t i, auto part) { part.put(to + i, part.get(from + i)); });
  std::fill(to + n, to + all, Number(0));
  return 0;
}

/// Numbers that so many numbers of k are padded to (at least some, so that sums over nothing are zeros), and their words.
template <class Tile>
constexpr int64_t padded_numbers(int64_t numbers) {
  return (std::max<int64_t>(numbers, 1) + Tile::align - 1) / Tile::align * Tile::align;
}
template <class Tile>
constexpr int64_t words_of(int64_t numbers) {
  const int64_t all = padded_numbers<Tile>(numbers), units = (all + Tile::unit - 1) / Tile::unit;
  return units * (Tile::unit_words - Tile::unit / Tile::pair) + all / Tile::pair;
}

/// Sums in vector registers. AVX2 has 16, so 12 sums; the others 32, so 24: what is left holds weights and a number of x.
struct VectorTile {
  static constexpr int tokens = 6, groups = kLanes == 16 ? 4 : 1, granule = tokens, per_group = kGroup / kLanes, apart = 0;
  static constexpr int64_t row_at(int64_t token, int64_t word, int64_t depth) { return token * depth + word; }
  struct Registers {
    Registers() {}  // a constructor, so that an object nobody uses draws no warning
  };
};

/// Numbers as they are, or pairs of bf16.
template <class N>
struct NumberTile : VectorTile {
  using Number = N;
  static constexpr int pair = 4 / sizeof(Number), unit = 16 * pair, unit_words = 16, align = pair,
                       part = 1024 / sizeof(Number);

  static int pack(const float* from, int64_t n, int64_t all, Number* to, Apart*) {
    return pack_numbers(from, n, all, to);
  }

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

#if defined(HEED_PAIR_DOT)
/// Integers of 13 bits, and a scale for each 128 of a token or of a row of weights: a unit is a word of scale and 64 pairs. A
/// number's error is 2^-14 of the largest of its 128, where bf16's is 2^-9 of the number. Sums of 128 products stay below 2^31.
/// Massive activations (arXiv 2402.17762), thousands of times what surrounds them, would leave nothing of the others: they stand
/// apart, as in LLM.int8() (arXiv 2208.07339).
struct IntegerTile : VectorTile {
  using Number = int16_t;
  static constexpr int pair = 2, unit = 128, unit_words = 1 + unit / pair, align = 16, part = 512, apart = 4;
  static constexpr float top = 4095;
  /// (Largest / root mean square of the others)² from which a number stands apart: 16 times is where a unit loses 1.1e-3 of its
  /// norm, as bf16 does.
  static constexpr float massive = 256;

  /// A vector's scales are its lanes' largest / top, and `inverse` their inverses. What is not finite makes the scale so too.
  struct Scales {
    F largest = zero(), odd = zero();
    HEED_INLINE void see(F x) {
      largest = max(largest, abs(x));
      odd = fma(x, zero(), odd);
    }
    HEED_INLINE F scale() const { return fma(largest, set(1 / top), odd); }
    /// 0 where all numbers are next to nothing, so that no inverse overflows.
    HEED_INLINE F inverse() const { return where(less(set(1e-30f), largest), set(top) / largest, zero()); }
  };

  /// How many stand apart: at most `apart`, counted from the unit's first.
  static int pack(const float* from, int64_t n, int64_t all, int16_t* to, Apart* apart_from) {
    alignas(64) float numbers[unit];
    pack_numbers(from, n, all, numbers);
    for (int taken = 0;; ++taken) {
      Scales lanes;
      F squares = zero();
      for (int i = 0; i < all; i += kLanes) {
        const F x = load(numbers + i);
        lanes.see(x);
        squares = fma(x, x, squares);
      }
      const float largest = hmax(lanes.largest), square = largest * largest;
      if (taken < apart && square * float(all) > massive * (hsum(squares) - square)) {
        int at = 0;
        while (std::abs(numbers[at]) != largest) ++at;
        apart_from[taken] = {at, std::exchange(numbers[at], 0)};
        continue;
      }
      const float scale = largest / top + hsum(lanes.odd);
      std::memcpy(to, &scale, 4);
      const F inverse = set(largest > 1e-30f ? top / largest : 0);
      for (int i = 0; i < all; i += kLanes) store_integers(to + pair + i, load(numbers + i) * inverse);
      return taken;
    }
  }

  /// c[16] += value · number `at` of the rows of a group's panel.
  static void add_apart(const int16_t* panel, const Apart& x, float* c) {
    const int16_t* scales = panel + x.at / unit * unit_words * kGroup * pair;
    const int16_t* words = scales + (1 + x.at % unit / pair) * kGroup * pair;
    for (int v = 0; v < kGroup; v += kLanes) {
      const F w = to_float(half_of(load_words(words + v * pair), x.at % pair)) *
                  load(reinterpret_cast<const float*>(scales + v * pair));
      store(c + v, fma(w, set(x.value), load(c + v)));
    }
  }

  template <int Groups>
  HEED_INLINE static void multiply(const int16_t* w, int64_t w_group, const int16_t* x, int64_t x_depth, int,
                                   int64_t words, float* c, int64_t c_stride, bool first) {
    constexpr int vectors = Groups * per_group;
    const auto at = [&](int v) { return w + (v / per_group * w_group + v % per_group * kLanes) * pair; };
    for (; words > 0; words -= unit_words, first = false) {
      const int64_t here = std::min<int64_t>(words, unit_words);
      const int16_t *w_scales = w, *x_scales = x;
      Words sum[tokens][vectors];
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sum[t][v] = set_word(0);
      w += kGroup * pair, x += pair;
      for (int64_t i = 1; i < here; ++i, w += kGroup * pair, x += pair) {
        Words row[vectors];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) row[v] = load_words(at(v));
#pragma GCC unroll 8
        for (int t = 0; t < tokens; ++t) {
          int32_t word;
          std::memcpy(&word, x + t * x_depth * pair, 4);
          const Words both = set_word(word);
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) sum[t][v] = add_pairs(sum[t][v], both, row[v]);
        }
      }
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) {
        float x_scale;
        std::memcpy(&x_scale, x_scales + t * x_depth * pair, 4);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          const int64_t from = (v / per_group * w_group + v % per_group * kLanes) * pair;
          const F scale = load(reinterpret_cast<const float*>(w_scales + from)) * set(x_scale);
          float* out = c + t * c_stride + v * kLanes;
          store(out, fma(to_float(sum[t][v]), scale, first ? zero() : load(out)));
        }
      }
    }
  }
};
#endif

#if defined(__AMX_BF16__)
/// Sums in tile registers. Sixteen words of sixteen tokens lie together, as one tile, and so do sixteen words of a group.
struct MatrixTile {
  using Number = bf16;
  static constexpr int pair = 2, unit = 32, unit_words = 16, align = 32, part = 320, tokens = 32, groups = 2,
                       granule = 16, apart = 0;
  static constexpr int64_t row_at(int64_t token, int64_t word, int64_t depth) {
    return token / 16 * 16 * depth + word / 16 * 256 + token % 16 * 16 + word % 16;
  }
  static int pack(const float* from, int64_t n, int64_t all, bf16* to, Apart*) {
    return pack_numbers(from, n, all, to);
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
using RoundedTile = MatrixTile;
#elif defined(HEED_PAIR_DOT)
using RoundedTile = IntegerTile;
#else
using RoundedTile = NumberTile<float>;
#endif
inline constexpr bool kProductsRound = !std::is_same_v<RoundedTile, NumberTile<float>>;

}  // namespace heed::HEED_ISA
