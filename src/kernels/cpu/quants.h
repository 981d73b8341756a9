// How each quantised format gives its codes and scales. A weight is scale · code + low, one scale (and low) for a group
// of 16 or 32; every format but Q8_0 and IQ4_NL has codes of 0 … 127. The blocks themselves are described in quant.h.
//
// Quant<type> has
//   Block            the block as the file holds it
//   group            weights that share a scale
//   is_signed        codes are signed bytes
//   top              the largest code, or its largest absolute value
//   offset           low = −offset · scale, unless
//   has_low          scales() writes it
//   codes<i>(block)  codes 32 i … 32 i + 31 of the block, or of a column of blocks
//   scales(block, scale, low)  one number each, or of a column one vector, for every group of the block
#pragma once
#include "kernels/cpu/interleaved.h"

namespace heed::HEED_ISA {

template <Dtype D> struct Quant;

struct QuantOf32 {
  static constexpr int group = 32, offset = 0, top = 15;
  static constexpr bool is_signed = false, has_low = false;
};

template <>
struct Quant<Dtype::Q4_0> : QuantOf32 {
  using Block = BlockQ4_0;
  static constexpr int offset = 8;
  template <int, class B> HEED_INLINE static auto codes(const B& b) { return load_halves(b.qs); }
  HEED_INLINE static void scales(const Block& b, float* scale, float*) { *scale = float(b.d); }
  HEED_INLINE static void scales(const Sixteen<Dtype::Q4_0>& b, F* scale, F*) { *scale = b.number(0); }
};

template <>
struct Quant<Dtype::Q4_1> : QuantOf32 {
  using Block = BlockQ4_1;
  static constexpr bool has_low = true;
  template <int, class B> HEED_INLINE static auto codes(const B& b) { return load_halves(b.qs); }
  HEED_INLINE static void scales(const Block& b, float* scale, float* low) {
    *scale = float(b.d);
    *low = float(b.m);
  }
  HEED_INLINE static void scales(const Sixteen<Dtype::Q4_1>& b, F* scale, F* low) {
    *scale = b.number(0);
    *low = b.number(1);
  }
};

HEED_INLINE uint32_t load_bits(const uint8_t p[4]) {
  uint32_t bits;
  std::memcpy(&bits, p, 4);
  return bits;
}

template <>
struct Quant<Dtype::Q5_0> : QuantOf32 {
  using Block = BlockQ5_0;
  static constexpr int offset = 16, top = 31;
  template <int, class B> HEED_INLINE static auto codes(const B& b) {
    return add_fifth(load_halves(b.qs), load_bits(b.qh));
  }
  HEED_INLINE static void scales(const Block& b, float* scale, float*) { *scale = float(b.d); }
  HEED_INLINE static void scales(const Sixteen<Dtype::Q5_0>& b, F* scale, F*) { *scale = b.number(0); }
};

template <>
struct Quant<Dtype::Q5_1> : QuantOf32 {
  using Block = BlockQ5_1;
  static constexpr int top = 31;
  static constexpr bool has_low = true;
  template <int, class B> HEED_INLINE static auto codes(const B& b) {
    return add_fifth(load_halves(b.qs), load_bits(b.qh));
  }
  HEED_INLINE static void scales(const Block& b, float* scale, float* low) {
    *scale = float(b.d);
    *low = float(b.m);
  }
  HEED_INLINE static void scales(const Sixteen<Dtype::Q5_1>& b, F* scale, F* low) {
    *scale = b.number(0);
    *low = b.number(1);
  }
};

template <>
struct Quant<Dtype::Q8_0> : QuantOf32 {
  using Block = BlockQ8_0;
  static constexpr int top = 128;
  static constexpr bool is_signed = true;
  template <int, class B> HEED_INLINE static auto codes(const B& b) { return load_codes(b.qs); }
  HEED_INLINE static void scales(const Block& b, float* scale, float*) { *scale = float(b.d); }
  HEED_INLINE static void scales(const Sixteen<Dtype::Q8_0>& b, F* scale, F*) { *scale = b.number(0); }
};

template <>
struct Quant<Dtype::IQ4_NL> : QuantOf32 {
  using Block = BlockIQ4_NL;
  static constexpr int top = 128;
  static constexpr bool is_signed = true;
  template <int, class B> HEED_INLINE static auto codes(const B& b) {
    return look_up(iq4_nl_values, load_halves(b.qs));
  }
  HEED_INLINE static void scales(const Block& b, float* scale, float*) { *scale = float(b.d); }
  HEED_INLINE static void scales(const Sixteen<Dtype::IQ4_NL>& b, F* scale, F*) { *scale = b.number(0); }
};

template <>
struct Quant<Dtype::Q2_K> {
  using Block = BlockQ2_K;
  static constexpr int group = 16, offset = 0, top = 3;
  static constexpr bool is_signed = false, has_low = true;
  template <int i, class B> HEED_INLINE static auto codes(const B& b) {
    return field<2 * (i % 4)>(load_codes(b.qs + 32 * (i / 4)), 3);
  }
  HEED_INLINE static void scales(const Block& b, float* scale, float* low) {
    for (int half = 0; half < 2; ++half) {
      uint64_t s;
      std::memcpy(&s, b.scales + 8 * half, 8);
      scale_bytes(s & 0x0f0f0f0f0f0f0f0f, float(b.d), scale + 8 * half);
      scale_bytes(s >> 4 & 0x0f0f0f0f0f0f0f0f, -float(b.dmin), low + 8 * half);
    }
  }
  HEED_INLINE static void scales(const Sixteen<Dtype::Q2_K>& b, F* scale, F* low) {
    const F d = b.number(0), dmin = zero() - b.number(1);
    for (int run = 0; run < 16; ++run) {
      const Word w = b.scales.word(run / 4);
      scale[run] = d * byte_of(each_byte(w, 15), run % 4);
      low[run] = dmin * byte_of(each_byte(w >> 4, 15), run % 4);
    }
  }
};

template <>
struct Quant<Dtype::Q3_K> {
  using Block = BlockQ3_K;
  static constexpr int group = 16, offset = 4, top = 7;
  static constexpr bool is_signed = false, has_low = false;
  template <int i, class B> HEED_INLINE static auto codes(const B& b) {
    return join<2>(field<2 * (i % 4)>(load_codes(b.qs + 32 * (i / 4)), 3), field<i>(load_codes(b.hmask), 1));
  }
  HEED_INLINE static void scales(const Block& b, float* scale, float*) {
    for (int run = 0; run < 16; ++run) scale[run] = float(b.d) * float(scale_q3(b.scales, run));
  }
  HEED_INLINE static void scales(const Sixteen<Dtype::Q3_K>& b, F* scale, F*) {
    for (int run = 0; run < 16; ++run) {  // as scale_q3
      const Word low = each_byte(b.scales.word(run % 8 / 4) >> run / 8 * 4, 15),
                 high = each_byte(b.scales.word(2) >> run / 4 * 2, 3) << 4;
      scale[run] = b.number(0) * (byte_of(low | high, run % 4) - set(32));
    }
  }
};

/// The eight 6-bit scales and mins of a Q4_K or Q5_K block, all at once (scale_min gives them one by one).
HEED_INLINE void scales_and_mins(const uint8_t packed[12], float d, float dmin, float* scale, float* low) {
  const uint32_t a = load_bits(packed), b = load_bits(packed + 4), c = load_bits(packed + 8);
  const uint64_t s = (uint64_t((c & 0x0f0f0f0f) | (a >> 6 & 0x03030303) << 4) << 32) | (a & 0x3f3f3f3f);
  const uint64_t m = (uint64_t((c >> 4 & 0x0f0f0f0f) | (b >> 6 & 0x03030303) << 4) << 32) | (b & 0x3f3f3f3f);
  scale_bytes(s, d, scale);
  scale_bytes(m, -dmin, low);
}

template <Dtype D>
HEED_INLINE void scales_and_mins(const Sixteen<D>& column, F* scale, F* low) {
  const Word a = column.scales.word(0), b = column.scales.word(1), c = column.scales.word(2);
  const Word s[2] = {each_byte(a, 63), each_byte(c, 15) | each_byte(a >> 6, 3) << 4},
             m[2] = {each_byte(b, 63), each_byte(c >> 4, 15) | each_byte(b >> 6, 3) << 4};
  const F d = column.number(0), dmin = zero() - column.number(1);
  for (int run = 0; run < 8; ++run) {
    scale[run] = d * byte_of(s[run / 4], run % 4);
    low[run] = dmin * byte_of(m[run / 4], run % 4);
  }
}

template <>
struct Quant<Dtype::Q4_K> : QuantOf32 {
  using Block = BlockQ4_K;
  static constexpr bool has_low = true;
  template <int i, class B> HEED_INLINE static auto codes(const B& b) {
    return field<4 * (i % 2)>(load_codes(b.qs + 32 * (i / 2)), 15);
  }
  HEED_INLINE static void scales(const Block& b, float* scale, float* low) {
    scales_and_mins(b.scales, float(b.d), float(b.dmin), scale, low);
  }
  HEED_INLINE static void scales(const Sixteen<Dtype::Q4_K>& b, F* scale, F* low) { scales_and_mins(b, scale, low); }
};

template <>
struct Quant<Dtype::Q5_K> : QuantOf32 {
  using Block = BlockQ5_K;
  static constexpr int top = 31;
  static constexpr bool has_low = true;
  template <int i, class B> HEED_INLINE static auto codes(const B& b) {
    return join<4>(field<4 * (i % 2)>(load_codes(b.qs + 32 * (i / 2)), 15), field<i>(load_codes(b.qh), 1));
  }
  HEED_INLINE static void scales(const Block& b, float* scale, float* low) {
    scales_and_mins(b.scales, float(b.d), float(b.dmin), scale, low);
  }
  HEED_INLINE static void scales(const Sixteen<Dtype::Q5_K>& b, F* scale, F* low) { scales_and_mins(b, scale, low); }
};

template <>
struct Quant<Dtype::Q6_K> {
  using Block = BlockQ6_K;
  static constexpr int group = 16, offset = 32, top = 63;
  static constexpr bool is_signed = false, has_low = false;
  template <int i, class B> HEED_INLINE static auto codes(const B& b) {
    constexpr int half = i / 4, part = i % 4;
    return join<4>(field<4 * (part / 2)>(load_codes(b.ql + 64 * half + 32 * (part % 2)), 15),
                   field<2 * part>(load_codes(b.qh + 32 * half), 3));
  }
  HEED_INLINE static void scales(const Block& b, float* scale, float*) {
    for (int i = 0; i < 16; i += kLanes) store(scale + i, load(b.scales + i) * set(float(b.d)));
  }
  HEED_INLINE static void scales(const Sixteen<Dtype::Q6_K>& b, F* scale, F*) {
    for (int run = 0; run < 16; ++run) scale[run] = b.number(0) * signed_byte_of(b.scales.word(run / 4), run % 4);
  }
};

/// Calls f.template operator()<D>() for a quantised type; false for any other.
template <class Fn>
bool with_quant(Dtype type, Fn&& f) {
  switch (type) {
    case Dtype::Q4_0: f.template operator()<Dtype::Q4_0>(); return true;
    case Dtype::Q4_1: f.template operator()<Dtype::Q4_1>(); return true;
    case Dtype::Q5_0: f.template operator()<Dtype::Q5_0>(); return true;
    case Dtype::Q5_1: f.template operator()<Dtype::Q5_1>(); return true;
    case Dtype::Q8_0: f.template operator()<Dtype::Q8_0>(); return true;
    case Dtype::Q2_K: f.template operator()<Dtype::Q2_K>(); return true;
    case Dtype::Q3_K: f.template operator()<Dtype::Q3_K>(); return true;
    case Dtype::Q4_K: f.template operator()<Dtype::Q4_K>(); return true;
    case Dtype::Q5_K: f.template operator()<Dtype::Q5_K>(); return true;
    case Dtype::Q6_K: f.template operator()<Dtype::Q6_K>(); return true;
    case Dtype::IQ4_NL: f.template operator()<Dtype::IQ4_NL>(); return true;
    default: return false;
  }
}

}  // namespace heed::HEED_ISA
