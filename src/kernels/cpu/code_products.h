// Whole-number products of pages' codes, in matrix registers or by vpdpbusd. Both read the same layouts, so that what is
// around them is written, and tested, once.
//
// The other operand (query rows; weights of entries) has sixteen bits, kept as two signed bytes: x ≈ unit · (256 high +
// low). Up to eight rows share their codes: columns, or rows, 0–7 hold the high bytes, 8–15 the low ones.
//
//   step      32 channels
//   Q         [d / 32][8 words of 4 channels][16 columns], what 16 entries' codes [16][32] are multiplied with
//   C         [16 entries][16 columns] int32
//   W         [16 rows][64 entries]; words of four entries are in the order of `word_at`
//   V         [16 words of 4 entries][16 channels], one step is two of them: even channels, odd channels
//   O         [16 rows][16 channels] int32
//
// A matrix load of rows that cross lines takes six times as long: rows of codes begin on 32 bytes, all else on 64.
#pragma once
#include <algorithm>
#include <array>
#include <bit>

#include "kernels/cpu/tile_registers.h"
#include "kernels/cpu/transpose_words.h"

namespace heed::HEED_ISA {

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define HEED_CODE_PRODUCTS 1

inline constexpr int kCodeStep = 32, kCodeRows = 8, kColumns = 2 * kCodeRows;
inline constexpr int kMostWhole = 127 * 256;  // of 256 high + low

/// From so many rows on codes are laid out as above; for fewer they are multiplied as they are opened, in registers.
inline constexpr int kTiledRows = 5;

/// Where word i of W and of V lies: packing four vectors of 16 numbers into bytes turns words so.
constexpr int word_at(int i) { return i % 4 * 4 + i / 4; }

HEED_INLINE __m512i four_at(const void* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}

#if defined(__AMX_INT8__)

/// 0–3 and 7 have 16 rows of 64 bytes, 4 and 6 codes of a step, 5 a step of Q.
struct CodeRegisters : TileRegisters {
  CodeRegisters()
      : TileRegisters(TileShapes{.row_bytes = {64, 64, 64, 64, 32, 64, 32, 64}, .rows = {16, 16, 16, 16, 16, 8, 16, 16}}) {}
};

/// c = first + codes · Q of one group: 16 rows of codes, `stride` bytes apart, of so many steps. `first`: [16] or null.
template <int Sum, int Codes>
HEED_INLINE void group_products(const uint8_t* codes, int64_t stride, const uint32_t* q, int steps, const int32_t* first) {
  if (first) tile_load<Sum>(first, 0);
  else tile_zero<Sum>();
  for (int t = 0; t < steps; ++t) {
    tile_load<Codes>(codes + t * kCodeStep, stride);
    tile_load<5>(q + t * (kCodeStep / 4 * kColumns), 64);
    tile_dot_us<Sum, Codes, 5>();
  }
}

/// C of each group of `per_group` steps (the last may have fewer); first: [groups][16] or null.
inline void key_products(const uint8_t* codes, int64_t stride, const uint32_t* q, int steps, int per_group,
                         const int32_t* first, int32_t* c) {
  constexpr int kC = 16 * kColumns;
  const auto group = [&]<int Sum, int Codes>(int at) {
    group_products<Sum, Codes>(codes + at * kCodeStep, stride, q + at * (kCodeStep / 4 * kColumns),
                               std::min(per_group, steps - at), first ? first + at / per_group * kColumns : nullptr);
  };
  int at = 0;
  for (; at + 3 * per_group < steps; at += 4 * per_group, c += 4 * kC) {
    group.template operator()<0, 4>(at), group.template operator()<1, 6>(at + per_group);
    group.template operator()<2, 4>(at + 2 * per_group), group.template operator()<3, 6>(at + 3 * per_group);
    tile_store<0>(c, 64), tile_store<1>(c + kC, 64), tile_store<2>(c + 2 * kC, 64), tile_store<3>(c + 3 * kC, 64);
  }
  for (; at < steps; at += per_group, c += kC) {
    group.template operator()<0, 4>(at);
    tile_store<0>(c, 64);
  }
}

/// o [2] = W · V of a step; only the first `rows` high and low rows are asked for.
inline void value_products(const int8_t* w, const uint8_t* v, int, int32_t* o) {
  tile_load<2>(w, 64);
  tile_zero<0>(), tile_zero<1>();
  tile_load<3>(v, 64);
  tile_dot_su<0, 2, 3>();
  tile_load<7>(v + 1024, 64);
  tile_dot_su<1, 2, 7>();
  tile_store<0>(o, 64);
  tile_store<1>(o + 256, 64);
}

#else

struct CodeRegisters {
  CodeRegisters() {}  // a constructor, so that an object nobody uses draws no warning
};

inline void key_products(const uint8_t* codes, int64_t stride, const uint32_t* q, int steps, int per_group,
                         const int32_t* first, int32_t* c) {
  constexpr int R = 8;
  for (int at = 0; at < steps; at += per_group, c += 16 * kColumns) {
    const int words = std::min(per_group, steps - at) * (kCodeStep / 4);
    for (int key = 0; key < 16; key += R) {
      __m512i sum[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r] = first ? _mm512_loadu_si512(first) : _mm512_setzero_si512();
      const uint8_t* from = codes + at * kCodeStep + key * stride;
      const uint32_t* x = q + at * (kCodeStep / 4 * kColumns);
      for (int i = 0; i < words; ++i, x += kColumns, from += 4) {
        const __m512i column = _mm512_loadu_si512(x);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sum[r] = _mm512_dpbusd_epi32(sum[r], four_at(from + r * stride), column);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) _mm512_storeu_si512(c + (key + r) * kColumns, sum[r]);
    }
    if (first) first += kColumns;
  }
}

template <int R>
HEED_INLINE void row_products(const int8_t* w, const uint8_t* v, int32_t* o) {
  __m512i sum[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
  for (int i = 0; i < 16; ++i) {
    const __m512i a = _mm512_loadu_si512(v + i * 64), b = _mm512_loadu_si512(v + 1024 + i * 64);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i weights = four_at(w + r * 64 + i * 4);
      sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], a, weights);
      sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], b, weights);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_si512(o + r * 16, sum[r][0]);
    _mm512_storeu_si512(o + 256 + r * 16, sum[r][1]);
  }
}

