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
    take(q_, (widest + kCodeStep) / 2 * kCodeRows), take(columns_, 2 * (widest + kCodeStep));
    take(step_sums_, (steps + 4) * kCodeRows), take(q_sums_, steps * kCodeRows), take(turned_, kCodeRows * widest);
    take(open_, 32 * (widest + 16)), take(halves_, kPage * steps), take(numbers_, kPage * steps);
    take(scale_, kPage * steps), take(low_, kPage * steps);
    take(w_, steps * 16 * kPage), take(v_, 32 * kPage);
    take(v_units_, steps * kCodeRows), take(v_lows_, steps * kCodeRows);
  }

  int64_t bytes = 0;

 protected:
  uint32_t* q_ = nullptr;      // Q of each block of rows
  int8_t* columns_ = nullptr;  // high and low bytes of a row
  float *step_sums_ = nullptr, *q_sums_ = nullptr, *turned_ = nullptr;
  uint8_t *open_ = nullptr, *v_ = nullptr;  // words of keys; V
  f16* halves_ = nullptr;
  float* numbers_ = nullptr;                      // of halves
  float *scale_ = nullptr, *low_ = nullptr;       // [groups][64]
  int8_t* w_ = nullptr;                           // W of each group
  float *v_units_ = nullptr, *v_lows_ = nullptr;  // [groups][8]: what W's sums are worth, and what is added
};

class CodeReader : CodeRoom, public CodeRows<CodeReader, kCodeStep> {
 public:
  static int64_t bytes(int d, int d_v) { return CodeRoom(nullptr, d, d_v).bytes; }
  CodeReader(char* memory, int d, int d_v) : CodeRoom(memory, d, d_v), CodeRows(d, d_v) {}

 private:
  friend class CodeRows<CodeReader, kCodeStep>;

  static constexpr int kBlock = 4;  // rows whose sums fit the registers beside codes

  /// Calls f.template operator()<R>(first row) for blocks of up to four rows.
  template <class Fn>
  HEED_INLINE static void over_blocks(int rows, Fn&& f) {
    int r = 0;
    for (; r + kBlock <= rows; r += kBlock) f.template operator()<kBlock>(r);
    if (rows - r == 3) f.template operator()<3>(r);
    else if (rows - r == 2) f.template operator()<2>(r);
    else if (rows - r == 1) f.template operator()<1>(r);
  }
  uint32_t* q_of(int first_row) const { return q_ + first_row * ((d_ + 63) / 64 * 32); }

  /// x [rows][d] as Q of each block, units, and sums of each step's numbers.
  template <int Bits>
  void split(const float* x) {
    const int steps = d_ / kCodeStep, apart_steps = (steps + 3) / 4 * 4;
    for (int r = 0; r < rows_; ++r) {
      int8_t *high = columns_, *low = columns_ + d_ + kCodeStep;
      const float* row = x + int64_t(r) * d_;
      F top = zero();
      for (int c = 0; c < d_; c += kLanes) top = max(top, abs(load(row + c)));
      const float most = hmax(top);
      const F by = set(most > 0 ? kMostWhole / most : 0);
      for (int t = 0; t < steps; t += 4) {
        F sums[4] = {zero(), zero(), zero(), zero()};
        for (int i = 0; i < std::min(4, steps - t); ++i) {
          const int c = (t + i) * kCodeStep;
          const F a = round(load(row + c) * by), b = round(load(row + c + kLanes) * by);
          split_whole(a, b, high + c, low + c);
          sums[i] = a + b;
        }
        _mm_store_ps(step_sums_ + r * apart_steps + t, sum_rows(sums));
      }
      unit_[r] = most * (1.0f / kMostWhole);
      const int first = r / kBlock * kBlock, apart = 32 * std::min(kBlock, rows_ - first);
      uint32_t* to = q_of(first) + (r - first) * 32;
      for (int c = 0; c < d_; c += 64, to += apart)
        _mm512_store_si512(to, mixed<Bits>(high + c)), _mm512_store_si512(to + 16, mixed<Bits>(low + c));
    }
  }

  /// Asks for one side of `next`, line after line, spread over so many calls: in the order of memory, which the machine's
  /// own prefetcher follows, and never many at once, which would fill the buffers that loads need.
  class Ask {
   public:
    Ask(const Entries* next, bool keys, int calls) : next_(next), keys_(keys) {
      if (!next) return;
      const PageSide from = side(0);
      const int64_t all = from.type->bytes(from.width), row = from.type->row_bits(from.width) / 8;
      const bool whole = next->parts == 1 && next->count == kPage;  // with its scales
      lines_ = int(((whole ? all / 64 : next->count * row / 64 + next->parts) + calls - 1) / calls);
      if (whole) at_ = from.data;
      else left_ = next->parts, scattered_ = true;
    }
    /// As many lines in every call, or the processor foresees none of these loops.
    HEED_INLINE void operator()() {
      if (scattered_) return ask_parts();
      for (int i = 0; i < lines_; ++i, at_ += 64) __builtin_prefetch(at_, 0, 2);  // goes a little past the end
    }

