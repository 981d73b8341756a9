// Block-quantised weights (kernels/quant.h) in runs of 32: packed 8-bit codes, and a scale and shift for each half.
#pragma once
#include "kernels/cuda/device.cuh"
#include "kernels/quant.h"

namespace heed::cuda {

/// Value i of a run is scale[i / 16] · (code_i − kOffset) + shift[i / 16]; code_i is byte i % 4 of codes[i / 4].
struct Run {
  int codes[8];
  float scale[2], shift[2];
};
template <Dtype kType>
constexpr int kOffset = kType == Dtype::Q4_0   ? 8
                        : kType == Dtype::Q5_0 ? 16
                        : kType == Dtype::Q3_K ? 4
                        : kType == Dtype::Q6_K ? 32
                                               : 0;
/// Whether the halves of a run have scales of their own, and whether shifts are not 0.
template <Dtype kType> constexpr bool kHalves = kType == Dtype::Q2_K || kType == Dtype::Q3_K || kType == Dtype::Q6_K;
template <Dtype kType>
constexpr bool kShifted = kType == Dtype::Q4_1 || kType == Dtype::Q5_1 || kType == Dtype::Q2_K ||
                          kType == Dtype::Q4_K || kType == Dtype::Q5_K;

/// Words of blocks where they lie, at addresses that are multiples of kAlign.
struct InGlobal {
  template <int kAlign, int kWords>
  __device__ static void words(const uint8_t* p, uint32_t (&to)[kWords]) {
    const uint16_t* half = reinterpret_cast<const uint16_t*>(p);
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      to[i] = kAlign % 4 == 0 ? reinterpret_cast<const uint32_t*>(p)[i]
                              : uint32_t(half[2 * i]) | uint32_t(half[2 * i + 1]) << 16;
  }
};

/// Words of blocks that were copied to shared memory, where four bytes past them may be read: whole words at any
/// address, 16 bytes where the blocks allow. A third of InGlobal's loads.
struct InShared {
  template <int kAlign, int kWords>
  __device__ static void words(const uint8_t* p, uint32_t (&to)[kWords]) {
    if constexpr (kAlign % 16 == 0 && kWords % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(p + 4 * i);
        to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
      }
    } else if constexpr (kAlign % 4 == 0) {
      InGlobal::words<4>(p, to);
    } else {
      const uint32_t odd = uint32_t(reinterpret_cast<uint64_t>(p)) & 2;
      const uint32_t* from = reinterpret_cast<const uint32_t*>(p - odd);
      uint32_t low = from[0];
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const uint32_t high = from[i + 1];
        to[i] = __funnelshift_r(low, high, 8 * odd);
        low = high;
      }
    }
  }
};

__device__ inline float half_at(const uint8_t* p) { return __half2float(*reinterpret_cast<const __half*>(p)); }
__device__ inline float low_half(uint32_t x) { return __half2float(__ushort_as_half(uint16_t(x))); }

/// Bits 0 … 3 of x become bit `to` of bytes 0 … 3.
__device__ inline uint32_t spread(uint32_t x, int to) {
  return ((x & 1) | (x & 2) << 7 | (x & 4) << 14 | (x & 8) << 21) << to;
}

/// What addresses of a type's blocks are multiples of.
template <Dtype kType> constexpr int kAlign = info(kType).bytes % 16 == 0 ? 16 : info(kType).bytes % 4 == 0 ? 4 : 2;
/// Runs of 32 in a block, and weights that share a scale.
template <Dtype kType> constexpr int kBlockRuns = info(kType).block / 32;
template <Dtype kType> constexpr int kGroup = kHalves<kType> ? 16 : 32;

/// Where a block has the word with the low bits of codes 4 i … 4 i + 3 of its run `in`, and that with their high bits (in
/// blocks of 32 one word for all i).
template <Dtype kType> __host__ __device__ constexpr unsigned low_at(unsigned in, unsigned i) {
  switch (kType) {
    case Dtype::Q8_0: return 2 + 4 * i;
    case Dtype::Q4_1: return 4 + 4 * (i % 4);
    case Dtype::Q5_0: return 6 + 4 * (i % 4);
    case Dtype::Q5_1: return 8 + 4 * (i % 4);
    case Dtype::Q2_K: return 16 + in / 4 * 32 + 4 * i;
    case Dtype::Q3_K: return 32 + in / 4 * 32 + 4 * i;
    case Dtype::Q4_K: return 16 + in / 2 * 32 + 4 * i;
    case Dtype::Q5_K: return 48 + in / 2 * 32 + 4 * i;
    case Dtype::Q6_K: return in / 4 * 64 + in % 2 * 32 + 4 * i;
    default: return 2 + 4 * (i % 4);
  }
}
template <Dtype kType>
constexpr bool kHigh = kType == Dtype::Q5_0 || kType == Dtype::Q5_1 || kType == Dtype::Q3_K || kType == Dtype::Q5_K ||
                       kType == Dtype::Q6_K;
