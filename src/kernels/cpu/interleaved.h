// 32 codes of kLanes rows at a time, out of matrices whose rows lie sixteen side by side (kernels/quant.h). Lane = row: a scale
// is loaded for all rows at once, and sums need no adding up across lanes. The operations are those of codes.h, so that
// quants.h says once how a format's codes lie.
#pragma once
#include <algorithm>

#include "kernels/cpu/codes.h"
#include "kernels/quant.h"

namespace heed::HEED_ISA {

/// Four codes of each row.
using Word = uint32_t __attribute__((vector_size(4 * kLanes)));
/// A whole number of each row.
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));

/// The same bytes of each row's block, from where the first of kLanes rows has them.
struct Bytes {
  const char* at;
  /// n a multiple of 4.
  Bytes operator+(int n) const { return {at + kSideBySide * n}; }
  HEED_INLINE Word word(int i) const {
    Word w;
    std::memcpy(&w, at + 4 * kSideBySide * i, sizeof w);
    return w;
  }
};

/// Word j holds codes 4 j … 4 j + 3.
struct RowCodes {
  Word word[8];
};

HEED_INLINE Word each_byte(Word w, uint8_t mask) { return w & mask * 0x01010101u; }
HEED_INLINE RowCodes load_codes(Bytes p) {
  RowCodes out;
  for (int j = 0; j < 8; ++j) out.word[j] = p.word(j);
  return out;
}
HEED_INLINE RowCodes load_halves(Bytes p) {
  RowCodes out;
  for (int j = 0; j < 4; ++j) {
    const Word w = p.word(j);
    out.word[j] = each_byte(w, 15);
    out.word[4 + j] = each_byte(w >> 4, 15);
  }
  return out;
}
template <int Shift>
HEED_INLINE RowCodes field(RowCodes c, uint8_t mask) {
  for (Word& w : c.word) w = each_byte(w >> Shift, mask);
  return c;
}
template <int Shift>
HEED_INLINE RowCodes join(RowCodes low, RowCodes high) {
  for (int j = 0; j < 8; ++j) low.word[j] |= high.word[j] << Shift;
  return low;
}
HEED_INLINE Word load_bits(Bytes p) { return p.word(0); }
HEED_INLINE RowCodes add_fifth(RowCodes c, Word bits) {
#if defined(__AVX512F__)
  alignas(64) static constexpr uint32_t spread[16] = {
      0x00000000, 0x00000010, 0x00001000, 0x00001010, 0x00100000, 0x00100010, 0x00101000, 0x00101010,
      0x10000000, 0x10000010, 0x10001000, 0x10001010, 0x10100000, 0x10100010, 0x10101000, 0x10101010};
  for (int j = 0; j < 8; ++j)
    c.word[j] |= Word(_mm512_permutexvar_epi32(__m512i(bits >> 4 * j), _mm512_load_si512(spread)));
#elif defined(__x86_64__)
  // Each byte of bits four times; then each its own bit.
  for (int i = 0; i < 4; ++i) {
    const __m128i from = _mm_add_epi8(_mm_setr_epi32(0x00000000, 0x04040404, 0x08080808, 0x0c0c0c0c),
                                      _mm_set1_epi8(char(i)));
    const __m256i spread = _mm256_shuffle_epi8(__m256i(bits), _mm256_broadcastsi128_si256(from));
    for (int half = 0; half < 2; ++half) {
      const __m256i bit = _mm256_set1_epi32(half ? int(0x80402010) : 0x08040201);
      c.word[2 * i + half] |= Word(_mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit)) & 0x10101010u;
    }
  }
#else
  // A product puts bit k of four at bit 8 k + 4, and others where the mask takes them off.
  for (int j = 0; j < 8; ++j) c.word[j] |= ((bits >> 4 * j & 15) * 0x02040810u) & 0x10101010u;
#endif
  return c;
}
HEED_INLINE RowCodes look_up(const int8_t table[16], RowCodes c) {
  for (Word& w : c.word) {
#if defined(__AVX512BW__)
    w = Word(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), __m512i(w)));
#elif defined(__x86_64__)
    w = Word(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table)), __m256i(w)));
#else
    w = Word(vqtbl1q_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(table)), uint8x16_t(w)));
#endif
  }
  return c;
}

HEED_INLINE uint32_t four_activations(const int8_t* x) {
  uint32_t four;
  std::memcpy(&four, x, 4);
  return four;
}

#if defined(__x86_64__) && !defined(__AVX512VNNI__)
/// Products of a word's codes and four activations, two by two, in 16 bits.
template <bool Signed>
HEED_INLINE auto pair_products(Word w, const int8_t* activations) {
#if defined(__AVX512BW__)
  __m512i x = _mm512_set1_epi32(int(four_activations(activations))), codes = __m512i(w);
  if constexpr (Signed) {
    x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(codes), _mm512_setzero_si512(), x);
    codes = _mm512_abs_epi8(codes);
  }
  return _mm512_maddubs_epi16(codes, x);
#else
  __m256i x = _mm256_set1_epi32(int(four_activations(activations))), codes = __m256i(w);
  if constexpr (Signed) {
    x = _mm256_sign_epi8(x, codes);
    codes = _mm256_abs_epi8(codes);
  }
  return _mm256_maddubs_epi16(codes, x);
