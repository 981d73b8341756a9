// The two products of attention over bf16 keys, 32 keys by 32 queries at a time, in matrix registers or by vdpbf16ps. Both
// read the same layouts, so that everything around them is written, and tested, once.
//
//   unit      32 keys. Its keys are rows of bf16, its values are transposed: [d_v][32].
//   subtile   32 queries: two groups of 16 lanes.
//   words     a pair of bf16 numbers, what one lane multiplies in one step.
//   Q         [d / 32][group][16 words][16 lanes]; d is padded to 32 with zeros
//   S^T       of a unit [2][group][16 keys][16 lanes] f32
//   P         of a unit [group][16 words][16 lanes]: words are pairs of keys
//   O^T       [d_v / 16][group][16][16 lanes] f32
//
// Each of these tiles is 1 KB in one piece. Keys must begin on 64-byte lines with rows a multiple of 64 bytes apart: a
// matrix load of rows that cross lines takes six times as long.
#pragma once
#include "kernels/cpu/product_tile.h"
#include "kernels/cpu/transpose_words.h"

namespace heed::HEED_ISA {

#if defined(HEED_BF16_DOT)

inline constexpr int kUnit = 32;     // keys
inline constexpr int kSubtile = 32;  // queries
inline constexpr int kBlockUnits = 8;  // units whose weights are made before their values are summed: O^T moves once for 256 keys
inline constexpr int kTileFloats = 256, kTileWords = 256;

struct UnitKeys {
  const bf16* rows;
  int64_t stride;  // bytes
};

#if defined(__AMX_BF16__)

/// s = K Q^T of a unit and a subtile.
inline void unit_scores(UnitKeys k, const uint32_t* q, int steps, float* s) {
  const char *k0 = reinterpret_cast<const char*>(k.rows), *k1 = k0 + 16 * k.stride;
  const int64_t line = 64;
  asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" ::: "memory");
  for (int t = 0; t < steps; ++t, k0 += 64, k1 += 64, q += 2 * kTileWords)
    asm volatile(
        "tileloadd (%0,%3,1), %%tmm4\n\t"
        "tileloadd (%2,%4,1), %%tmm6\n\t"
        "tileloadd 1024(%2,%4,1), %%tmm7\n\t"
        "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\t"
        "tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t"
        "tileloadd (%1,%3,1), %%tmm5\n\t"
        "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\t"
        "tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::"r"(k0),
        "r"(k1), "r"(q), "r"(k.stride), "r"(line)
        : "memory");
  asm volatile(
      "tilestored %%tmm0, (%0,%1,1)\n\t"
      "tilestored %%tmm1, 1024(%0,%1,1)\n\t"
      "tilestored %%tmm2, 2048(%0,%1,1)\n\t"
      "tilestored %%tmm3, 3072(%0,%1,1)" ::"r"(s),
      "r"(line)
      : "memory");
}

/// o (+)= V^T P^T of `units` units, two tiles of channels at a time; `first`: o is not read.
template <int Tiles>
HEED_INLINE void tile_values(const bf16* const* v, int64_t v_at, const uint32_t* p, int units, bool first, float* o) {
  const int64_t line = 64;
  if (first) {
    asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" ::: "memory");
  } else {
    asm volatile("tileloadd (%0,%1,1), %%tmm0\n\ttileloadd 1024(%0,%1,1), %%tmm1" ::"r"(o), "r"(line) : "memory");
    if constexpr (Tiles == 2)
      asm volatile("tileloadd 2048(%0,%1,1), %%tmm2\n\ttileloadd 3072(%0,%1,1), %%tmm3" ::"r"(o), "r"(line) : "memory");
  }
  for (int u = 0; u < units; ++u, p += 2 * kTileWords) {
    const bf16* at = v[u] + v_at;
    if constexpr (Tiles == 2)
      asm volatile(
          "tileloadd (%0,%2,1), %%tmm4\n\t"
          "tileloadd (%1,%2,1), %%tmm6\n\t"
          "tileloadd 1024(%1,%2,1), %%tmm7\n\t"
          "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\t"
          "tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t"
          "tileloadd 1024(%0,%2,1), %%tmm5\n\t"
          "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\t"
          "tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::"r"(at),
          "r"(p), "r"(line)
          : "memory");
    else
      asm volatile(
          "tileloadd (%0,%2,1), %%tmm4\n\t"
          "tileloadd (%1,%2,1), %%tmm6\n\t"
          "tileloadd 1024(%1,%2,1), %%tmm7\n\t"
          "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\t"
          "tdpbf16ps %%tmm7, %%tmm4, %%tmm1" ::"r"(at),
          "r"(p), "r"(line)
          : "memory");
  }
  asm volatile("tilestored %%tmm0, (%0,%1,1)\n\ttilestored %%tmm1, 1024(%0,%1,1)" ::"r"(o), "r"(line) : "memory");
  if constexpr (Tiles == 2)
    asm volatile("tilestored %%tmm2, 2048(%0,%1,1)\n\ttilestored %%tmm3, 3072(%0,%1,1)" ::"r"(o), "r"(line) : "memory");
}

inline void unit_values(const bf16* const* v, const uint32_t* p, int units, int channel_tiles, bool first, float* o) {
  int c = 0;
  for (; c + 2 <= channel_tiles; c += 2)
    tile_values<2>(v, int64_t(c) * 16 * kUnit, p, units, first, o + c * 2 * kTileFloats);
  if (c < channel_tiles) tile_values<1>(v, int64_t(c) * 16 * kUnit, p, units, first, o + c * 2 * kTileFloats);
}

#else

/// A broadcast of a pair of bf16.
HEED_INLINE __m512i pair_at(const void* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}

inline void unit_scores(UnitKeys k, const uint32_t* q, int steps, float* s) {
  constexpr int R = 8;  // keys × 2 vectors: 16 sums hide the latency of a dot
  for (int key = 0; key < kUnit; key += R) {
    F sum[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = zero();
    const char* row = reinterpret_cast<const char*>(k.rows) + key * k.stride;
    const uint32_t* x = q;
    for (int t = 0; t < steps; ++t, x += kTileWords)
      for (int c = 0; c < 16; ++c, x += 16, row += 4) {
        const __m512i a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(x + kTileWords);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const __m512i pair = pair_at(row + r * k.stride);
          sum[r][0] = dot_bf16(sum[r][0], pair, a);
          sum[r][1] = dot_bf16(sum[r][1], pair, b);
        }
      }
    float* to = s + key / 16 * 2 * kTileFloats + key % 16 * 16;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      store(to + r * 16, sum[r][0]);
      store(to + kTileFloats + r * 16, sum[r][1]);
    }
  }
}

