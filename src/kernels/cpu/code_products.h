// Whole-number products of pages' codes: vpdpbusd, 64 bytes an instruction.
//
// The other operand (query rows; weights of entries) has sixteen bits, kept as two signed bytes: x ≈ unit · (256 high +
// low). Codes that are added up lie in one word of four bytes, and no lane meets another:
//
//   keys     a word is four channels of an entry, lanes are sixteen entries
//   values   a word is one channel of four entries, lanes are sixteen channels
//
//   step     32 channels
//   Q        [⌈d / 64⌉][rows][high, low][16 words], words in the order of `channel_at`
//   W        [8 rows of high bytes, 8 of low ones][64 entries]; words of four entries are in the order of `word_at`
//   V        [16 words of 4 entries][even channels, odd channels][16], of a step
#pragma once
#include <array>

#include "kernels/cpu/simd.h"
#include "kernels/cpu/unrolled.h"

namespace heed::HEED_ISA {

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define HEED_CODE_PRODUCTS 1

inline constexpr int kCodeStep = 32, kCodeRows = 8;
inline constexpr int kMostWhole = 127 * 256;  // of 256 high + low

/// Where word i of W and of V lies: packing four vectors of 16 numbers into bytes turns words so.
constexpr int word_at(int i) { return i % 4 * 4 + i / 4; }

HEED_INLINE __m512i four_at(const void* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}
/// sum + codes · x of each word. Not the intrinsic: g++ 12 keeps its sums in memory, each stored in every step.
HEED_INLINE void add_codes(__m512i& sum, __m512i codes, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
}
/// What sums of high and of low bytes stand for.
HEED_INLINE F join(__m512i high, __m512i low) {
  return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
}

/// Sixteen bytes of each of four rows.
HEED_INLINE __m512i four_rows(const char* a, const char* b, const char* c, const char* d, int64_t at) {
  const auto sixteen = [at](const char* row) { return _mm_loadu_si128((const __m128i*)(row + at)); };
  __m512i x = _mm512_castsi128_si512(sixteen(a));
  x = _mm512_inserti32x4(x, sixteen(b), 1);
  x = _mm512_inserti32x4(x, sixteen(c), 2);
  return _mm512_inserti32x4(x, sixteen(d), 3);
}

/// Four words, from byte `at` on, of sixteen rows (a row's last ones may lie behind its end): word by word to four vectors
/// that lie `step` bytes apart.
HEED_INLINE void turn_rows(const char* const rows[16], int64_t at, uint8_t* out, int64_t step) {
  __m512i x[4], y[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) x[i] = four_rows(rows[i], rows[4 + i], rows[8 + i], rows[12 + i], at);
  y[0] = _mm512_unpacklo_epi32(x[0], x[1]), y[1] = _mm512_unpackhi_epi32(x[0], x[1]);
  y[2] = _mm512_unpacklo_epi32(x[2], x[3]), y[3] = _mm512_unpackhi_epi32(x[2], x[3]);
  _mm512_store_si512(out, _mm512_unpacklo_epi64(y[0], y[2]));
  _mm512_store_si512(out + step, _mm512_unpackhi_epi64(y[0], y[2]));
  _mm512_store_si512(out + 2 * step, _mm512_unpacklo_epi64(y[1], y[3]));
  _mm512_store_si512(out + 3 * step, _mm512_unpackhi_epi64(y[1], y[3]));
}

/// A byte for each code: vector k has codes k, k + 8 / Bits, … of each word.
template <int Bits>
HEED_INLINE void open_words(__m512i x, __m512i (&out)[8 / Bits]) {
  const __m512i one = _mm512_set1_epi8(char((1 << Bits) - 1));
#pragma GCC unroll 4
  for (int k = 0; k < 8 / Bits; ++k)
    out[k] = Bits == 8 ? x : _mm512_and_si512(k == 0 ? x : _mm512_srli_epi32(x, unsigned(k * Bits)), one);
}
/// The channel of byte i of Q's words, so that Q meets what open_words makes.
template <int Bits>
constexpr int channel_at(int i) {
  const int wide = 8 / Bits, word = i / 4;
  return word / wide * 4 * wide + i % 4 * wide + word % wide;
}
/// Words of 64 bytes in the channels' order.
template <int Bits>
HEED_INLINE __m512i mixed(const int8_t* from) {
  alignas(64) static constexpr auto order = [] {
    std::array<uint8_t, 64> out{};
    for (int i = 0; i < 64; ++i) out[size_t(i)] = uint8_t(channel_at<Bits>(i));
    return out;
  }();
  return _mm512_permutexvar_epi8(_mm512_load_si512(order.data()), _mm512_loadu_si512(from));
}

/// Dots of `R` rows of Q with the codes [words][N][16] of `N` · 16 entries, over Q's words from `first` up to `last`:
/// finish(r, n, dots) takes those of row r and the n-th sixteen entries.
template <int Bits, int R, int N, class Finish>
HEED_INLINE void key_products(const uint8_t* codes, const uint32_t* q, int first, int last, Finish&& finish) {
  constexpr int kWide = 8 / Bits;
  __m512i high[R * N], low[R * N];
  unrolled<R * N>([&](auto i) HEED_LAMBDA { high[i] = low[i] = _mm512_setzero_si512(); });
  for (int t = first; t < last;) {
    const uint32_t* x = q + t / 16 * (32 * R) + t % 16;
    for (const int end = std::min(last, t / 16 * 16 + 16); t < end; t += kWide, x += kWide, codes += 64 * N) {
      __m512i open[N][kWide];
      unrolled<N>([&](auto n) HEED_LAMBDA { open_words<Bits>(_mm512_load_si512(codes + 64 * n), open[n]); });
      unrolled<kWide * R>([&](auto i) HEED_LAMBDA {
        constexpr int k = i / R, r = i % R;
        const __m512i h = four_at(x + 32 * r + k), l = four_at(x + 32 * r + 16 + k);
        unrolled<N>([&](auto n) HEED_LAMBDA {
          add_codes(high[r * N + n], open[n][k], h), add_codes(low[r * N + n], open[n][k], l);
        });
      });
    }
  }
  unrolled<R * N>([&](auto i) HEED_LAMBDA { finish(i / N, i % N, join(high[i], low[i])); });
}

/// W · V of a step for `R` rows, w the first of them: finish(r, even channels' sums, odd ones').
template <int R, class Finish>
HEED_INLINE void value_products(const int8_t* w, const uint8_t* v, Finish&& finish) {
  constexpr int kTurns = R == 1 ? 4 : R == 2 ? 2 : 1;  // sixteen sums, or one has to wait for itself
  __m512i high[2 * R * kTurns], low[2 * R * kTurns];
  unrolled<2 * R * kTurns>([&](auto i) HEED_LAMBDA { high[i] = low[i] = _mm512_setzero_si512(); });
  for (int i = 0; i < 16; i += kTurns)
    unrolled<kTurns>([&](auto turn) HEED_LAMBDA {
      const __m512i even = _mm512_load_si512(v + (i + turn) * 128), odd = _mm512_load_si512(v + (i + turn) * 128 + 64);
      unrolled<R>([&](auto r) HEED_LAMBDA {
        const int8_t* of = w + r * 64 + (i + turn) * 4;
        const __m512i h = four_at(of), l = four_at(of + kCodeRows * 64);
        constexpr int at = 2 * (turn * R + r);
        add_codes(high[at], even, h), add_codes(high[at + 1], odd, h);
        add_codes(low[at], even, l), add_codes(low[at + 1], odd, l);
      });
    });
  unrolled<R>([&](auto r) HEED_LAMBDA {
    F sums[2];
    unrolled<2>([&](auto half) HEED_LAMBDA {
      __m512i h = high[2 * r + half], l = low[2 * r + half];
      unrolled<kTurns - 1>([&](auto turn) HEED_LAMBDA {
        constexpr int at = 2 * ((turn + 1) * R + r) + half;
        h = _mm512_add_epi32(h, high[at]), l = _mm512_add_epi32(l, low[at]);
      });
      sums[half] = join(h, l);
    });
    finish(r, sums[0], sums[1]);
  });
}

/// Codes of a step of four entries as a word of V: even and odd channels, or (8 bits) the lower and the upper half. 2 bits:
/// may read 8 bytes past the row's end.
template <int Bits>
HEED_INLINE void turn_codes(const char* const from[4], int64_t offset, __m512i& even, __m512i& odd) {
  alignas(64) static constexpr auto turned = [] {
    std::array<uint8_t, 64> out{};
    for (int i = 0; i < 64; ++i) out[size_t(i)] = uint8_t(i % 4 * 16 + (Bits == 2 ? i / 8 : i / 4));
    return out;
  }();
  const __m512i order = _mm512_load_si512(turned.data()),
                x = _mm512_permutexvar_epi8(order, four_rows(from[0], from[1], from[2], from[3], offset));
  if constexpr (Bits == 8) {
    even = x, odd = _mm512_permutexvar_epi8(order, four_rows(from[0], from[1], from[2], from[3], offset + 16));
  } else if constexpr (Bits == 4) {
    even = _mm512_and_si512(x, _mm512_set1_epi8(15));
    odd = _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15));
  } else {
    const __m512i three = _mm512_set1_epi8(3);
    even = _mm512_and_si512(_mm512_srlv_epi32(x, _mm512_set1_epi64(int64_t(4) << 32)), three);
    odd = _mm512_and_si512(_mm512_srlv_epi32(x, _mm512_set1_epi64(int64_t(6) << 32 | 2)), three);
  }
}

