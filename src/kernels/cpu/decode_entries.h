// What one step of decode reads: up to 64 entries of a KV head, wherever their pages lie.
#pragma once
#include <algorithm>

#include "kernels/cpu/convert.h"
#include "kernels/cpu/page_rows.h"
#include "kernels/cpu/page_side.h"

namespace heed::HEED_ISA {

inline constexpr int kDecodeRows = 8;  // query rows that share a KV head
/// From a row of scores to the next: what works on 16 entries at a time may reach past the last.
inline constexpr int kScoreRow = kPage + 16;

/// Up to 64 entries of one layout that are met together.
struct Entries {
  /// Neighbours in a page, from entry `at` of these on.
  struct Part {
    char* page;
    int first, at, count;
  };
  int count = 0, parts = 0;
  Part part[kPage];
  const PageLayout* layout = nullptr;
  float position_low = 0;
  const char *k[kPage + 16], *v[kPage];                                        // behind the last: that one again
  const float *k_scale[kPage], *k_low[kPage], *v_scale[kPage], *v_low[kPage];  // of quantised sides read as rows of f32
  alignas(64) int32_t key[kPage];
  alignas(64) int32_t position[kPage];  // with a window
  alignas(64) float bias[kPage];        // with a bias
};

/// f.template operator()<bits of a code>().
template <class Fn>
bool with_code_bits(const PageType& type, Fn&& f) {
  switch (type.kind) {
    case PageType::Kind::Q8: return f.template operator()<8>();
    case PageType::Kind::Q4: return f.template operator()<4>();
    default: return f.template operator()<2>();
  }
}

/// The query rows of a piece, and what they meet where codes are multiplied as they are, `Step` channels at a time. A Reader has
/// scores_by_entry<bits>, scores_by_channel<bits> and add_values<bits>, and bytes(d, d_v) of a worker's memory.
template <class Reader, int Step>
class CodeRows {
 public:
  static bool reads_keys(const PageType& type, int d) {
    return reads(type, d) && (type.axis == PageType::Axis::Token || type.group >= 16);
  }
  static bool reads_values(const PageType& type, int d_v) {
    return reads(type, d_v) && type.axis == PageType::Axis::Token;
  }

  /// The query rows of a piece, [rows][d].
  void open(const float* q, int rows) { query_ = q, rows_ = rows, packed_ = nullptr; }

  /// scores [rows][kScoreRow] of a batch's entries; false where a few entries share their scales, so that it would not pay.
  bool scores(const Entries& e, const Entries* next, float* scores) {
    return with_code_bits(e.layout->k, [&]<int Bits>() {
      if (e.layout->k.axis == PageType::Axis::Channel) return self().template scores_by_channel<Bits>(e, next, scores);
      self().template scores_by_entry<Bits>(e, next, scores);
      return true;
    });
  }

  /// out [rows][d_v] = out · keep + worth · Σ p · values, for p [rows][kScoreRow] of at most 1, zeros behind the entries.
  void values(const Entries& e, const Entries* next, const float* p, const float* keep, const float* worth, float* out) {
    with_code_bits(e.layout->v, [&]<int Bits>() {
      self().template add_values<Bits>(e, next, p, keep, worth, out);
      return true;
    });
  }

