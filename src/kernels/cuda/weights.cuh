// Block-quantised weights (kernels/quant.h) in runs of 32: packed 8-bit codes, and a scale and shift for each half.
#pragma once
#include "kernels/cuda/device.cuh"
#include "kernels/quant.h"

namespace heed::cuda {

/// Value i of a run is scale[i / 16] · code_i + shift[i / 16]; code_i is byte i % 4 of codes[i / 4].
struct Run {
  int codes[8];
  float scale[2], shift[2];
};

/// Four bytes at an address that is a multiple of two.
__device__ inline uint32_t load4(const uint8_t* p) {
  const uint16_t* half = reinterpret_cast<const uint16_t*>(p);
  return uint32_t(half[0]) | uint32_t(half[1]) << 16;
}
/// Of four: blocks whose size is a multiple of four.
__device__ inline uint32_t load4_aligned(const uint8_t* p) { return *reinterpret_cast<const uint32_t*>(p); }
__device__ inline float half_at(const uint8_t* p) { return __half2float(*reinterpret_cast<const __half*>(p)); }

/// Bits 0 … 3 of x become bit `to` of bytes 0 … 3.
__device__ inline uint32_t spread(uint32_t x, int to) {
  return ((x & 1) | (x & 2) << 7 | (x & 4) << 14 | (x & 8) << 21) << to;
}
/// Subtracts `by` from each byte (no borrow between bytes).
__device__ inline int minus(uint32_t codes, uint32_t by) { return int(__vsub4(codes, by * 0x01010101u)); }

/// Run r of a row of whole blocks.
template <Dtype kType>
__device__ inline Run run_of(const uint8_t* row, int r) {
  constexpr int bytes = info(kType).bytes, runs = info(kType).block / 32;
  const uint8_t* b = row + int64_t(r / runs) * bytes;
  Run out;
  out.shift[0] = out.shift[1] = 0;
  if constexpr (kType == Dtype::Q4_0 || kType == Dtype::Q4_1 || kType == Dtype::Q5_0 || kType == Dtype::Q5_1 ||
                kType == Dtype::IQ4_NL) {
    constexpr bool shifted = kType == Dtype::Q4_1 || kType == Dtype::Q5_1,
                   fifth = kType == Dtype::Q5_0 || kType == Dtype::Q5_1;
    out.scale[0] = out.scale[1] = half_at(b);
    if (shifted) out.shift[0] = out.shift[1] = half_at(b + 2);
    const uint8_t* qs = b + (shifted ? 4 : 2) + (fifth ? 4 : 0);
    const uint32_t high = fifth ? load4(qs - 4) : 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = shifted ? load4_aligned(qs + 4 * i) : load4(qs + 4 * i);
      uint32_t low = word & 0x0f0f0f0fu, upper = word >> 4 & 0x0f0f0f0fu;
      if (fifth) {
        low |= spread(high >> (4 * i), 4);
        upper |= spread(high >> (16 + 4 * i), 4);
      }
      if constexpr (kType == Dtype::IQ4_NL) {
        auto look_up = [](uint32_t nibbles) {
          // The table in four words; byte permutation picks by the low three bits, the fourth chooses the half.
          const uint32_t pick = (nibbles & 7) | (nibbles >> 4 & 0x70) | (nibbles >> 8 & 0x700) | (nibbles >> 12 & 0x7000);
          const uint32_t a = __byte_perm(0xbfad9881u, 0xf6eaddcfu, pick), c = __byte_perm(0x26190d01u, 0x71594535u, pick);
          const uint32_t upper_half = (nibbles >> 3 & 0x01010101u) * 255;
          return int((a & ~upper_half) | (c & upper_half));
        };
        out.codes[i] = look_up(low);
        out.codes[i + 4] = look_up(upper);
      } else {
        constexpr uint32_t by = kType == Dtype::Q4_0 ? 8 : kType == Dtype::Q5_0 ? 16 : 0;
        out.codes[i] = minus(low, by);
        out.codes[i + 4] = minus(upper, by);
      }
    }
  } else if constexpr (kType == Dtype::Q8_0) {
    out.scale[0] = out.scale[1] = half_at(b);
#pragma unroll
    for (int i = 0; i < 8; ++i) out.codes[i] = int(load4(b + 2 + 4 * i));
  } else if constexpr (kType == Dtype::Q2_K) {
    const int in = r % 8;
    const float d = half_at(b + 80), dmin = half_at(b + 82);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int scale = b[2 * in + half];
      out.scale[half] = d * float(scale & 15);
      out.shift[half] = -dmin * float(scale >> 4);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
      out.codes[i] = int(load4_aligned(b + 16 + in / 4 * 32 + 4 * i) >> (in % 4 * 2) & 0x03030303u);
  } else if constexpr (kType == Dtype::Q3_K) {
    const int in = r % 8;
    const float d = half_at(b + 108);
    const uint8_t* scales = b + 96;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int run = 2 * in + half, low = scales[run % 8] >> (run / 8 * 4) & 15;
      out.scale[half] = d * float((low | (scales[8 + run % 4] >> (run / 4 * 2) & 3) << 4) - 32);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t two = load4(b + 32 + in / 4 * 32 + 4 * i) >> (in % 4 * 2) & 0x03030303u;
      const uint32_t third = (load4(b + 4 * i) >> in & 0x01010101u) << 2;
      out.codes[i] = minus(two | third, 4);
    }
  } else if constexpr (kType == Dtype::Q4_K || kType == Dtype::Q5_K) {
    constexpr bool five = kType == Dtype::Q5_K;
    const int in = r % 8;
    const uint8_t* scales = b + 4;
    const float d = half_at(b), dmin = half_at(b + 2);
    const int scale = in < 4 ? scales[in] & 63 : (scales[in + 4] & 15) | (scales[in - 4] >> 6) << 4;
    const int min = in < 4 ? scales[in + 4] & 63 : scales[in + 4] >> 4 | (scales[in] >> 6) << 4;
    out.scale[0] = out.scale[1] = d * float(scale);
    out.shift[0] = out.shift[1] = -dmin * float(min);
    const uint8_t* qs = b + (five ? 48 : 16) + in / 2 * 32;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint32_t codes = load4_aligned(qs + 4 * i) >> (in % 2 * 4) & 0x0f0f0f0fu;
      if (five) codes |= (load4_aligned(b + 16 + 4 * i) >> in & 0x01010101u) << 4;
      out.codes[i] = int(codes);
    }
  } else {
    static_assert(kType == Dtype::Q6_K);
    const int in = r % 8, half = in / 4, quarter = in % 4;
    const float d = half_at(b + 208);
    const int8_t* scales = reinterpret_cast<const int8_t*>(b + 192);
    out.scale[0] = d * float(scales[2 * in]);
    out.scale[1] = d * float(scales[2 * in + 1]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t low = load4(b + half * 64 + quarter % 2 * 32 + 4 * i) >> (quarter / 2 * 4) & 0x0f0f0f0fu;
      const uint32_t high = load4(b + 128 + half * 32 + 4 * i) >> (quarter * 2) & 0x03030303u;
      out.codes[i] = minus(low | high << 4, 32);
    }
  }
  return out;
}