/// Rounds 32 numbers of at most kMostWhole to 256 high + low.
HEED_INLINE void split_whole(F a, F b, int8_t* high, int8_t* low) {
  const __m512i words = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a))),
                                           _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(b)), 1);
  const __m512i upper = _mm512_srli_epi16(_mm512_add_epi16(words, _mm512_set1_epi16(128)), 8);
  _mm256_storeu_si256((__m256i*)low, _mm512_cvtepi16_epi8(words));
  _mm256_storeu_si256((__m256i*)high, _mm512_cvtepi16_epi8(upper));
}

/// A row of W and its low bytes, from x [64] as whole numbers.
HEED_INLINE void split_weights(const __m512i x[4], int8_t* high, int8_t* low) {
  const __m512i a = _mm512_packs_epi32(x[0], x[1]), b = _mm512_packs_epi32(x[2], x[3]);
  const __m512i less = _mm512_set1_epi16(255), half = _mm512_set1_epi16(128);
  _mm512_store_si512(low, _mm512_packus_epi16(_mm512_and_si512(a, less), _mm512_and_si512(b, less)));
  _mm512_store_si512(high, _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(a, half), 8),
                                              _mm512_srai_epi16(_mm512_add_epi16(b, half), 8)));
}
/// The sum of each of four vectors.
HEED_INLINE __m128 sum_rows(const F x[4]) {
  const F sum = sum_quads(x[0], x[1], x[2], x[3]);
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
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