   private:
    PageSide side(int part) const {
      char* page = next_->part[part].page;
      return keys_ ? PageSide::keys(*next_->layout, page) : PageSide::values(*next_->layout, page);
    }
    __attribute__((noinline)) void ask_parts() {
      for (int i = 0; i < lines_; ++i, at_ += 64) {
        if (at_ >= end_) {
          if (left_ == 0) return;
          const int number = next_->parts - left_--;
          const Entries::Part& part = next_->part[number];
          const PageSide from = side(number);
          const int64_t row = from.type->row_bits(from.width) / 8;
          at_ = from.data + part.first * row, end_ = at_ + part.count * row;
        }
        __builtin_prefetch(at_, 0, 2);
      }
    }

    const Entries* next_;
    bool keys_, scattered_ = false;
    int left_ = 0, lines_ = 0;  // parts not begun; lines of a call
    const char *at_ = nullptr, *end_ = nullptr;
  };

  /// Scores [rows][kScoreRow] of `N` · 16 entries from j on, whose words are turned: finish(r, group, j, sums, scores) adds
  /// what the sums of a group are worth, `per_group` words of Q (the last may have fewer).
  template <int Bits, int N, class Finish>
  HEED_INLINE void scores_of(Ask& ask, int j, int per_group, float* scores, Finish finish) const {
    const int words = d_ / 4;
    const uint8_t* const open = open_;
    over_blocks(rows_, [&]<int R>(int r0) {
      const uint32_t* q = q_of(r0);
      float* const to = scores + r0 * kScoreRow + j;
      for (int t = 0, g = 0; t < words; t += per_group, ++g) {
        ask();
        const auto each = [&](int r, int n, F sums)
                              HEED_LAMBDA { finish(r0 + r, g, j + 16 * n, sums, to + r * kScoreRow + 16 * n); };
        key_products<Bits, R, N>(open + t * (Bits * 8 * N), q, t, std::min(t + per_group, words), each);
      }
    });
  }
  /// The same of entries first … first + count.
  template <int Bits, class Finish>
  HEED_INLINE void over_keys(const Entries& e, Ask& ask, int first, int count, int per_group, float* scores,
                             const Finish& finish) {
    const int words = d_ * Bits / 32;
    for (int j = first, left = count; left > 0; j += 32, left -= 32) {
      const int n = left > 16 ? 2 : 1;
      for (int i = 0; i < n; ++i)
        for (int w = 0; w < words; w += 4) {
          turn_rows(e.k + j + 16 * i, w * 4, open_ + (w * n + i) * 64, 64 * n);
          ask();
        }
      if (n == 2) scores_of<Bits, 2>(ask, j, per_group, scores, finish);
      else scores_of<Bits, 1>(ask, j, per_group, scores, finish);
    }
  }
  int blocks() const { return (rows_ + kBlock - 1) / kBlock; }
  /// Calls of `ask` that over_keys makes for a whole page.
  template <int Bits>
  int asks(int groups) const {
    return kPage / 16 * ((d_ * Bits / 32 + 3) / 4) + kPage / 32 * groups * blocks();
  }

  template <int Bits>
  void scores_by_entry(const Entries& e, const Entries* next, float* scores) {
    const PageType& type = e.layout->k;
    const int group = std::min(type.group, d_), groups = (d_ + group - 1) / group, steps = d_ / kCodeStep;
    const bool zeros = type.zeros();
    if (packed_ != &type) {
      split<Bits>(query_);
      for (int r = 0; r < rows_; ++r)
        for (int g = 0; g < groups; ++g) {
          float sum = 0;
          for (int t = g * group / kCodeStep; t < std::min(steps, (g + 1) * group / kCodeStep); ++t)
            sum += step_sums_[r * ((steps + 3) / 4 * 4) + t];
          q_sums_[g * kCodeRows + r] = zeros ? sum : sum * -float(1 << (Bits - 1));
        }
      packed_ = &type;
    }
    turn_halves(e, PageSide::keys, false, groups, scale_);
    if (zeros) turn_halves(e, PageSide::keys, true, groups, low_);
    Ask ask(next, true, asks<Bits>(groups));
    const float *scale = scale_, *low = zeros ? low_ : scale_, *q_sums = q_sums_;
    over_keys<Bits>(e, ask, 0, e.count, group / 4, scores, [=](int r, int g, int j, F sums, float* to) {
      const F so_far = g == 0 ? zero() : load(to);
      store(to, fma(sums, load(scale + g * kPage + j),
                    fma(load(low + g * kPage + j), set(q_sums[g * kCodeRows + r]), so_far)));
    });
    for (int r = 0; r < rows_; ++r)
      for (int j = 0; j < e.count; j += kLanes)
        store(scores + r * kScoreRow + j, load(scores + r * kScoreRow + j) * set(unit_[r]));
  }

  template <int Bits>
  bool scores_by_channel(const Entries& e, const Entries* next, float* scores) {
    Ask ask(next, true, asks<Bits>(1));
    return over_runs(e, scale_, low_, turned_, [&](int first, int count, const float* base) {
      packed_ = nullptr;
      split<Bits>(turned_);
      over_keys<Bits>(e, ask, first, count, d_ / 4, scores, [base, unit = unit_](int r, int, int, F sums, float* to) {
        store(to, fma(sums, set(unit[r]), set(base[r])));
      });
    });
  }