__device__ inline float value_of(const Run& run, int i) {
  const int code = int(int8_t(run.codes[i / 4] >> (i % 4 * 8)));
  return run.scale[i / 16] * float(code) + run.shift[i / 16];
}

/// Calls body.template operator()<type>() for a block type.
template <class Body>
void with_block_type(Dtype type, Body&& body) {
  switch (type) {
    case Dtype::Q4_0: return body.template operator()<Dtype::Q4_0>();
    case Dtype::Q4_1: return body.template operator()<Dtype::Q4_1>();
    case Dtype::Q5_0: return body.template operator()<Dtype::Q5_0>();
    case Dtype::Q5_1: return body.template operator()<Dtype::Q5_1>();
    case Dtype::Q8_0: return body.template operator()<Dtype::Q8_0>();
    case Dtype::Q2_K: return body.template operator()<Dtype::Q2_K>();
    case Dtype::Q3_K: return body.template operator()<Dtype::Q3_K>();
    case Dtype::Q4_K: return body.template operator()<Dtype::Q4_K>();
    case Dtype::Q5_K: return body.template operator()<Dtype::Q5_K>();
    case Dtype::Q6_K: return body.template operator()<Dtype::Q6_K>();
    case Dtype::IQ4_NL: return body.template operator()<Dtype::IQ4_NL>();
    default: break;
  }
}

/// Weights [rows, width] as kernels take them: plain, or rows of `bytes` bytes.
struct WeightView {
  Matrix plain;
  const uint8_t* blocks;
  int64_t row_bytes;
  int width;
};
/// Error(Invalid) for shapes that do not fit, Error(Unsupported) for blocks that are not aligned.
WeightView weight_view(const char* where, const Tensor& w);

/// Rows first … first + rows of w → to (F32 or BF16 [rows, ≥ width]), 0 in columns past w's width; when ids are given,
/// rows ids[first] …, NaN for an id that is not there. Times scale.
void unpack_rows(Queue& queue, const char* where, const Tensor& w, const int32_t* ids, int64_t first, int64_t rows,
                 float scale, const Matrix& to);

}  // namespace heed::cuda
