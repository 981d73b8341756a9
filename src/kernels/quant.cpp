#include "kernels/quant.h"

#include <cstring>
#include <string>

#include "base/error.h"

namespace heed {
namespace {

void unpack(const BlockQ4_0& b, float* out) {
  for (int j = 0; j < 16; ++j) {
    out[j] = float(b.d) * float((b.qs[j] & 15) - 8);
    out[j + 16] = float(b.d) * float((b.qs[j] >> 4) - 8);
  }
}

void unpack(const BlockQ4_1& b, float* out) {
  for (int j = 0; j < 16; ++j) {
    out[j] = float(b.d) * float(b.qs[j] & 15) + float(b.m);
    out[j + 16] = float(b.d) * float(b.qs[j] >> 4) + float(b.m);
  }
}

int fifth_bit(const uint8_t qh[4], int i) { return (qh[i / 8] >> (i % 8) & 1) << 4; }

void unpack(const BlockQ5_0& b, float* out) {
  for (int j = 0; j < 16; ++j) {
    out[j] = float(b.d) * float(((b.qs[j] & 15) | fifth_bit(b.qh, j)) - 16);
    out[j + 16] = float(b.d) * float((b.qs[j] >> 4 | fifth_bit(b.qh, j + 16)) - 16);
  }
}

void unpack(const BlockQ5_1& b, float* out) {
  for (int j = 0; j < 16; ++j) {
    out[j] = float(b.d) * float((b.qs[j] & 15) | fifth_bit(b.qh, j)) + float(b.m);
    out[j + 16] = float(b.d) * float(b.qs[j] >> 4 | fifth_bit(b.qh, j + 16)) + float(b.m);
  }
}

void unpack(const BlockQ8_0& b, float* out) {
  for (int j = 0; j < 32; ++j) out[j] = float(b.d) * float(b.qs[j]);
}

void unpack(const BlockIQ4_NL& b, float* out) {
  for (int j = 0; j < 16; ++j) {
    out[j] = float(b.d) * float(iq4_nl_values[b.qs[j] & 15]);
    out[j + 16] = float(b.d) * float(iq4_nl_values[b.qs[j] >> 4]);
  }
}

/// The two low bits of value i of a Q2_K or Q3_K block.
int two_bits(const uint8_t qs[64], int i) { return qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3; }

void unpack(const BlockQ2_K& b, float* out) {
  for (int run = 0; run < 16; ++run) {
    const float scale = float(b.d) * float(b.scales[run] & 15), min = float(b.dmin) * float(b.scales[run] >> 4);
    for (int i = run * 16; i < run * 16 + 16; ++i) out[i] = scale * float(two_bits(b.qs, i)) - min;
  }
}

void unpack(const BlockQ3_K& b, float* out) {
  for (int run = 0; run < 16; ++run) {
    const float scale = float(b.d) * float(scale_q3(b.scales, run));
    for (int i = run * 16; i < run * 16 + 16; ++i) {
      const int third = b.hmask[i % 32] >> (i / 32) & 1;
      out[i] = scale * float(two_bits(b.qs, i) + 4 * third - 4);
    }
  }
}

/// The four low bits of value i of a Q4_K or Q5_K block.
int four_bits(const uint8_t qs[128], int i) { return qs[i / 64 * 32 + i % 32] >> (i % 64 / 32 * 4) & 15; }

void unpack(const BlockQ4_K& b, float* out) {
  for (int run = 0; run < 8; ++run) {
    const ScaleMin s = scale_min(b.scales, run);
    const float scale = float(b.d) * float(s.scale), min = float(b.dmin) * float(s.min);
    for (int i = run * 32; i < run * 32 + 32; ++i) out[i] = scale * float(four_bits(b.qs, i)) - min;
  }
}

void unpack(const BlockQ5_K& b, float* out) {
  for (int run = 0; run < 8; ++run) {
    const ScaleMin s = scale_min(b.scales, run);
    const float scale = float(b.d) * float(s.scale), min = float(b.dmin) * float(s.min);
    for (int i = run * 32; i < run * 32 + 32; ++i) {
      const int fifth = (b.qh[i % 32] >> run & 1) << 4;
      out[i] = scale * float(four_bits(b.qs, i) | fifth) - min;
    }
  }
}

void unpack(const BlockQ6_K& b, float* out) {
  for (int run = 0; run < 16; ++run) {
    const float scale = float(b.d) * float(b.scales[run]);
    for (int i = run * 16; i < run * 16 + 16; ++i) {
      const int half = i / 128, at = i % 128;
      const int low = b.ql[half * 64 + at % 64] >> (at / 64 * 4) & 15;
      const int high = b.qh[half * 32 + at % 32] >> (at / 32 * 2) & 3;
      out[i] = scale * float((low | high << 4) - 32);
    }
  }
}

template <class Block>
void unpack_all(const void* blocks, int64_t count, int width, float* out) {
  const auto* block = static_cast<const Block*>(blocks);
  for (int64_t i = 0; i < count / width; ++i) unpack(block[i], out + i * width);
}

template <class T>
void convert(const void* values, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    T value;
    std::memcpy(&value, static_cast<const char*>(values) + i * int64_t(sizeof value), sizeof value);
    out[i] = float(value);
  }
}

}  // namespace

