// Scores of keys and sums of values for decode, from the codes of quantised pages, where products of 16-bit pairs are what the
// machine has (AVX2): the equations of decode_codes.h, with codes widened to 16 bits and q, q s, p s rounded to 16.
//
// Codes come in steps of 32 channels as two vectors; channel_at says which channel lies where.
#pragma once
#include <utility>

#include "kernels/cpu/code_products.h"
#include "kernels/cpu/decode_entries.h"

namespace heed::HEED_ISA {

#if defined(HEED_PAIR_DOT) && !defined(HEED_CODE_PRODUCTS)

/// Channel of number i of a step's two vectors.
template <int Bits>
constexpr int channel_at(int i) {
  if (Bits == 8) return i;
  if (Bits == 4) return i % 16 * 2 + i / 16;
  return i % 8 * 4 + i / 8;
}

/// A step's codes, in that order.
template <int Bits>
HEED_INLINE void open_codes(const char* from, Words& a, Words& b) {
  const auto* bytes = reinterpret_cast<const __m128i*>(from);
  if constexpr (Bits == 8) {
    a = _mm256_cvtepu8_epi16(_mm_loadu_si128(bytes)), b = _mm256_cvtepu8_epi16(_mm_loadu_si128(bytes + 1));
  } else if constexpr (Bits == 4) {
    const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(bytes));
    a = _mm256_and_si256(x, _mm256_set1_epi16(15)), b = _mm256_srli_epi16(x, 4);
  } else {
    const __m256i x = _mm256_broadcastsi128_si256(_mm_cvtepu8_epi16(_mm_loadl_epi64(bytes))), three = _mm256_set1_epi16(3);
    a = _mm256_and_si256(_mm256_srlv_epi32(x, _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2)), three);
    b = _mm256_and_si256(_mm256_srlv_epi32(x, _mm256_setr_epi32(4, 4, 4, 4, 6, 6, 6, 6)), three);
  }
}

/// The 32 numbers of a step in the channels' order: x[0] to x[3] hold numbers 8 i … 8 i + 7 of channel_at's.
template <int Bits>
HEED_INLINE void in_order(F (&x)[4]) {
  if constexpr (Bits == 4) {
    interleave(x[0], x[2], x[0], x[2]), interleave(x[1], x[3], x[1], x[3]);
    std::swap(x[1], x[2]);
  } else if constexpr (Bits == 2) {
    F even[2], odd[2];
    interleave(x[0], x[2], even[0], even[1]), interleave(x[1], x[3], odd[0], odd[1]);
    interleave(even[0], odd[0], x[0], x[1]), interleave(even[1], odd[1], x[2], x[3]);
  }
}

inline constexpr int kCodeStep = 32;

class CodeReader : public CodeRows<CodeReader, kCodeStep> {
 public:
  static int64_t bytes(int d, int d_v) { return Room(nullptr, d, d_v).bytes; }
  CodeReader(char* memory, int d, int d_v) : CodeRows(d, d_v), room_(memory, d, d_v) {}

 private:
  friend class CodeRows<CodeReader, kCodeStep>;

  static constexpr int kBlock = 2;  // query rows whose sums fit the registers beside codes
  static constexpr float kMost = 32767;

  struct Room {
    int64_t bytes = 0;
    int16_t *q = nullptr, *weights = nullptr;              // [rows][d], [rows][64]
    float *turned = nullptr, *q_sums = nullptr;            // [rows][d], [rows][groups rounded up to vectors]
    float *scale = nullptr, *low = nullptr;                // [64][groups]
    float *turned_scale = nullptr, *turned_low = nullptr;  // [groups][64]
    /// memory null: only `bytes` is set.
    Room(char* memory, int d, int d_v) {
      const auto take = [&]<class T>(T*& to, int64_t count) {
        if (memory) to = reinterpret_cast<T*>(memory + bytes);
        bytes += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
      };
      const int64_t widest = std::max(d, d_v), steps = widest / kCodeStep, all = std::max(kPage * steps, widest) + kLanes;
      take(q, kDecodeRows * int64_t(d)), take(weights, kDecodeRows * int64_t(kPage)), take(turned, kDecodeRows * widest);
      take(q_sums, kDecodeRows * (steps + kLanes)), take(scale, all), take(low, all), take(turned_scale, all),
          take(turned_low, all);
    }
  };

