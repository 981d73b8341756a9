// Scores of keys and sums of values for decode, from the codes of quantised pages as they are:
//
//   keys by entry     Σ q (s code + m) = Σ over groups: s Σ q code + m Σ q
//   keys by channel   Σ q (s code + m) = Σ (q s) code + Σ q m, s and m of a run of entries
//   values by entry   Σ p (s code + m) = Σ (p s) code + Σ p m
//
// q, q s and p s are rounded to 16 bits of the largest of their row (of p s: among the 64 entries of a batch), by 2^-16 of
// it at most; the sums over codes are whole numbers, without an error.
#pragma once
#include "kernels/cpu/code_products.h"
#include "kernels/cpu/decode_entries.h"

namespace heed::HEED_ISA {

#if defined(HEED_CODE_PRODUCTS)

/// A worker's memory for it.
struct CodeRoom {
  /// memory null: only `bytes` is set.
  CodeRoom(char* memory, int d, int d_v) {
    const auto take = [&]<class T>(T*& to, int64_t count) {
      if (memory) to = reinterpret_cast<T*>(memory + bytes);
      bytes += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    };
    const int64_t widest = std::max(d, d_v), steps = (widest + kCodeStep - 1) / kCodeStep;
    take(q_, steps * (kCodeStep / 4 * kColumns)), take(columns_, kColumns * steps * kCodeStep);
    take(q_sums_, std::max<int64_t>(steps, kDecodeRows) * kColumns), take(q_less_, steps * kColumns);
    take(step_sums_, steps * kDecodeRows), take(turned_, kDecodeRows * widest);
    take(c_, 2 * steps * 16 * kColumns), take(open_, 2 * 16 * (widest + 64));
    take(halves_, kPage * steps), take(scale_, kPage * steps), take(low_, kPage * steps);
    take(w_, 2 * 16 * kPage), take(v_, 2 * 32 * kPage), take(o_, 2 * 512);
  }

  int64_t bytes = 0;

 protected:
  uint32_t* q_ = nullptr;      // Q, or (few rows) bytes in the order of mixed_codes
  int8_t* columns_ = nullptr;  // high and low bytes of each row [d]
  float *q_sums_ = nullptr, *step_sums_ = nullptr, *turned_ = nullptr;
  int32_t *q_less_ = nullptr, *c_ = nullptr, *o_ = nullptr;
  uint8_t *open_ = nullptr, *v_ = nullptr;
  f16* halves_ = nullptr;
  float *scale_ = nullptr, *low_ = nullptr;  // keys: [64][groups], values: [groups][64]
  int8_t* w_ = nullptr;
};

class CodeReader : CodeRoom, public CodeRows<CodeReader, kCodeStep> {
 public:
  static int64_t bytes(int d, int d_v) { return CodeRoom(nullptr, d, d_v).bytes; }
  CodeReader(char* memory, int d, int d_v) : CodeRoom(memory, d, d_v), CodeRows(d, d_v) {}

 private:
  friend class CodeRows<CodeReader, kCodeStep>;

