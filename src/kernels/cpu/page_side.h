// The keys or the values of one page: rows in and out as f32, whatever the page keeps.
#pragma once
#include "kernels/cpu/simd.h"
#include "kernels/pages.h"

namespace heed::HEED_ISA {

struct PageSide {
  char* data;
  const PageType* type;
  int width;
  bool transposed;

  static PageSide keys(const PageLayout& layout, char* page) {
    return {page + layout.k_at, &layout.k, layout.d, false};
  }
  static PageSide values(const PageLayout& layout, char* page) {
    return {page + layout.v_at, &layout.v, layout.d_v, layout.v_transposed};
  }
  /// Where an entry's numbers lie side by side, else null.
  char* row(int entry) const {
    if (transposed || type->quantised() || type->pair) return nullptr;
    return data + int64_t(entry) * width * (type->bits() / 8);
  }
  int64_t place(int entry, int channel) const {
    if (entry >= kPage) return int64_t(entry) * width + channel;  // a spare row
    return transposed ? int64_t(channel) * kPage + entry : int64_t(entry) * width + channel;
  }
  f16* scales() const { return reinterpret_cast<f16*>(data + kPage * type->row_bits(width) / 8); }
  f16* zeros() const { return scales() + type->groups(width); }  // where they are kept
  uint8_t* places() const { return reinterpret_cast<uint8_t*>(scales() + type->halves() * type->groups(width)); }
  /// What codes times their scale begin from (Range, Signed).
  float zero(int64_t group) const {
    return type->zeros() ? float(zeros()[group]) : type->point(0) * float(scales()[group]);
  }
  /// Of the scale and zero of one number.
  int64_t group(int entry, int channel) const {
    if (type->axis == PageType::Axis::Channel) return int64_t(entry / type->group) * width + channel;
    return int64_t(entry) * ((width + type->group - 1) / type->group) + channel / type->group;
  }
};

/// One entry as f32; `out` is where it was put, or the page itself when that holds f32 rows.
const float* read_entry(const PageSide& side, int entry, float* out);

/// The codes of one entry of a quantised side, one a byte.
void read_codes(const PageSide& side, int entry, uint8_t* codes);
void write_codes(const PageSide& side, int entry, const uint8_t* codes);

/// Entries begin … begin + count from rows [count][step]. With groups of entries, begin starts a group.
void write_entries(const PageSide& side, int begin, int count, const float* rows, int64_t step);

}  // namespace heed::HEED_ISA
