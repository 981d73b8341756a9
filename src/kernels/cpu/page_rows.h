// Rows of a page as pairs of f32 vectors, whatever the page keeps: how decode reads entries.
//
// RowOf<kind, axis> has
//   bits         of a number
//   interleaved  the pair is the even and the odd channels of 2 · kLanes; else the first and the second half
//   load(row, channel, scale, low, a, b)   the pair that begins at `channel`; scale and low: of that pair, in its order
#pragma once
#include "kernels/cpu/simd.h"
#include "kernels/pages.h"

namespace heed::HEED_ISA {

inline constexpr int kPair = 2 * kLanes;

template <PageType::Kind kind, PageType::Axis axis>
struct RowOf {
  using Kind = PageType::Kind;
  static constexpr bool quantised = kind >= Kind::Q8, by_channel = quantised && axis == PageType::Axis::Channel;
  static constexpr int bits = kind == Kind::F32   ? 32
                              : kind <= Kind::F16 ? 16
                              : kind == Kind::Q8  ? 8
                              : kind == Kind::Q4  ? 4
                                                  : 2;
  static constexpr bool interleaved = kind == Kind::BF16 || kind == Kind::Q4 || kind == Kind::Q2;

  HEED_INLINE static void load(const char* row, int64_t channel, const float* scale, const float* low, F& a, F& b) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(row);
    if constexpr (kind == Kind::F32) {
      const auto* x = reinterpret_cast<const float*>(row) + channel;
      a = heed::HEED_ISA::load(x), b = heed::HEED_ISA::load(x + kLanes);
    } else if constexpr (kind == Kind::F16) {
      const auto* x = reinterpret_cast<const f16*>(row) + channel;
      a = heed::HEED_ISA::load(x), b = heed::HEED_ISA::load(x + kLanes);
    } else if constexpr (kind == Kind::BF16) {
      load_even_odd(reinterpret_cast<const bf16*>(row) + channel, a, b);
    } else if constexpr (kind == Kind::Q8) {
      a = heed::HEED_ISA::load(bytes + channel), b = heed::HEED_ISA::load(bytes + channel + kLanes);
    } else if constexpr (kind == Kind::Q4) {
      load_nibbles(bytes + channel / 2, a, b);
    } else {
      load_quarters(bytes + channel / 4, a, b);
    }
    if constexpr (by_channel) {
      a = fma(a, heed::HEED_ISA::load(scale), heed::HEED_ISA::load(low));
      b = fma(b, heed::HEED_ISA::load(scale + kLanes), heed::HEED_ISA::load(low + kLanes));
    } else if constexpr (quantised) {
      a = fma(a, set(*scale), set(*low)), b = fma(b, set(*scale), set(*low));
    }
  }
};

/// Calls f.template operator()<RowOf<…>>() for a page's type.
template <class Fn>
void with_rows(const PageType& type, Fn&& f) {
  using Kind = PageType::Kind;
  using Axis = PageType::Axis;
  const bool by_channel = type.axis == Axis::Channel;
  switch (type.kind) {
    case Kind::F32: return f.template operator()<RowOf<Kind::F32, Axis::Token>>();
    case Kind::BF16: return f.template operator()<RowOf<Kind::BF16, Axis::Token>>();
    case Kind::F16: return f.template operator()<RowOf<Kind::F16, Axis::Token>>();
    case Kind::Q8:
      return by_channel ? f.template operator()<RowOf<Kind::Q8, Axis::Channel>>()
                        : f.template operator()<RowOf<Kind::Q8, Axis::Token>>();
    case Kind::Q4:
      return by_channel ? f.template operator()<RowOf<Kind::Q4, Axis::Channel>>()
                        : f.template operator()<RowOf<Kind::Q4, Axis::Token>>();
    case Kind::Q2:
      return by_channel ? f.template operator()<RowOf<Kind::Q2, Axis::Channel>>()
                        : f.template operator()<RowOf<Kind::Q2, Axis::Token>>();
    case Kind::Q3:
    case Kind::Q1: return;  // no rows of numbers
  }
}

}  // namespace heed::HEED_ISA