inline void value_products(const int8_t* w, const uint8_t* v, int rows, int32_t* o) {
  for (int first = 0; first <= kCodeRows; first += kCodeRows) {
    int r = first;
    for (; r + 4 <= first + rows; r += 4) row_products<4>(w + r * 64, v, o + r * 16);
    for (; r < first + rows; ++r) row_products<1>(w + r * 64, v, o + r * 16);
  }
}

#endif

/// Codes [c, c + 64) of an entry, one a byte; may read 32 bytes past the row's end, where scales lie.
template <int Bits>
HEED_INLINE __m512i open_codes(const uint8_t* from) {
  if constexpr (Bits == 8) {
    return _mm512_loadu_si512(from);
  } else if constexpr (Bits == 4) {
    const __m512i x = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
    return _mm512_and_si512(_mm512_or_si512(x, _mm512_slli_epi16(x, 4)), _mm512_set1_epi8(15));
  } else {
    const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
    const __m512i y = _mm512_or_si512(x, _mm512_slli_epi32(x, 6));
    return _mm512_and_si512(_mm512_or_si512(y, _mm512_slli_epi32(y, 12)), _mm512_set1_epi8(3));
  }
}

/// Codes of a step of four entries as a word of V: even and odd channels, or (8 bits) the lower and the upper half. 2 bits:
/// may read 8 bytes past the row's end.
template <int Bits>
HEED_INLINE void turn_codes(const char* const from[4], int64_t offset, __m512i& even, __m512i& odd) {
  const auto four = [&](int64_t at) {
    const auto sixteen = [&](int i) { return _mm_loadu_si128((const __m128i*)(from[i] + at)); };
    __m512i x = _mm512_castsi128_si512(sixteen(0));
    x = _mm512_inserti32x4(x, sixteen(1), 1);
    x = _mm512_inserti32x4(x, sixteen(2), 2);
    return _mm512_inserti32x4(x, sixteen(3), 3);
  };
  alignas(64) static constexpr auto turned = [] {
    std::array<uint8_t, 64> out{};
    for (int i = 0; i < 64; ++i) out[size_t(i)] = uint8_t(i % 4 * 16 + (Bits == 2 ? i / 8 : i / 4));
    return out;
  }();
  const __m512i order = _mm512_load_si512(turned.data()), x = _mm512_permutexvar_epi8(order, four(offset));
  if constexpr (Bits == 8) {
    even = x, odd = _mm512_permutexvar_epi8(order, four(offset + 16));
  } else if constexpr (Bits == 4) {
    even = _mm512_and_si512(x, _mm512_set1_epi8(15));
    odd = _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15));
  } else {
    const __m512i three = _mm512_set1_epi8(3);
    even = _mm512_and_si512(_mm512_srlv_epi32(x, _mm512_set1_epi64(int64_t(4) << 32)), three);
    odd = _mm512_and_si512(_mm512_srlv_epi32(x, _mm512_set1_epi64(int64_t(6) << 32 | 2)), three);
  }
}