 protected:
  /// Keys by channel: for each run of entries that share scales, whose room is scale and low [d], the query rows times these
  /// (scaled [rows][d]) and visit(first entry, count, base), base [16] being rows · low, zeros behind. False, nothing visited,
  /// where runs are short.
  template <class Visit>
  bool over_runs(const Entries& e, float* scale, float* low, float* scaled, Visit&& visit) const {
    const int group = e.layout->k.group, d = d_;
    int runs = 0;
    for (int i = 0; i < e.parts; ++i)
      runs += (e.part[i].first + e.part[i].count - 1) / group - e.part[i].first / group + 1;
    if (runs * 8 > e.count) return false;
    for (int i = 0; i < e.parts; ++i) {
      const Entries::Part& part = e.part[i];
      const PageSide side = PageSide::keys(*e.layout, part.page);
      for (int from = part.first, last = part.first + part.count; from < last;) {
        const int run = from / group, until = std::min(last, (run + 1) * group);
        alignas(64) float base[2 * kDecodeRows] = {};
        convert_row(side.scales() + run * d, d, scale), convert_row(side.zeros() + run * d, d, low);
        for (int r = 0; r < rows_; ++r) {
          const float* q = query_ + int64_t(r) * d;
          float* to = scaled + int64_t(r) * d;
          F sum = zero();
          for (int c = 0; c < d; c += kLanes) {
            store(to + c, load(q + c) * load(scale + c));
            sum = fma(load(q + c), load(low + c), sum);
          }
          base[r] = hsum(sum);
        }
        visit(part.at + from - part.first, until - from, base);
        from = until;
      }
    }
    return true;
  }

  const int d_, d_v_;
  int rows_ = 0;
  const float* query_ = nullptr;
  const PageType* packed_ = nullptr;  // for which the query rows are rounded
  float unit_[kDecodeRows];           // of a rounded row

 private:
  friend Reader;
  CodeRows(int d, int d_v) : d_(d), d_v_(d_v) {}

  static bool reads(const PageType& type, int width) {
    using Codes = PageType::Codes;
    return type.quantised() && (type.codes == Codes::Range || type.codes == Codes::Signed) && width % Step == 0 &&
           (type.axis == PageType::Axis::Channel || type.group % Step == 0);
  }
  Reader& self() { return static_cast<Reader&>(*this); }
};

/// Scales and lows of quantised entries as f32: a row for each entry, or for each run of entries that share one.
struct ScaleRows {
  float* memory;
  int64_t used = 0;
  const char* last = nullptr;  // the page and run that the last row is of
  int last_run = -1;

  static int64_t width(const PageType& type, int d) {
    if (!type.quantised()) return 0;
    return type.axis == PageType::Axis::Channel ? d : (d + type.group - 1) / type.group;
  }
  /// Floats for 64 entries.
  static int64_t floats(const PageType& type, int d) { return 2 * kPage * ((width(type, d) + 15) / 16 * 16); }

  void clear() { used = 0, last = nullptr; }

  /// Entries first … first + count of a side; pointers for each go to scale and low.
  void add(const PageSide& side, int first, int count, const float** scale, const float** low) {
    const int64_t n = width(*side.type, side.width);
    if (side.type->axis == PageType::Axis::Token) {
      float *s = memory + used, *l = s + count * n;
      convert_row(side.scales() + first * n, count * n, s);
      if (side.type->zeros()) convert_row(side.zeros() + first * n, count * n, l);
      else
        for (int64_t i = 0; i < count * n; ++i) l[i] = side.type->point(0) * s[i];
      used += 2 * count * n;
      for (int i = 0; i < count; ++i) scale[i] = s + i * n, low[i] = l + i * n;
      return;
    }
    for (int i = 0; i < count; ++i) {
      const int run = (first + i) / side.type->group;
      if (side.data != last || run != last_run) {
        order(side, side.scales() + run * n, memory + used);
        order(side, side.zeros() + run * n, memory + used + n);
        used += 2 * n, last = side.data, last_run = run;
      }
      scale[i] = memory + used - 2 * n, low[i] = memory + used - n;
    }
  }

  /// Channels in the order in which the codes of a pair are read.
  static void order(const PageSide& side, const f16* from, float* to) {
    if (side.type->kind == PageType::Kind::Q8) return convert_row(from, side.width, to);
    for (int c = 0; c < side.width; c += kPair)
      for (int i = 0; i < kLanes; ++i) {
        to[c + i] = float(from[c + 2 * i]);
        to[c + kLanes + i] = float(from[c + 2 * i + 1]);
      }
  }
};

}  // namespace heed::HEED_ISA