  /// Scales, or zeros, of a side: to [groups][64], zeros behind the last entry.
  void turn_halves(const Entries& e, PageSide (*side_of)(const PageLayout&, char*), bool zeros, int groups, float* to) {
    const auto from = [&](const Entries::Part& part) {
      const PageSide side = side_of(*e.layout, part.page);
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
      default: {
        convert_row(all, kPage * groups, numbers_);
        const __m512i places = _mm512_mullo_epi32(
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(groups));
        for (int g = 0; g < groups; ++g)
          for (int j = 0; j < kPage; j += kLanes)
            store(to + g * kPage + j, _mm512_i32gather_ps(places, numbers_ + j * groups + g, 4));
      }
    }
  }

  template <int Bits>
  void add_values(const Entries& e, const Entries* next, const float* p, const float* keep, const float* worth, float* out) {
    const PageType& type = e.layout->v;
    const int d_v = d_v_, group = std::min(type.group, d_v), groups = (d_v + group - 1) / group, rows = rows_;
    const float half = float(1 << (Bits - 1));
    const bool zeros = type.zeros();
    turn_halves(e, PageSide::values, false, groups, scale_);
    if (zeros) turn_halves(e, PageSide::values, true, groups, low_);
    Ask ask(next, false, d_v / kCodeStep * (4 + blocks()));
    float *const units = v_units_, *const lows = v_lows_;
    const auto weights = [&]<bool Zeros>(int g) {
      const float *scale = scale_ + g * kPage, *from = low_ + g * kPage;
      int8_t* const w = w_ + g * (16 * kPage);
      F s[4], top = zero();
      for (int i = 0; i < 4; ++i) s[i] = load(scale + i * kLanes), top = max(top, abs(s[i]));
      const float most = hmax(top), one = most * (1.0f / kMostWhole);
      const F by = set(most > 0 ? kMostWhole / most : 0);
      for (F& x : s) x = x * by;
      F sums[kDecodeRows];
      for (int r = 0; r < rows; ++r) {
        F weight[4];
        __m512i whole[4];
        for (int i = 0; i < 4; ++i) {
          weight[i] = load(p + r * kScoreRow + i * kLanes);
          whole[i] = _mm512_cvtps_epi32(weight[i] * s[i]);
        }
        split_weights(whole, w + r * kPage, w + (kCodeRows + r) * kPage);
        if constexpr (Zeros) {
          F m[4];
          for (int i = 0; i < 4; ++i) m[i] = load(from + i * kLanes);
          sums[r] = fma(weight[0], m[0], weight[1] * m[1]) + fma(weight[2], m[2], weight[3] * m[3]);
        } else {
          sums[r] = _mm512_cvtepi32_ps(
              _mm512_add_epi32(_mm512_add_epi32(whole[0], whole[1]), _mm512_add_epi32(whole[2], whole[3])));
        }
      }
      for (int r = rows; r % 4 != 0; ++r) sums[r] = zero();
      for (int r = 0; r < rows; r += 4) {
        const __m128 of = _mm_loadu_ps(worth + r), its = _mm_mul_ps(of, _mm_set1_ps(one));
        _mm_store_ps(units + g * kDecodeRows + r, its);
        _mm_store_ps(lows + g * kDecodeRows + r,
                     _mm_mul_ps(sum_rows(sums + r), Zeros ? of : _mm_mul_ps(its, _mm_set1_ps(-half))));
      }
    };
    for (int g = 0; g < groups; ++g) {
      if (zeros) weights.template operator()<true>(g);
      else weights.template operator()<false>(g);
    }
    const auto finish = [&](int t, int r, F a, F b) {
      const int at = t * kCodeStep / group * kDecodeRows + r;
      a = fma(a, set(units[at]), set(lows[at])), b = fma(b, set(units[at]), set(lows[at]));
      if constexpr (Bits != 8) interleave(a, b, a, b);
      float* to = out + int64_t(r) * d_v + t * kCodeStep;
      store(to, fma(load(to), set(keep[r]), a));
      store(to + kLanes, fma(load(to + kLanes), set(keep[r]), b));
    };
    for (int t = 0; t < d_v / kCodeStep; ++t) {
      const int64_t at = t * kCodeStep * Bits / 8;
      unrolled<16>([&](auto i) HEED_LAMBDA {
        __m512i even, odd;
        turn_codes<Bits>(e.v + 4 * word_at(i), at, even, odd);
        _mm512_store_si512(v_ + i * 128, even), _mm512_store_si512(v_ + i * 128 + 64, odd);
        if constexpr (i % 4 == 0) ask();
      });
      over_blocks(rows, [&]<int R>(int r0) {
        ask();
        value_products<R>(w_ + t * kCodeStep / group * (16 * kPage) + r0 * kPage, v_,
                          [&](int r, F a, F b) HEED_LAMBDA { finish(t, r0 + r, a, b); });
      });
    }
  }
};

#endif

}  // namespace heed::HEED_ISA