/// Which channel of 64 lies where: with 4 and 2 bits words are of the first 32 and of the last 32 in turn, so that two
/// scales side by side are those of all words.
template <int Bits>
constexpr int channel_at(int i) {
  if (Bits == 8) return i;
  const int word = i / 4, pair = word / 2, wide = 8 / Bits, whole = 8 / wide;  // pairs of words before the next shift
  return word % 2 * 32 + (pair % whole * 4 + i % 4) * wide + pair / whole;
}
/// 64 codes of a row in that order.
template <int Bits>
HEED_INLINE __m512i mixed_codes(const char* from) {
  if constexpr (Bits == 8) {
    return _mm512_loadu_si512(from);
  } else if constexpr (Bits == 4) {
    const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 0, 4, 1, 5, 2, 6, 3, 7);
    const __m512i x = _mm512_permutexvar_epi32(order, _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)from)));
    return _mm512_and_si512(_mm512_srlv_epi64(x, _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4)), _mm512_set1_epi8(15));
  } else {
    const __m512i x = _mm512_shuffle_epi32(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)from)), _MM_PERM_DBCA);
    return _mm512_and_si512(_mm512_srlv_epi64(x, _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6)), _mm512_set1_epi8(3));
  }
}
/// 64 bytes into that order.
template <int Bits>
HEED_INLINE void mix(const int8_t* from, int8_t* to) {
  alignas(64) static constexpr auto order = [] {
    std::array<uint8_t, 64> out{};
    for (int i = 0; i < 64; ++i) out[size_t(i)] = uint8_t(channel_at<Bits>(i));
    return out;
  }();
  _mm512_storeu_si512(to, _mm512_permutexvar_epi8(_mm512_load_si512(order.data()), _mm512_loadu_si512(from)));
}
/// The scales of its words: one, or two of 32 channels each.
template <int Bits, bool Two>
HEED_INLINE F mixed_scales(const float* s) {
  if constexpr (!Two) return set(*s);
  else if constexpr (Bits == 8) return _mm512_mask_broadcastss_ps(set(s[0]), 0xff00, _mm_load_ss(s + 1));
  else return _mm512_castpd_ps(_mm512_set1_pd(std::bit_cast<double>(*reinterpret_cast<const uint64_t*>(s))));
}
/// The words' dots with `high` and `low` [64] of a row: 256 high + low.
HEED_INLINE __m512i whole_dots(__m512i codes, const int8_t* high, const int8_t* low) {
  const __m512i x = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, _mm512_loadu_si512(high));
  return _mm512_dpbusd_epi32(_mm512_slli_epi32(x, 8), codes, _mm512_loadu_si512(low));
}