template <Dtype kType> __host__ __device__ constexpr unsigned high_at(unsigned in, unsigned i) {
  switch (kType) {
    case Dtype::Q5_0: return 2;
    case Dtype::Q5_1: return 4;
    case Dtype::Q3_K: return 4 * i;
    case Dtype::Q5_K: return 16 + 4 * i;
    default: return 128 + in / 4 * 32 + 4 * i;
  }
}

/// Codes 4 i … 4 i + 3 of a block's run `in`, of those words.
template <Dtype kType> __device__ inline uint32_t codes_of(uint32_t low, uint32_t high, unsigned in, unsigned i) {
  switch (kType) {
    case Dtype::Q8_0: return low;
    case Dtype::Q2_K: return low >> (in % 4 * 2) & 0x03030303u;
    case Dtype::Q3_K: return (low >> (in % 4 * 2) & 0x03030303u) | (high >> in & 0x01010101u) << 2;
    case Dtype::Q4_K: return low >> (in % 2 * 4) & 0x0f0f0f0fu;
    case Dtype::Q5_K: return (low >> (in % 2 * 4) & 0x0f0f0f0fu) | (high >> in & 0x01010101u) << 4;
    case Dtype::Q6_K: return (low >> (in % 4 / 2 * 4) & 0x0f0f0f0fu) | (high >> (in % 4 * 2) & 0x03030303u) << 4;
    default: break;
  }
  const uint32_t nibbles = low >> (i / 4 * 4) & 0x0f0f0f0fu;
  if (kHigh<kType>) return nibbles | spread(high >> (4 * i), 4);
  if (kType != Dtype::IQ4_NL) return nibbles;
  // The table in four words; byte permutation picks by the low three bits, the fourth chooses the half.
  const uint32_t pick = (nibbles & 7) | (nibbles >> 4 & 0x70) | (nibbles >> 8 & 0x700) | (nibbles >> 12 & 0x7000);
  const uint32_t a = __byte_perm(0xbfad9881u, 0xf6eaddcfu, pick), c = __byte_perm(0x26190d01u, 0x71594535u, pick);
  const uint32_t upper_half = (nibbles >> 3 & 0x01010101u) * 255;
  return (a & ~upper_half) | (c & upper_half);
}

/// The bytes of run r of a row of whole blocks. In blocks of 256, runs that `share` have the same words.
template <Dtype kType> struct Raw {
  const uint8_t* block;
  uint32_t head[4], low[8], high[8];  // what a type has of these
};
/// Whether run r + kShares has run r's words: of pairs 2i, 2i + 1 (in Q6_K of r % 4 < 2); 0: none has.
template <Dtype kType> constexpr int kShares = kBlockRuns<kType> == 1 ? 0 : kType == Dtype::Q6_K ? 2 : 1;

/// Of Q4_K and Q5_K: d and that of minima, and behind them, of runs 2 i and 2 i + 1 with `in` one of them, scales and minima side
/// by side.
template <Dtype kType, class Words> __device__ inline void load_head(const uint8_t* block, unsigned in, uint32_t (&head)[4]) {
  if constexpr (kType == Dtype::Q4_K || kType == Dtype::Q5_K) {
    // Six bits each of scales 0 … 3 and of minima 0 … 3, and above them and in the last word of 4 … 7.
    Words::template words<kAlign<kType>>(block, head);
    const unsigned byte = in / 2 % 2 * 16;
    const uint32_t scales = head[1] >> byte, mins = head[2] >> byte, rest = head[3] >> byte;
    head[1] = in < 4 ? scales & 0x3f3f : (rest & 0x0f0f) | (scales >> 2 & 0x3030);
    head[2] = in < 4 ? mins & 0x3f3f : (rest >> 4 & 0x0f0f) | (mins >> 2 & 0x3030);
  }
}

template <Dtype kType, class Words = InGlobal> __device__ inline Raw<kType> load_run(const uint8_t* row, unsigned r) {
  const unsigned in = r % 8;
  Raw<kType> out;
  const uint8_t* b = out.block = row + r / kBlockRuns<kType> * info(kType).bytes;
  if constexpr (kBlockRuns<kType> == 1 && kType != Dtype::Q8_0) {
    uint32_t high[1] = {}, low[4];
    if constexpr (kHigh<kType>) Words::template words<kAlign<kType>>(b + high_at<kType>(in, 0), high);
    Words::template words<kAlign<kType>>(b + low_at<kType>(in, 0), low);
#pragma unroll
    for (int i = 0; i < 8; ++i) out.low[i] = low[i % 4], out.high[i] = high[0];
  } else {
    load_head<kType, Words>(b, in, out.head);
    Words::template words<kAlign<kType>>(b + low_at<kType>(in, 0), out.low);
    if constexpr (kHigh<kType>) Words::template words<kAlign<kType>>(b + high_at<kType>(in, 0), out.high);
    else
#pragma unroll
      for (uint32_t& high : out.high) high = 0;
  }
  return out;
}