#endif
}
#if defined(__AVX512BW__)
HEED_INLINE __m512i add_halves(__m512i a, __m512i b) { return _mm512_add_epi16(a, b); }
HEED_INLINE Ints sum_halves(__m512i a) { return Ints(_mm512_madd_epi16(a, _mm512_set1_epi16(1))); }
#else
HEED_INLINE __m256i add_halves(__m256i a, __m256i b) { return _mm256_add_epi16(a, b); }
HEED_INLINE Ints sum_halves(__m256i a) { return Ints(_mm256_madd_epi16(a, _mm256_set1_epi16(1))); }
#endif
#endif

/// Sums over `Count` words of the products of their codes (0 … Top, or Signed: then with kSignedBias added) and activations.
template <int Count, int Top, bool Signed>
HEED_INLINE Ints dot_words(const Word* w, const int8_t* activations) {
  Ints sum = {};
#if defined(__AVX512VNNI__)
  for (int j = 0; j < Count; ++j) {
    const Word codes = Signed ? w[j] ^ 0x80808080u : w[j];
    sum = Ints(_mm512_dpbusd_epi32(__m512i(sum), __m512i(codes),
                                   _mm512_set1_epi32(int(four_activations(activations + 4 * j)))));
  }
#elif defined(__x86_64__)
  // Two products of at most 127 Top each: so many fit 16 bits before they are widened.
  constexpr int most = std::max(1, 32767 / (2 * 127 * Top));
  for (int j = 0; j < Count; j += most) {
    auto halves = pair_products<Signed>(w[j], activations + 4 * j);
    for (int i = j + 1; i < std::min(j + most, Count); ++i)
      halves = add_halves(halves, pair_products<Signed>(w[i], activations + 4 * i));
    sum += sum_halves(halves);
  }
#else
  for (int j = 0; j < Count; ++j) {
    const int8x16_t a = int8x16_t(w[j]), b = vreinterpretq_s8_u32(vdupq_n_u32(four_activations(activations + 4 * j)));
#if defined(__ARM_FEATURE_DOTPROD)
    sum = Ints(vdotq_s32(int32x4_t(sum), a, b));
#else
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b))),
                    high = vpaddlq_s16(vmull_s8(vget_high_s8(a), vget_high_s8(b)));
    sum += Ints(vpaddq_s32(low, high));
#endif
  }
#endif
  return sum;
}

HEED_INLINE F to_float(Ints x) { return F(__builtin_convertvector(x, float __attribute__((vector_size(4 * kLanes))))); }
/// Byte `i` of every word, unsigned or signed.
HEED_INLINE F byte_of(Word w, int i) { return to_float(Ints(w >> 8 * i & 255)); }
HEED_INLINE F signed_byte_of(Word w, int i) { return to_float(Ints(w << (24 - 8 * i)) >> 24); }

/// A block of each of kLanes rows: part `part` of a column of sixteen.
template <Dtype D>
struct AnySixteen {
  const char* numbers;
  Bytes bytes;
  HEED_INLINE AnySixteen(const char* column, int part)
      : numbers(column + 2 * kLanes * part),
        bytes{column + 2 * kSideBySide * block_numbers(D).count + 4 * kLanes * part} {}
  HEED_INLINE F number(int n) const { return load(reinterpret_cast<const f16*>(numbers + 2 * kSideBySide * n)); }
};

/// With members named as the block's.
template <Dtype D>
struct Sixteen : AnySixteen<D> {  // Q4_0, Q4_1, Q8_0, IQ4_NL
  using AnySixteen<D>::AnySixteen;
  Bytes qs = this->bytes;
};
template <>
struct Sixteen<Dtype::Q5_0> : AnySixteen<Dtype::Q5_0> {
  using AnySixteen::AnySixteen;
  Bytes qh = bytes, qs = bytes + 4;
};
template <>
struct Sixteen<Dtype::Q5_1> : AnySixteen<Dtype::Q5_1> {
  using AnySixteen::AnySixteen;
  Bytes qh = bytes, qs = bytes + 4;
};
template <>
struct Sixteen<Dtype::Q2_K> : AnySixteen<Dtype::Q2_K> {
  using AnySixteen::AnySixteen;
  Bytes scales = bytes, qs = bytes + 16;
};
template <>
struct Sixteen<Dtype::Q3_K> : AnySixteen<Dtype::Q3_K> {
  using AnySixteen::AnySixteen;
  Bytes hmask = bytes, qs = bytes + 32, scales = bytes + 96;
};
template <>
struct Sixteen<Dtype::Q4_K> : AnySixteen<Dtype::Q4_K> {
  using AnySixteen::AnySixteen;
  Bytes scales = bytes, qs = bytes + 12;
};
template <>
struct Sixteen<Dtype::Q5_K> : AnySixteen<Dtype::Q5_K> {
  using AnySixteen::AnySixteen;
  Bytes scales = bytes, qh = bytes + 12, qs = bytes + 44;
};
template <>
struct Sixteen<Dtype::Q6_K> : AnySixteen<Dtype::Q6_K> {
  using AnySixteen::AnySixteen;
  Bytes ql = bytes, qh = bytes + 128, scales = bytes + 192;
};

}  // namespace heed::HEED_ISA