inline void unit_values(const bf16* const* v, const uint32_t* p, int units, int channel_tiles, bool first, float* o) {
  constexpr int R = 8;
  for (int c = 0; c < channel_tiles * 16; c += R) {
    float* to = o + c / 16 * 2 * kTileFloats + c % 16 * 16;
    F sum[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      sum[r][0] = first ? zero() : load(to + r * 16);
      sum[r][1] = first ? zero() : load(to + kTileFloats + r * 16);
    }
    const uint32_t* x = p;
    for (int u = 0; u < units; ++u, x += kTileWords) {
      const bf16* row = v[u] + int64_t(c) * kUnit;
      for (int j = 0; j < 16; ++j, x += 16, row += 2) {
        const __m512i a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(x + kTileWords);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const __m512i pair = pair_at(row + r * kUnit);
          sum[r][0] = dot_bf16(sum[r][0], pair, a);
          sum[r][1] = dot_bf16(sum[r][1], pair, b);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      store(to + r * 16, sum[r][0]);
      store(to + kTileFloats + r * 16, sum[r][1]);
    }
  }
}

#endif

/// The values of up to 32 keys as a unit: to [channels][32]; rows null: zeros. Channels from d_v up to 16 · channel_tiles
/// are zeros.
inline void transpose_values(const bf16* const* rows, int d_v, int channel_tiles, bf16* to) {
  alignas(64) uint32_t words[16][16];
  for (int c = 0; c < channel_tiles * 16; c += 16) {
    const __mmask16 there = d_v - c >= 16 ? 0xffff : __mmask16((1u << (d_v - c)) - 1);
    for (int j = 0; j < 16; ++j) {
      const auto half = [&](const bf16* row) {
        return row ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, row + c)) : _mm512_setzero_si512();
      };
      _mm512_store_si512(words[j], _mm512_or_si512(half(rows[2 * j]), _mm512_slli_epi32(half(rows[2 * j + 1]), 16)));
    }
    transpose_words(words[0], 16, reinterpret_cast<uint32_t*>(to + c * kUnit), 16);
  }
}

#endif

}  // namespace heed::HEED_ISA