struct Affine {
  float scale, shift;
};
/// Of the group-th kGroup weights of a block, with the head of its run.
template <Dtype kType>
__device__ inline Affine affine_of(const uint8_t* block, const uint32_t (&head)[4], unsigned group) {
  if constexpr (kBlockRuns<kType> == 1) {
    return {half_at(block), kShifted<kType> ? half_at(block + 2) : 0.0f};
  } else if constexpr (kType == Dtype::Q2_K) {
    const int both = block[group];
    return {half_at(block + 80) * float(both & 15), -half_at(block + 82) * float(both >> 4)};
  } else if constexpr (kType == Dtype::Q3_K) {
    const uint8_t* scales = block + 96;
    const unsigned low = scales[group % 8] >> (group / 8 * 4) & 15, high = scales[8 + group % 4] >> (group / 4 * 2) & 3;
    return {half_at(block + 108) * float(int(low | high << 4) - 32), 0};
  } else if constexpr (kType == Dtype::Q6_K) {
    return {half_at(block + 208) * float(int8_t(block[192 + group])), 0};
  } else {
    static_assert(kType == Dtype::Q4_K || kType == Dtype::Q5_K);
    const unsigned byte = group % 2 * 8;
    return {low_half(head[0]) * float(head[1] >> byte & 255), -low_half(head[0] >> 16) * float(head[2] >> byte & 255)};
  }
}

/// Run r, of its bytes.
template <Dtype kType> __device__ inline Run run_of(const Raw<kType>& raw, unsigned r) {
  const unsigned in = r % 8;
  Run out;
#pragma unroll
  for (unsigned i = 0; i < 8; ++i) out.codes[i] = int(codes_of<kType>(raw.low[i], raw.high[i], in, i));
  const Affine first = affine_of<kType>(raw.block, raw.head, kHalves<kType> ? 2 * in : in);
  const Affine second = kHalves<kType> ? affine_of<kType>(raw.block, raw.head, 2 * in + 1) : first;
  out.scale[0] = first.scale, out.scale[1] = second.scale;
  out.shift[0] = first.shift, out.shift[1] = second.shift;
  return out;
}

template <Dtype kType> __device__ inline Run run_of(const uint8_t* row, unsigned r) {
  return run_of<kType>(load_run<kType>(row, r), r);
}

/// Σ codes · codes of 32 activations, of each half.
__device__ inline int2 dot_codes(const Run& run, const int4& low, const int4& high) {
  int dot0 = __dp4a(run.codes[0], low.x, 0), dot1 = __dp4a(run.codes[4], high.x, 0);
  dot0 = __dp4a(run.codes[1], low.y, dot0);
  dot1 = __dp4a(run.codes[5], high.y, dot1);
  dot0 = __dp4a(run.codes[2], low.z, dot0);
  dot1 = __dp4a(run.codes[6], high.z, dot1);
  dot0 = __dp4a(run.codes[3], low.w, dot0);
  dot1 = __dp4a(run.codes[7], high.w, dot1);
  return {dot0, dot1};
}

/// Σ of a run's weights times 32 activations scale · code. sums: Σ scale · code of each half where halves have their own
/// scales, of all otherwise. (The sums are of the rounded activations: matmul.cuh says why.)
template <Dtype kType>
__device__ inline float dot(const Run& run, const int4& low, const int4& high, float scale,
                            const float (&sums)[kHalves<kType> ? 2 : 1]) {
  const int2 dots = dot_codes(run, low, high);
  const auto least = [&](int half) {
    if constexpr (kOffset<kType> == 0) return run.shift[half];
    else return run.shift[half] - float(kOffset<kType>) * run.scale[half];
  };
  if constexpr (kHalves<kType>)
    return scale * (run.scale[0] * float(dots.x) + run.scale[1] * float(dots.y)) + least(0) * sums[0] + least(1) * sums[1];
  const float out = run.scale[0] * (scale * float(dots.x + dots.y));
  if constexpr (kOffset<kType> != 0 || kShifted<kType>) return out + least(0) * sums[0];
  return out;
}

template <Dtype kType> __device__ inline float value_of(const Run& run, int i) {
  const int code = int(int8_t(run.codes[i / 4] >> (i % 4 * 8)));
  return run.scale[i / 16] * float(code - kOffset<kType>) + run.shift[i / 16];
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