  /// Row r of Q = x [d] / unit, rounded.
  template <int Bits>
  void round_row(const float* x, int r) {
    F top = zero();
    for (int c = 0; c < d_; c += kLanes) top = max(top, abs(load(x + c)));
    const float most = hmax(top);
    const F by = set(most > 0 ? kMost / most : 0);
    int16_t* to = room_.q + int64_t(r) * d_;
    for (int c = 0; c < d_; c += kCodeStep, to += kCodeStep) {
      alignas(32) float numbers[kCodeStep];
      for (int i = 0; i < kCodeStep; ++i) numbers[i] = x[c + channel_at<Bits>(i)];
      for (int i = 0; i < kCodeStep; i += kLanes) store_integers(to + i, load(numbers + i) * by);
    }
    unit_[r] = most * (1 / kMost);
  }

  /// Scores of `R` rows from r0 on with entries first … first + count: sums(entry) starts them, scales [entries][groups] are
  /// those of each per_group channels (Stepwise: of each step), finish(row, scores) what they are.
  template <int Bits, int R, bool Stepwise, class Sums, class Finish>
  HEED_INLINE void dots(const Entries& e, const Entries* next, int first, int count, int r0, int per_group,
                        const float* scales, int groups, Sums&& sums, Finish&& finish, float* scores) const {
    const int64_t d = d_, row_bytes = d * Bits / 8;
    const int16_t* q = room_.q + r0 * d;
    for (int j = first; j < first + count; j += kLanes) {
      F fours[R][kLanes / 4];
      for (int block = 0; block < kLanes / 4; ++block) {
        F sum[4][R];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const int at = j + 4 * block + i;
          const char* row = e.k[at];
          if (next && r0 == 0)
            for (int64_t b = 0; b < row_bytes; b += 64) __builtin_prefetch(next->k[at] + b, 0, 2);
          const int entry = std::min(at, e.count - 1);
          sums(entry, sum[i]);
          const float* scale = scales + entry * groups;
          for (int64_t c = 0; c < d; ++scale) {
            Words dot[R];
            const int64_t end = Stepwise ? c + kCodeStep : std::min(c + per_group, d);
#pragma GCC unroll 2
            for (int r = 0; r < R; ++r) dot[r] = set_word(0);
            do {
              Words a, b;
              open_codes<Bits>(row + c * Bits / 8, a, b);
#pragma GCC unroll 2
              for (int r = 0; r < R; ++r) {
                const int16_t* x = q + r * d + c;
                dot[r] = add_pairs(add_pairs(dot[r], a, load_words(x)), b, load_words(x + kCodeStep / 2));
              }
              c += kCodeStep;
            } while (!Stepwise && c < end);
            const F by = set(*scale);
#pragma GCC unroll 2
            for (int r = 0; r < R; ++r) sum[i][r] = fma(to_float(dot[r]), by, sum[i][r]);
          }
        }
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) fours[r][block] = sum_quads(sum[0][r], sum[1][r], sum[2][r], sum[3][r]);
      }
      for (int r = 0; r < R; ++r) store(scores + (r0 + r) * kScoreRow + j, finish(r0 + r, sum_fours(fours[r])));
    }
  }
  /// Calls f.template operator()<R>(first row) for blocks of rows.
  template <class Fn>
  HEED_INLINE void over_blocks(Fn&& f) const {
    int r = 0;
    for (; r + kBlock <= rows_; r += kBlock) f.template operator()<kBlock>(r);
    if (r < rows_) f.template operator()<1>(r);
  }

  /// Scales, and zeros where there are any, of a batch's entries: [entries][groups].
  void open_scales(const Entries& e, const PageType& type, int groups, PageSide (*side)(const PageLayout&, char*)) const {
    for (int i = 0; i < e.parts; ++i) {
      const Entries::Part& part = e.part[i];
      const PageSide from = side(*e.layout, part.page);
      const int first = part.first * groups, count = part.count * groups, at = part.at * groups;
      convert_row(from.scales() + first, count, room_.scale + at);
      if (type.zeros()) convert_row(from.zeros() + first, count, room_.low + at);
    }
  }

  /// [count][groups] → [groups][64], zeros behind the last.
  static void turn(const float* from, int count, int groups, float* to) {
    int g = 0;
    for (; g + 4 <= groups; g += 4)
      for (int j = 0; j < kPage; j += 4) {
        __m128 x[4];
        for (int i = 0; i < 4; ++i) x[i] = j + i < count ? _mm_loadu_ps(from + (j + i) * groups + g) : _mm_setzero_ps();
        _MM_TRANSPOSE4_PS(x[0], x[1], x[2], x[3]);
        for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + (g + i) * kPage + j, x[i]);
      }
    for (; g < groups; ++g)
      for (int j = 0; j < kPage; ++j) to[g * kPage + j] = j < count ? from[j * groups + g] : 0;
  }

  template <int Bits>
  void scores_by_entry(const Entries& e, const Entries* next, float* scores) {
    const PageType& type = e.layout->k;
    const int per_group = std::min(type.group, d_), groups = (d_ + per_group - 1) / per_group,
              wide = (groups + kLanes - 1) / kLanes * kLanes;
    const float half = type.zeros() ? 1 : -float(1 << (Bits - 1));  // what the sums of a group are multiplied with besides
    if (packed_ != &type) {
      for (int r = 0; r < rows_; ++r) {
        round_row<Bits>(query_ + int64_t(r) * d_, r);
        float* sums = room_.q_sums + r * wide;
        std::fill_n(sums, wide, 0.0f);
        for (int g = 0; g < groups; ++g) {
          const int64_t begin = int64_t(r) * d_ + g * per_group, end = int64_t(r) * d_ + std::min((g + 1) * per_group, d_);
          Words sum = set_word(0);
          for (int64_t c = begin; c < end; c += kCodeStep / 2)
            sum = add_pairs(sum, load_words(room_.q + c), set_word(0x00010001));
          sums[g] = half * hsum(to_float(sum));
        }
      }
      packed_ = &type;
    }
    open_scales(e, type, groups, PageSide::keys);
    float *scale = room_.scale, *low = type.zeros() ? room_.low : scale, *q_sums = room_.q_sums;
    store(low + e.count * groups, zero());  // of the last entry a whole vector is read too
    over_blocks([&]<int R>(int r0) {
      const auto all = [&]<bool Stepwise>() {
        dots<Bits, R, Stepwise>(
            e, next, 0, e.count, r0, per_group, scale, groups,
            [&](int entry, F(&sum)[R]) {
              for (int r = 0; r < R; ++r) sum[r] = zero();
              for (int g = 0; g < groups; g += kLanes)
                for (int r = 0; r < R; ++r)
                  sum[r] = fma(load(low + entry * groups + g), load(q_sums + (r0 + r) * wide + g), sum[r]);
            },
            [&](int r, F sums) { return sums * set(unit_[r]); }, scores);
      };
      if (per_group == kCodeStep) all.template operator()<true>();
      else all.template operator()<false>();
    });
  }

  template <int Bits>
  bool scores_by_channel(const Entries& e, const Entries* next, float* scores) {
    return over_runs(e, room_.scale, room_.low, room_.turned, [&](int first, int count, const float* base) {
      packed_ = nullptr;
      for (int r = 0; r < rows_; ++r) round_row<Bits>(room_.turned + int64_t(r) * d_, r);
      over_blocks([&]<int R>(int r0) {
        const float one = 1;
        dots<Bits, R, false>(
            e, next, first, count, r0, d_, &one, 0,
            [](int, F(&sum)[R]) {
              for (F& x : sum) x = zero();
            },
            [&](int r, F sums) { return fma(sums, set(unit_[r]), set(base[r])); }, scores);
      });
    });
  }

  /// The 32 sums of a step over all entries, for `R` rows of weights from r0 on.
  template <int Bits, int R, bool Fetch>
  HEED_INLINE void sum_values(const Entries& e, const Entries* next, int64_t at, int r0, F (&sums)[R][4]) const {
    Words sum[R][4];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum[r][i] = set_word(0);
    const int16_t* weights = room_.weights + r0 * kPage;
    const int64_t row_bytes = d_v_ * int64_t(Bits) / 8;
    for (int j = 0; j < e.count; j += 2) {
      if constexpr (Fetch)
        for (int k = j; k < j + 2; ++k)
          for (int64_t b = 0; b < row_bytes; b += 64) __builtin_prefetch(next->v[k] + b, 0, 2);
      Words a[2], b[2];
      open_codes<Bits>(e.v[j] + at, a[0], b[0]), open_codes<Bits>(e.v[j + 1] + at, a[1], b[1]);
      const Words pairs[4] = {_mm256_unpacklo_epi16(a[0], a[1]), _mm256_unpackhi_epi16(a[0], a[1]),
                              _mm256_unpacklo_epi16(b[0], b[1]), _mm256_unpackhi_epi16(b[0], b[1])};
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        int32_t word;
        std::memcpy(&word, weights + r * kPage + j, 4);
        const Words both = set_word(word);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sum[r][i] = add_pairs(sum[r][i], pairs[i], both);
      }
    }
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < 4; i += 2) {
        sums[r][i] = to_float(_mm256_permute2x128_si256(sum[r][i], sum[r][i + 1], 0x20));
        sums[r][i + 1] = to_float(_mm256_permute2x128_si256(sum[r][i], sum[r][i + 1], 0x31));
      }
      in_order<Bits>(sums[r]);
    }
  }

  template <int Bits>
  void add_values(const Entries& e, const Entries* next, const float* p, const float* keep, const float* worth, float* out) {
    const PageType& type = e.layout->v;
    const int d_v = d_v_, group = std::min(type.group, d_v), groups = (d_v + group - 1) / group;
    const float half = float(1 << (Bits - 1));
    const bool zeros = type.zeros();
    open_scales(e, type, groups, PageSide::values);
    turn(room_.scale, e.count, groups, room_.turned_scale);
    if (zeros) turn(room_.low, e.count, groups, room_.turned_low);
    for (int g = 0; g < groups; ++g) {
      const float *scale = room_.turned_scale + g * kPage, *low = room_.turned_low + g * kPage;
      F top = zero();
      for (int j = 0; j < kPage; j += kLanes) top = max(top, abs(load(scale + j)));
      const float most = hmax(top);
      const F by = set(most > 0 ? kMost / most : 0);
      float unit[kDecodeRows], lows[kDecodeRows];
      for (int r = 0; r < rows_; ++r) {
        F whole = zero(), sum = zero();
        for (int j = 0; j < kPage; j += kLanes) {
          const F weight = load(p + r * kScoreRow + j), number = round(weight * load(scale + j) * by);
          store_integers(room_.weights + r * kPage + j, number);
          whole = whole + number;
          if (zeros) sum = fma(weight, load(low + j), sum);
        }
        unit[r] = worth[r] * most * (1 / kMost);
        lows[r] = zeros ? worth[r] * hsum(sum) : -half * hsum(whole) * unit[r];
      }
      for (int c = g * group; c < std::min((g + 1) * group, d_v); c += kCodeStep)
        over_blocks([&]<int R>(int r0) {
          F sums[R][4];
          if (next && c == 0 && r0 == 0) sum_values<Bits, R, true>(e, next, 0, r0, sums);
          else sum_values<Bits, R, false>(e, next, c * int64_t(Bits) / 8, r0, sums);
          for (int r = 0; r < R; ++r) {
            float* to = out + int64_t(r0 + r) * d_v + c;
            for (int i = 0; i < 4; ++i) {
              const F here = fma(sums[r][i], set(unit[r0 + r]), set(lows[r0 + r]));
              store(to + i * kLanes, fma(load(to + i * kLanes), set(keep[r0 + r]), here));
            }
          }
        });
    }
  }

  Room room_;
};

#elif !defined(HEED_CODE_PRODUCTS)

/// Where there are no such products, pages are read as rows of f32.
struct CodeReader {
  CodeReader(char*, int, int) {}
  static bool reads_keys(const PageType&, int) { return false; }
  static bool reads_values(const PageType&, int) { return false; }
  static int64_t bytes(int, int) { return 0; }
  void open(const float*, int) {}
  bool scores(const Entries&, const Entries*, float*) { return false; }
  void values(const Entries&, const Entries*, const float*, const float*, const float*, float*) {}
};

#endif

}  // namespace heed::HEED_ISA