  /// x [rows][d] as bytes: columns_ [high and low of each row][d], units and, if asked for, sums of each step's numbers.
  template <bool Sums>
  void split(const float* x) {
    const int d = d_, steps = d / kCodeStep;
    for (int r = 0; r < rows_; ++r) {
      int8_t *high = columns_ + r * d, *low = columns_ + (kCodeRows + r) * d;
      const float* row = x + int64_t(r) * d;
      F top = zero();
      for (int c = 0; c < d; c += kLanes) top = max(top, abs(load(row + c)));
      const float most = hmax(top);
      const F by = set(most > 0 ? kMostWhole / most : 0);
      for (int t = 0; t < steps; ++t) {
        const int c = t * kCodeStep;
        const F a = load(row + c) * by, b = load(row + c + kLanes) * by;
        split_whole(a, b, high + c, low + c);
        if (Sums) step_sums_[r * steps + t] = hsum(round(a) + round(b));
      }
      unit_[r] = most * (1.0f / kMostWhole);
    }
  }
  /// Columns as Q.
  void tile_columns() {
    for (int r = rows_; r < kCodeRows; ++r)
      std::memset(columns_ + r * d_, 0, size_t(d_)), std::memset(columns_ + (kCodeRows + r) * d_, 0, size_t(d_));
    for (int t = 0; t < d_ / kCodeStep; ++t)
      for (int at = 0; at < kColumns; at += kSquare) {
        Lane words[kSquare];
        for (int i = 0; i < kSquare; ++i)
          words[i] = load_lane(reinterpret_cast<const float*>(columns_ + (at + i) * d_ + t * kCodeStep));
        transpose(words);
        for (int i = 0; i < kSquare; ++i)
          store_lane(reinterpret_cast<float*>(q_ + (t * (kCodeStep / 4) + i) * kColumns + at), words[i]);
      }
  }
  F column_units() const {
    alignas(64) float unit[kColumns] = {};
    for (int r = 0; r < rows_; ++r) unit[r] = 256 * unit_[r], unit[kCodeRows + r] = unit_[r];
    return load(unit);
  }
  /// Columns as [row][d / 64][high, low][64] in the order of mixed_codes.
  template <int Bits>
  void mix_columns() {
    auto* to = reinterpret_cast<int8_t*>(q_);
    for (int r = 0; r < rows_; ++r)
      for (int c = 0; c < d_; c += 64, to += 128)
        mix<Bits>(columns_ + r * d_ + c, to), mix<Bits>(columns_ + (kCodeRows + r) * d_ + c, to + 64);
  }
  /// Few rows take whole vectors of codes, and a vector has the scales of 16 groups.
  bool tiled() const { return rows_ >= kTiledRows || d_ % 64 != 0 || d_ > 16 * kCodeStep; }

  struct Sixteen {
    const uint8_t* codes;
    int64_t stride;
  };
  /// Codes of entries j … j + 16 (j may be any), a byte each: where they lie, or in one of two places of their own.
  template <int Bits>
  Sixteen open_codes_of(const Entries& e, int j, int place) {
    const int64_t d = d_, stride = (d + 63) / 64 * 64;
    if constexpr (Bits == 8) {
      if (e.parts == 1 && e.part[0].first + j + 16 <= kPage && reinterpret_cast<uintptr_t>(e.k[0]) % 32 == 0)
        return {reinterpret_cast<const uint8_t*>(e.k[j]), d};
    }
    uint8_t* const all = open_ + place * 16 * stride;
    for (int i = 0; i < 16; ++i) {
      const auto* row = reinterpret_cast<const uint8_t*>(e.k[j + i]);
      uint8_t* to = all + i * stride;
      for (int64_t c = 0; c < d; c += 64) _mm512_store_si512(to + c, open_codes<Bits>(row + c * Bits / 8));
    }
    return {all, stride};
  }

  /// Asks for one side of `next`, line after line, in about so many calls: in the order of memory, which the machine's own
  /// prefetcher follows, and never many at once.
  class Ask {
   public:
    Ask(const Entries* next, bool keys, int calls) : next_(next), keys_(keys) {
      if (!next) return;
      lines_ = int((side(0).type->bytes(side(0).width) / 64 + calls - 1) / calls);
      if (next->parts > 1) left_ = next->parts;
      else open(0);
    }
    HEED_INLINE void operator()() {
      if (left_ > 0 && at_ >= end_) open(next_->parts - left_--);
      for (int i = 0; i < lines_; ++i, at_ += 64) __builtin_prefetch(at_, 0, 2);  // may go a little past the end
    }

   private:
    PageSide side(int part) const {
      char* page = next_->part[part].page;
      return keys_ ? PageSide::keys(*next_->layout, page) : PageSide::values(*next_->layout, page);
    }
    __attribute__((noinline)) void open(int number) {
      const Entries::Part& part = next_->part[number];
      const PageSide from = side(number);
      const int64_t row = from.type->row_bits(from.width) / 8;
      at_ = from.data + part.first * row, end_ = at_ + part.count * row;
    }

    const Entries* next_;
    bool keys_;
    int left_ = 0, lines_ = 0;  // parts not begun; lines of a call
    const char *at_ = nullptr, *end_ = nullptr;
  };

