// Blocks of quantised weights as GGUF files hold them (the layouts are ggml's), and their exact values.
#pragma once
#include <cstddef>
#include <cstdint>

#include "base/dtype.h"

namespace heed {

// d scales and m or dmin shifts; qs are the low bits of the codes. Little-endian; a block needs 2-byte alignment.

/// 32 values, d · (code − 8). Byte j holds codes j (low half) and j + 16 (high half), as in all 32-value formats.
struct BlockQ4_0 {
  f16 d;
  uint8_t qs[16];
};
/// d · code + m.
struct BlockQ4_1 {
  f16 d, m;
  uint8_t qs[16];
};
/// d · (code − 16). Bit i of qh is the fifth bit of code i.
struct BlockQ5_0 {
  f16 d;
  uint8_t qh[4], qs[16];
};
/// d · code + m.
struct BlockQ5_1 {
  f16 d, m;
  uint8_t qh[4], qs[16];
};
/// d · code.
struct BlockQ8_0 {
  f16 d;
  int8_t qs[32];
};
/// d · iq4_nl_values[code].
struct BlockIQ4_NL {
  f16 d;
  uint8_t qs[16];
};
inline constexpr int8_t iq4_nl_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/// 256 values in 16 runs of 16: d · (scale of the run) · code − dmin · (min of the run); scales[run] = scale | min << 4.
/// Byte 32 c + l of qs holds values 128 c + 32 i + l for i = 0 … 3 in bits 2 i and 2 i + 1.
struct BlockQ2_K {
  uint8_t scales[16], qs[64];
  f16 d, dmin;
};
/// d · (scale − 32) · (code − 4): qs as in Q2_K, the third bit of value 32 i + l is bit i of hmask[l].
struct BlockQ3_K {
  uint8_t hmask[32], qs[64], scales[12];
  f16 d;
};
/// 8 runs of 32: d · scale · code − dmin · min. Byte 32 c + l holds values 64 c + l (low half) and 64 c + 32 + l.
struct BlockQ4_K {
  f16 d, dmin;
  uint8_t scales[12], qs[128];
};
/// As Q4_K; the fifth bit of value 32 i + l is bit i of qh[l].
struct BlockQ5_K {
  f16 d, dmin;
  uint8_t scales[12], qh[32], qs[128];
};
/// 16 runs of 16: d · scale · (code − 32). For each half c of 128 values: byte 64 c + l (l < 64) of ql holds the low
/// four bits of values 128 c + l and 128 c + 64 + l; byte 32 c + l (l < 32) of qh the upper two bits of values
/// 128 c + 32 i + l for i = 0 … 3.
struct BlockQ6_K {
  uint8_t ql[128], qh[64];
  int8_t scales[16];
  f16 d;
};

static_assert(sizeof(BlockQ4_0) == info(Dtype::Q4_0).bytes && sizeof(BlockQ4_1) == info(Dtype::Q4_1).bytes);
static_assert(sizeof(BlockQ5_0) == info(Dtype::Q5_0).bytes && sizeof(BlockQ5_1) == info(Dtype::Q5_1).bytes);
static_assert(sizeof(BlockQ8_0) == info(Dtype::Q8_0).bytes && sizeof(BlockIQ4_NL) == info(Dtype::IQ4_NL).bytes);
static_assert(sizeof(BlockQ2_K) == info(Dtype::Q2_K).bytes && sizeof(BlockQ3_K) == info(Dtype::Q3_K).bytes);
static_assert(sizeof(BlockQ4_K) == info(Dtype::Q4_K).bytes && sizeof(BlockQ5_K) == info(Dtype::Q5_K).bytes);
static_assert(sizeof(BlockQ6_K) == info(Dtype::Q6_K).bytes);

struct ScaleMin {
  int scale, min;
};
/// The 6-bit scale and min of run `run` (0 … 7) of a Q4_K or Q5_K block.
inline ScaleMin scale_min(const uint8_t scales[12], int run) {
  if (run < 4) return {scales[run] & 63, scales[run + 4] & 63};
  return {(scales[run + 4] & 15) | (scales[run - 4] >> 6) << 4, scales[run + 4] >> 4 | (scales[run] >> 6) << 4};
}

/// The 6-bit scale, 32 taken off, of run `run` (0 … 15) of a Q3_K block.
inline int scale_q3(const uint8_t scales[12], int run) {
  const int low = scales[run % 8] >> (run / 8 * 4) & 15;
  return (low | (scales[8 + run % 4] >> (run / 4 * 2) & 3) << 4) - 32;
}

/// The `count` values (a multiple of the block) that start at `blocks`, of any Dtype, in f32. Every operation is one
/// rounded f32 operation in the order written above, so that results equal those of ggml's own conversion.
void dequantise_row(Dtype type, const void* blocks, int64_t count, float* out);

/// Rows of a block-quantised matrix sixteen by sixteen, so that one vector holds the same four codes of each
/// (Tensor::interleaved). Rows 16 g … 16 g + 15 take the bytes that they take otherwise; column b of their blocks begins
/// 16 · b blocks behind the first of them. In it come the blocks' f16 numbers (d, then m or dmin), number n of row r at byte
/// 2 (16 n + r), then all their other bytes in order, four as a word: word w of row r at byte 4 (16 w + r) from where words
/// begin. Rows behind the last whole sixteen stay as files hold them.
inline constexpr int kSideBySide = 16;

/// Where a block keeps its f16 numbers, and how many they are.
struct BlockNumbers {
  int at, count;
};
constexpr BlockNumbers block_numbers(Dtype type) {
  switch (type) {
    case Dtype::Q2_K: return {80, 2};
    case Dtype::Q3_K: return {108, 1};
    case Dtype::Q6_K: return {208, 1};
    case Dtype::Q4_1:
    case Dtype::Q5_1:
    case Dtype::Q4_K:
    case Dtype::Q5_K: return {0, 2};
    default: return {0, 1};
  }
}
static_assert(offsetof(BlockQ2_K, d) == 80 && offsetof(BlockQ3_K, d) == 108 && offsetof(BlockQ6_K, d) == 208);

/// Sixteen rows of `count` values (a multiple of the block) of a block type, one behind the other → out, interleaved.
void interleave_rows(Dtype type, const void* rows, int64_t count, void* out);

}  // namespace heed