/// W · V of a step for `R` rows, `first` the first of them; entry(word, rows) gives the four rows of codes of a word.
template <int Bits, int R, class Rows>
HEED_INLINE void turned_products(const int8_t* w, int first, int64_t offset, Rows&& rows, F sums[R][2]) {
  __m512i high[R][2], low[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) high[r][0] = high[r][1] = low[r][0] = low[r][1] = _mm512_setzero_si512();
  w += first * 64;
  for (int i = 0; i < 16; ++i) {
    const char* from[4];
    rows(word_at(i), from);
    __m512i even, odd;
    turn_codes<Bits>(from, offset, even, odd);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i h = four_at(w + r * 64 + i * 4), l = four_at(w + (kCodeRows + r) * 64 + i * 4);
      high[r][0] = _mm512_dpbusd_epi32(high[r][0], even, h), high[r][1] = _mm512_dpbusd_epi32(high[r][1], odd, h);
      low[r][0] = _mm512_dpbusd_epi32(low[r][0], even, l), low[r][1] = _mm512_dpbusd_epi32(low[r][1], odd, l);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < 2; ++i)
      sums[r][i] = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[r][i], 8), low[r][i]));
}

/// Rounds 32 numbers of at most kMostWhole to 256 high + low.
HEED_INLINE void split_whole(F a, F b, int8_t* high, int8_t* low) {
  const __m512i words = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a))),
                                           _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(b)), 1);
  const __m512i upper = _mm512_srli_epi16(_mm512_add_epi16(words, _mm512_set1_epi16(128)), 8);
  _mm256_storeu_si256((__m256i*)low, _mm512_cvtepi16_epi8(words));
  _mm256_storeu_si256((__m256i*)high, _mm512_cvtepi16_epi8(upper));
}

/// A row of W and its low bytes, from x [64]; the sum of what they stand for.
HEED_INLINE int split_weights(const F x[4], int8_t* high, int8_t* low) {
  __m512i whole[4];
  for (int i = 0; i < 4; ++i) whole[i] = _mm512_cvtps_epi32(x[i]);
  const __m512i a = _mm512_packs_epi32(whole[0], whole[1]), b = _mm512_packs_epi32(whole[2], whole[3]);
  const __m512i less = _mm512_set1_epi16(255), half = _mm512_set1_epi16(128);
  _mm512_store_si512(low, _mm512_packus_epi16(_mm512_and_si512(a, less), _mm512_and_si512(b, less)));
  _mm512_store_si512(high, _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(a, half), 8),
                                              _mm512_srai_epi16(_mm512_add_epi16(b, half), 8)));
  return _mm512_reduce_add_epi32(
      _mm512_add_epi32(_mm512_add_epi32(whole[0], whole[1]), _mm512_add_epi32(whole[2], whole[3])));
}

/// What columns of high and low bytes stand for, once each is multiplied with its unit: one number for each of eight rows.
HEED_INLINE Lane join_columns(F x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); }

/// Sums of Q's columns over `words` words, and these times `by`.
HEED_INLINE void column_sums(const uint32_t* q, int words, int by, float* sums, int32_t* multiples) {
  __m512i sum = _mm512_setzero_si512();
  for (int i = 0; i < words; ++i)
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(q + i * kColumns));
  store(sums, _mm512_cvtepi32_ps(sum));
  _mm512_storeu_si512(multiples, _mm512_mullo_epi32(sum, _mm512_set1_epi32(by)));
}

HEED_INLINE void split_pairs(F a, F b, F& even, F& odd) {
  const __m512i first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even = _mm512_permutex2var_ps(a, first, b);
  odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(first, _mm512_set1_epi32(1)), b);
}
/// x [n] of n-tuples → out[i]: the i-th of each.
template <int n>
HEED_INLINE void split_tuples(const F* x, F* out) {
  if constexpr (n == 1) {
    out[0] = x[0];
  } else {
    F even[n / 2], odd[n / 2], a[n / 2], b[n / 2];
    for (int i = 0; i < n / 2; ++i) split_pairs(x[2 * i], x[2 * i + 1], even[i], odd[i]);
    split_tuples<n / 2>(even, a), split_tuples<n / 2>(odd, b);
    for (int i = 0; i < n / 2; ++i) out[2 * i] = a[i], out[2 * i + 1] = b[i];
  }
}

#endif

}  // namespace heed::HEED_ISA