  /// A matrix register's rows are not forwarded from the buffer of stores, nor what it stores to loads: three things are
  /// under way at once, each with what the one before it made one turn ago.
  template <class Open, class Multiply, class Finish>
  HEED_INLINE static void in_turns(int count, Open&& open, Multiply&& multiply, Finish&& finish) {
    for (int i = 0; i < count + 2; ++i) {
      if (i < count) open(i);
      if (i >= 1 && i <= count) multiply(i - 1);
      if (i >= 2) finish(i - 2);
    }
  }

  /// Scores of sixteen entries: number(i) is a vector of columns, the i-th entry's.
  template <class Number>
  HEED_INLINE void store_scores(float* scores, Number&& number) const {
    for (int at = 0; at < 16; at += 8) {
      Lane eight[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) eight[i] = join_columns(number(at + i));
      transpose(eight);
      for (int r = 0; r < rows_; ++r) store_lane(scores + r * kScoreRow + at, eight[r]);
    }
  }

  /// Scores of `R` rows from r0 on: dots(entry, sums [4][R]) makes vectors whose lanes add up to those of four entries,
  /// finish(r, sums of 16 entries) what the scores are.
  template <int R, class Dots, class Finish>
  HEED_INLINE static void by_rows(int r0, int at, int count, float* scores, Dots&& dots, Finish&& finish) {
    for (int j = at; j < at + count; j += kLanes) {
      F fours[R][kLanes / 4];
      for (int block = 0; block < kLanes / 4; ++block) {
        F sum[4][R];
        dots(j + 4 * block, sum);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) fours[r][block] = sum_quads(sum[0][r], sum[1][r], sum[2][r], sum[3][r]);
      }
      for (int r = 0; r < R; ++r) store(scores + (r0 + r) * kScoreRow + j, finish(r0 + r, sum_fours(fours[r])));
    }
  }
  /// Calls f.template operator()<R>(first row) for blocks of up to four rows.
  template <class Fn>
  HEED_INLINE static void over_blocks(int rows, Fn&& f) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) f.template operator()<4>(r);
    if (rows - r == 3) f.template operator()<3>(r);
    else if (rows - r == 2) f.template operator()<2>(r);
    else if (rows - r == 1) f.template operator()<1>(r);
  }

  template <int Bits>
  void scores_by_entry(const Entries& e, const Entries* next, float* scores) {
    const PageType& type = e.layout->k;
    const int steps = d_ / kCodeStep, per_group = std::min(type.group, d_) / kCodeStep,
              groups = (steps + per_group - 1) / per_group;
    const bool zeros = type.zeros();
    if (packed_ != &type) {
      if (tiled()) {
        split<false>(query_);
        tile_columns();
        for (int g = 0; g < groups; ++g) {
          const int first = g * per_group, count = std::min(per_group, steps - first);
          column_sums(q_ + first * (kCodeStep / 4 * kColumns), count * (kCodeStep / 4), -(1 << (Bits - 1)),
                      q_sums_ + g * kColumns, q_less_ + g * kColumns);
        }
      } else {
        split<true>(query_);
        mix_columns<Bits>();
        for (int r = 0; r < rows_; ++r)
          for (int g = 0; g < (groups + 15) / 16 * 16; ++g) {
            float sum = 0;
            for (int t = g * per_group; t < std::min(steps, (g + 1) * per_group); ++t) sum += step_sums_[r * steps + t];
            q_sums_[r * 16 + g] = zeros ? sum : sum * -float(1 << (Bits - 1));
          }
      }
      packed_ = &type;
    }
    for (int i = 0; i < e.parts; ++i) {
      const Entries::Part& part = e.part[i];
      const PageSide side = PageSide::keys(*e.layout, part.page);
      convert_row(side.scales() + part.first * groups, part.count * groups, scale_ + part.at * groups);
      if (zeros) convert_row(side.zeros() + part.first * groups, part.count * groups, low_ + part.at * groups);
    }
    Ask ask(next, true, kPage / 4);
    if (tiled()) {
      if (zeros) tiled_scores<Bits, true>(e, ask, steps, per_group, groups, scores);
      else tiled_scores<Bits, false>(e, ask, steps, per_group, groups, scores);
    } else {
      if (per_group == 1) mixed_scores_of<Bits, true>(e, ask, 1, groups, zeros, scores);
      else mixed_scores_of<Bits, false>(e, ask, per_group, groups, zeros, scores);
    }
  }

  template <int Bits, bool Two>
  void mixed_scores_of(const Entries& e, Ask& ask, int per_group, int groups, bool zeros, float* scores) {
    const int chunks = d_ / 64;
    int shift = 0;  // log2 of the chunks that share a scale
    while (!Two && 2 << shift < per_group) ++shift;
    const float *scale = scale_, *low = zeros ? low_ : scale_, *q_sums = q_sums_;
    const auto* q = reinterpret_cast<const int8_t*>(q_);
    over_blocks(rows_, [&]<int R>(int r0) {
      by_rows<R>(
          r0, 0, e.count, scores,
          [&](int j, F(&sum)[4][R]) {
            if (r0 == 0) ask();
            const float* s = scale + j * groups;
            const char* const* rows = e.k + j;
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
              const F lows = load_part(low + (j + i) * groups, groups);
#pragma GCC unroll 4
              for (int r = 0; r < R; ++r) sum[i][r] = lows * load(q_sums + (r0 + r) * 16);
            }
            for (int c = 0; c < chunks; ++c) {
              const float* of_chunk = s + (Two ? 2 * c : c >> shift);
              const int8_t* x = q + (r0 * chunks + c) * 128;
#pragma GCC unroll 4
              for (int i = 0; i < 4; ++i) {
                const __m512i codes = mixed_codes<Bits>(rows[i] + c * (64 * Bits / 8));
                const F by = mixed_scales<Bits, Two>(of_chunk + i * groups);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                  const int8_t* row = x + r * chunks * 128;
                  sum[i][r] = fma(_mm512_cvtepi32_ps(whole_dots(codes, row, row + 64)), by, sum[i][r]);
                }
              }
            }
          },
          [&](int r, F sums) { return sums * set(unit_[r]); });
    });
  }

  template <int Bits, bool Zeros>
  void tiled_scores(const Entries& e, Ask& ask, int steps, int per_group, int groups, float* scores) {
    Sixteen opened[2];
    int32_t* const c = c_;
    const int64_t c_size = int64_t(groups) * 16 * kColumns;
    const float *scale = scale_, *low = low_, *q_sums = q_sums_;
    const F unit = column_units();
    const auto all = [&]<int G>() {  // groups; 0: any number
      const int count = G == 0 ? groups : G;
      in_turns((e.count + 15) / 16, [&](int i) { opened[i % 2] = open_codes_of<Bits>(e, 16 * i, i % 2); },
               [&](int i) {
                 key_products(opened[i % 2].codes, opened[i % 2].stride, q_, steps, per_group,
                              Zeros ? nullptr : q_less_, c + i % 2 * c_size);
                 for (int n = 0; n < 4; ++n) ask();
               },
               [&](int i) {
                 const int32_t* from = c + i % 2 * c_size;
                 const float *s = scale + 16 * i * count, *m = low + 16 * i * count;
                 store_scores(scores + 16 * i, [&](int j) {
                   F sum = load(from + j * kColumns) * set(s[j * count]), lows = zero();
                   if (Zeros) lows = load(q_sums) * set(m[j * count]);
#pragma GCC unroll 8
                   for (int g = 1; g < count; ++g) {
                     sum = fma(load(from + (g * 16 + j) * kColumns), set(s[j * count + g]), sum);
                     if (Zeros) lows = fma(load(q_sums + g * kColumns), set(m[j * count + g]), lows);
                   }
                   return (Zeros ? sum + lows : sum) * unit;
                 });
               });
    };
    switch (groups) {
      case 1: return all.template operator()<1>();
      case 2: return all.template operator()<2>();
      case 4: return all.template operator()<4>();
      case 8: return all.template operator()<8>();
      default: return all.template operator()<0>();
    }
  }

  template <int Bits>
  bool scores_by_channel(const Entries& e, const Entries* next, float* scores) {
    Ask ask(next, true, kPage / 4);
    return over_runs(e, scale_, low_, turned_, [&](int first, int count, const float* base) {
      packed_ = nullptr;
      split<false>(turned_);
      run_scores<Bits>(e, ask, first, count, base, scores);
    });
  }

  /// Of `count` entries from `first` on, whose scales are in the query rows.
  template <int Bits>
  void run_scores(const Entries& e, Ask& ask, int first, int count, const float* base, float* scores) {
    if (!tiled()) {
      mix_columns<Bits>();
      const int chunks = d_ / 64;
      const auto* q = reinterpret_cast<const int8_t*>(q_);
      return over_blocks(rows_, [&]<int R>(int r0) {
        by_rows<R>(
            r0, first, count, scores,
            [&](int j, F(&sum)[4][R]) {
              if (r0 == 0) ask();
              const char* const* rows = e.k + j;
              __m512i high[4][R], low[4][R];
#pragma GCC unroll 4
              for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) high[i][r] = low[i][r] = _mm512_setzero_si512();
              for (int c = 0; c < chunks; ++c) {
                const int8_t* x = q + (r0 * chunks + c) * 128;
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                  const __m512i codes = mixed_codes<Bits>(rows[i] + c * (64 * Bits / 8));
#pragma GCC unroll 4
                  for (int r = 0; r < R; ++r) {
                    const int8_t* row = x + r * chunks * 128;
                    high[i][r] = _mm512_dpbusd_epi32(high[i][r], codes, _mm512_loadu_si512(row));
                    low[i][r] = _mm512_dpbusd_epi32(low[i][r], codes, _mm512_loadu_si512(row + 64));
                  }
                }
              }
#pragma GCC unroll 4
              for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r)
                  sum[i][r] = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[i][r], 8), low[i][r]));
            },
            [&](int r, F sums) { return fma(sums, set(unit_[r]), set(base[r])); });
      });
    }
    tile_columns();
    const int steps = d_ / kCodeStep;
    const F low = load(base), unit = column_units();
    int32_t* const c = c_;
    Sixteen opened[2];
    in_turns((count + 15) / 16, [&](int k) { opened[k % 2] = open_codes_of<Bits>(e, first + 16 * k, k % 2); },
             [&](int k) {
               key_products(opened[k % 2].codes, opened[k % 2].stride, q_, steps, steps, nullptr, c + k % 2 * 16 * kColumns);
               for (int n = 0; n < 4; ++n) ask();
             },
             [&](int k) {
               const int32_t* numbers = c + k % 2 * 16 * kColumns;
               store_scores(scores + first + 16 * k, [&](int j) { return fma(load(numbers + j * kColumns), unit, low); });
             });
  }

  /// Scales, or zeros, of values: to [groups][64], zeros behind the last entry.
  void turn_halves(const Entries& e, bool zeros, int groups, float* to) {
    const auto from = [&](const Entries::Part& part) {
      const PageSide side = PageSide::values(*e.layout, part.page);
      return (zeros ? side.zeros() : side.scales()) + part.first * groups;
    };
    const f16* all = from(e.part[0]);
    if (e.parts > 1 || e.count < kPage) {
      std::memset(static_cast<void*>(halves_), 0, size_t(kPage * groups) * sizeof(f16));
      for (int i = 0; i < e.parts; ++i)
        std::memcpy(static_cast<void*>(halves_ + e.part[i].at * groups), from(e.part[i]),
                    size_t(e.part[i].count * groups) * sizeof(f16));
      all = halves_;
    }
    const auto turn = [&]<int n>() {
      for (int j = 0; j < kPage; j += kLanes) {
        F x[n], y[n];
        for (int i = 0; i < n; ++i) x[i] = load(all + j * n + i * kLanes);
        split_tuples<n>(x, y);
        for (int g = 0; g < n; ++g) store(to + g * kPage + j, y[g]);
      }
    };
    switch (groups) {
      case 1: return turn.template operator()<1>();
      case 2: return turn.template operator()<2>();
      case 4: return turn.template operator()<4>();
      case 8: return turn.template operator()<8>();
      default:
        for (int g = 0; g < groups; ++g)
          for (int j = 0; j < kPage; ++j) to[g * kPage + j] = float(all[j * groups + g]);
    }
  }

  template <int Bits>
  void add_values(const Entries& e, const Entries* next, const float* p, const float* keep, const float* worth, float* out) {
    const PageType& type = e.layout->v;
    const int d_v = d_v_, group = std::min(type.group, d_v), groups = (d_v + group - 1) / group, rows = rows_,
              half = type.zeros() ? 0 : 1 << (Bits - 1);
    const bool zeros = type.zeros();
    turn_halves(e, false, groups, scale_);
    if (zeros) turn_halves(e, true, groups, low_);
    Ask ask(next, false, d_v / 2);
    int8_t* const w = w_;
    const float *scales = scale_, *lows = low_;
    float unit[4][kDecodeRows], low[4][kDecodeRows];  // of the groups under way
    const auto weights = [&](int g) {
      F s[4], top = zero();
      for (int i = 0; i < 4; ++i) s[i] = load(scales + g * kPage + i * kLanes), top = max(top, abs(s[i]));
      const float most = hmax(top);
      const F by = set(most > 0 ? kMostWhole / most : 0);
      for (F& x : s) x = x * by;
      int8_t* to = w + g % 2 * (16 * kPage);
      for (int r = 0; r < rows; ++r) {
        F x[4], sum = zero();
        for (int i = 0; i < 4; ++i) {
          const F weight = load(p + r * kScoreRow + i * kLanes);
          x[i] = weight * s[i];
          if (zeros) sum = fma(weight, load(lows + g * kPage + i * kLanes), sum);
        }
        const int whole = split_weights(x, to + r * kPage, to + (kCodeRows + r) * kPage);
        const float one = worth[r] * most * (1.0f / kMostWhole);
        unit[g % 4][r] = one, low[g % 4][r] = zeros ? worth[r] * hsum(sum) : float(whole) * -half * one;
      }
    };
    const auto finish = [&](int t, int r, F a, F b) {
      const int g = t * kCodeStep / group % 4;
      a = fma(a, set(unit[g][r]), set(low[g][r])), b = fma(b, set(unit[g][r]), set(low[g][r]));
      if constexpr (Bits != 8) interleave(a, b, a, b);
      float* to = out + int64_t(r) * d_v + t * kCodeStep;
      store(to, fma(load(to), set(keep[r]), a));
      store(to + kLanes, fma(load(to + kLanes), set(keep[r]), b));
    };
    const auto rows_of = [&](int word, const char** from) {
      for (int k = 0; k < 4; ++k) from[k] = e.v[4 * word + k];
      ask();
    };
    if (rows < kTiledRows) {
      for (int t = 0; t < d_v / kCodeStep; ++t) {
        const int g = t * kCodeStep / group;
        if (t * kCodeStep % group == 0) weights(g);
        over_blocks(rows, [&]<int R>(int r0) {
          F sums[R][2];
          turned_products<Bits, R>(w + g % 2 * (16 * kPage), r0, t * kCodeStep * Bits / 8, rows_of, sums);
          for (int r = 0; r < R; ++r) finish(t, r0 + r, sums[r][0], sums[r][1]);
        });
      }
      return;
    }
    uint8_t* const v = v_;
    int32_t* const o = o_;
    in_turns(
        d_v / kCodeStep,
        [&](int t) {
          if (t * kCodeStep % group == 0) weights(t * kCodeStep / group);
          uint8_t* to = v + t % 2 * (32 * kPage);
          for (int i = 0; i < 16; ++i, to += 64) {
            const char* four[4];
            rows_of(word_at(i), four);
            __m512i even, odd;
            turn_codes<Bits>(four, t * kCodeStep * Bits / 8, even, odd);
            _mm512_store_si512(to, even), _mm512_store_si512(to + 1024, odd);
          }
        },
        [&](int t) {
          value_products(w + t * kCodeStep / group % 2 * (16 * kPage), v + t % 2 * (32 * kPage), rows, o + t % 2 * 512);
        },
        [&](int t) {
          const int32_t* from = o + t % 2 * 512;
          for (int r = 0; r < rows; ++r) {
            const auto whole = [&](const int32_t* x) {
              return fma(load(x + r * 16), set(256), load(x + (kCodeRows + r) * 16));
            };
            finish(t, r, whole(from), whole(from + 256));
          }
        });
  }

  const CodeRegisters registers_;
};

#endif

}  // namespace heed::HEED_ISA
