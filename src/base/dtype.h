// Number types: what a tensor's elements are. Block-quantised types are those of GGUF files.
#pragma once
#include <bit>
#include <cstdint>

namespace heed {

enum class Dtype : uint8_t {
  F32,
  F16,
  BF16,
  F64,
  I8,
  U8,
  I32,
  I64,
  U64,
  Q4_0,
  Q4_1,
  Q5_0,
  Q5_1,
  Q8_0,
  Q2_K,
  Q3_K,
  Q4_K,
  Q5_K,
  Q6_K,
  IQ4_NL,
};

/// `block` elements take `bytes` bytes; block is 1 for plain types.
struct DtypeInfo {
  const char* name;
  int block;
  int bytes;
};

constexpr DtypeInfo info(Dtype type) {
  switch (type) {
    case Dtype::F32: return {"f32", 1, 4};
    case Dtype::F16: return {"f16", 1, 2};
    case Dtype::BF16: return {"bf16", 1, 2};
    case Dtype::F64: return {"f64", 1, 8};
    case Dtype::I8: return {"i8", 1, 1};
    case Dtype::U8: return {"u8", 1, 1};
    case Dtype::I32: return {"i32", 1, 4};
    case Dtype::I64: return {"i64", 1, 8};
    case Dtype::U64: return {"u64", 1, 8};
    case Dtype::Q4_0: return {"q4_0", 32, 18};
    case Dtype::Q4_1: return {"q4_1", 32, 20};
    case Dtype::Q5_0: return {"q5_0", 32, 22};
    case Dtype::Q5_1: return {"q5_1", 32, 24};
    case Dtype::Q8_0: return {"q8_0", 32, 34};
    case Dtype::Q2_K: return {"q2_k", 256, 84};
    case Dtype::Q3_K: return {"q3_k", 256, 110};
    case Dtype::Q4_K: return {"q4_k", 256, 144};
    case Dtype::Q5_K: return {"q5_k", 256, 176};
    case Dtype::Q6_K: return {"q6_k", 256, 210};
    case Dtype::IQ4_NL: return {"iq4_nl", 32, 18};
  }
  return {"?", 1, 0};
}

constexpr bool is_block(Dtype type) { return info(type).block > 1; }

/// bfloat16: the upper half of an f32, rounded to nearest even; NaN stays NaN.
struct bf16 {
  uint16_t bits = 0;
  bf16() = default;
  explicit bf16(float x) {
    uint32_t u = std::bit_cast<uint32_t>(x);
    bits = (u & 0x7fffffffu) > 0x7f800000u ? uint16_t((u >> 16) | 0x40) : uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
  }
  operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};

/// IEEE half precision, rounded to nearest even. g++ and clang convert it in hardware where F16C or NEON is on.
/// (g++ 12 has no _Float16 in C++ on Arm; there __fp16 is the same storage.)
#if defined(__aarch64__)
using f16 = __fp16;
#else
using f16 = _Float16;
#endif

}  // namespace heed