void dequantise_row(Dtype type, const void* blocks, int64_t count, float* out) {
  const int width = info(type).block;
  require(count >= 0 && count % width == 0, "dequantise_row",
          [&] { return std::to_string(count) + " values are not whole blocks of " + info(type).name; });
  switch (type) {
    case Dtype::F32: std::memcpy(out, blocks, size_t(count) * sizeof(float)); return;
    case Dtype::F16: return convert<f16>(blocks, count, out);
    case Dtype::BF16: return convert<bf16>(blocks, count, out);
    case Dtype::F64: return convert<double>(blocks, count, out);
    case Dtype::I8: return convert<int8_t>(blocks, count, out);
    case Dtype::U8: return convert<uint8_t>(blocks, count, out);
    case Dtype::I32: return convert<int32_t>(blocks, count, out);
    case Dtype::I64: return convert<int64_t>(blocks, count, out);
    case Dtype::U64: return convert<uint64_t>(blocks, count, out);
    case Dtype::Q4_0: return unpack_all<BlockQ4_0>(blocks, count, width, out);
    case Dtype::Q4_1: return unpack_all<BlockQ4_1>(blocks, count, width, out);
    case Dtype::Q5_0: return unpack_all<BlockQ5_0>(blocks, count, width, out);
    case Dtype::Q5_1: return unpack_all<BlockQ5_1>(blocks, count, width, out);
    case Dtype::Q8_0: return unpack_all<BlockQ8_0>(blocks, count, width, out);
    case Dtype::Q2_K: return unpack_all<BlockQ2_K>(blocks, count, width, out);
    case Dtype::Q3_K: return unpack_all<BlockQ3_K>(blocks, count, width, out);
    case Dtype::Q4_K: return unpack_all<BlockQ4_K>(blocks, count, width, out);
    case Dtype::Q5_K: return unpack_all<BlockQ5_K>(blocks, count, width, out);
    case Dtype::Q6_K: return unpack_all<BlockQ6_K>(blocks, count, width, out);
    case Dtype::IQ4_NL: return unpack_all<BlockIQ4_NL>(blocks, count, width, out);
  }
}

void interleave_rows(Dtype type, const void* rows, int64_t count, void* out) {
  const DtypeInfo i = info(type);
  require(i.block > 1 && count >= 0 && count % i.block == 0, "interleave_rows",
          [&] { return std::to_string(count) + " values are not whole blocks of " + i.name; });
  const BlockNumbers numbers = block_numbers(type);
  const int64_t row_bytes = count / i.block * i.bytes;
  const auto* from = static_cast<const char*>(rows);
  auto* to = static_cast<char*>(out);
  const auto put = [&](int at, int bytes) {  // those bytes of a block of each row
    for (int r = 0; r < kSideBySide; ++r, to += bytes) std::memcpy(to, from + r * row_bytes + at, size_t(bytes));
  };
  for (int64_t b = 0; b < count / i.block; ++b, from += i.bytes) {
    const int behind = numbers.at + 2 * numbers.count;
    for (int n = 0; n < numbers.count; ++n) put(numbers.at + 2 * n, 2);
    for (int at = 0; at < numbers.at; at += 4) put(at, 4);
    for (int at = behind; at < i.bytes; at += 4) put(at, 4);
  }
}

}  // namespace heed
