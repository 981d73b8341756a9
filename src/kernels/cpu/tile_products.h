// The two products of a tile as register blocks: R rows (keys, or channels of V) × W vectors of lanes, the row operand
// broadcast from memory.
#pragma once
#include "kernels/cpu/tile.h"
#include "kernels/cpu/unrolled.h"

namespace heed::HEED_ISA {

#if defined(__AVX2__) && !defined(__AVX512F__)
inline constexpr int kMaxVectors = 2;  // 16 registers: 12 sums, 2 lanes' vectors, a broadcast
constexpr int block_rows(int vectors) { return vectors == 2 ? 6 : 12; }
#else
inline constexpr int kMaxVectors = 4;  // 32 registers: 24 sums
constexpr int block_rows(int vectors) { return vectors == 4 ? 6 : vectors == 3 ? 8 : 12; }
#endif

struct PlainMath {
  using Element = float;
  static HEED_INLINE F step(F sum, const float* x, F y) { return fma(set(*x), y, sum); }
  static HEED_INLINE F lanes(const float* p) { return load(p); }
};

#if defined(HEED_BF16_DOT)
/// Elements are pairs of bf16 in 32 bits.
struct PairMath {
  using Element = uint32_t;
  static HEED_INLINE F step(F sum, const uint32_t* x, __m512i y) {
    int32_t pair;
    std::memcpy(&pair, x, 4);
    return dot_bf16(sum, _mm512_set1_epi32(pair), y);
  }
  static HEED_INLINE __m512i lanes(const uint32_t* p) { return _mm512_loadu_si512(p); }
};
#endif

/// s[R][W vectors] = Σ_c k[r][c] · q[c].
template <class Math, int R, int W>
void score_block(const void* const* k, const typename Math::Element* q, int width, int depth, float* s) {
  using E = typename Math::Element;
  F sum[R * W];
  const E* row[R];
  unrolled<R * W>([&](auto i) HEED_LAMBDA { sum[i] = zero(); });
  unrolled<R>([&](auto r) HEED_LAMBDA { row[r] = static_cast<const E*>(k[r]); });
  for (int c = 0; c < depth; ++c, q += width) {
    decltype(Math::lanes(q)) x[W];
    unrolled<W>([&](auto w) HEED_LAMBDA { x[w] = Math::lanes(q + w * kLanes); });
    unrolled<R * W>([&](auto i) HEED_LAMBDA { sum[i] = Math::step(sum[i], row[i / W] + c, x[i % W]); });
  }
  unrolled<R * W>([&](auto i) HEED_LAMBDA { store(s + i / W * width + i % W * kLanes, sum[i]); });
}

/// out[R][W vectors] = out · keep + Σ_j v[j][r] · p[j]; rows of v are v + j · step, or v_rows[j] + first.
template <class Math, int R, int W>
void value_block(const typename Math::Element* p, int width, int count, const typename Math::Element* v, int64_t step,
                 const float* const* v_rows, int first, const float* keep, float* out) {
  using E = typename Math::Element;
  F sum[R * W];
  unrolled<R * W>([&](auto i)
                      HEED_LAMBDA { sum[i] = load(out + i / W * width + i % W * kLanes) * load(keep + i % W * kLanes); });
  for (int j = 0; j < count; ++j, p += width) {
    const E* row = v_rows ? reinterpret_cast<const E*>(v_rows[j] + first) : v + j * step + first;
    decltype(Math::lanes(p)) x[W];
    unrolled<W>([&](auto w) HEED_LAMBDA { x[w] = Math::lanes(p + w * kLanes); });
    unrolled<R * W>([&](auto i) HEED_LAMBDA { sum[i] = Math::step(sum[i], row + i / W, x[i % W]); });
  }
  unrolled<R * W>([&](auto i) HEED_LAMBDA { store(out + i / W * width + i % W * kLanes, sum[i]); });
}

/// S^T of a chunk; its k repeats the last row up to a whole block.
template <class Math, int W>
void score_columns(const Chunk& chunk, const typename Math::Element* q, int width, int depth, float* s) {
  constexpr int R = block_rows(W);
  for (int j = 0; j < chunk.count; j += R)
    score_block<Math, R, W>(chunk.k + j, q, width, depth, s + int64_t(j) * width);
}

template <class Math>
void score_tile(const Chunk& chunk, const typename Math::Element* q, int width, int depth, float* s) {
  for (int lane = 0; lane < width;) {
    const int vectors = std::min(kMaxVectors, (width - lane) / kLanes);
    switch (vectors) {
      case 1: score_columns<Math, 1>(chunk, q + lane, width, depth, s + lane); break;
#if defined(__AVX2__) && !defined(__AVX512F__)
      default: score_columns<Math, 2>(chunk, q + lane, width, depth, s + lane); break;
#else
      case 2: score_columns<Math, 2>(chunk, q + lane, width, depth, s + lane); break;
      case 3: score_columns<Math, 3>(chunk, q + lane, width, depth, s + lane); break;
      default: score_columns<Math, 4>(chunk, q + lane, width, depth, s + lane); break;
#endif
    }
    lane += vectors * kLanes;
  }
}

template <class Math, int W>
void value_columns(const typename Math::Element* p, int width, int count, const typename Math::Element* v, int64_t step,
                   const float* const* v_rows, int d_v, const float* keep, float* out) {
  constexpr int R = block_rows(W);
  int c = 0;
  auto block = [&](auto rows) {
    constexpr int n = decltype(rows)::value;
    for (; c + n <= d_v; c += n)
      value_block<Math, n, W>(p, width, count, v, step, v_rows, c, keep, out + int64_t(c) * width);
  };
  block(std::integral_constant<int, R>());
  block(std::integral_constant<int, 4>());
  block(std::integral_constant<int, 1>());
}

template <class Math>
void value_tile(const typename Math::Element* p, int width, int count, const typename Math::Element* v, int64_t step,
                const float* const* v_rows, int d_v, const float* keep, float* out) {
  for (int lane = 0; lane < width;) {
    const int vectors = std::min(kMaxVectors, (width - lane) / kLanes);
    switch (vectors) {
      case 1: value_columns<Math, 1>(p + lane, width, count, v, step, v_rows, d_v, keep + lane, out + lane); break;
#if defined(__AVX2__) && !defined(__AVX512F__)
      default: value_columns<Math, 2>(p + lane, width, count, v, step, v_rows, d_v, keep + lane, out + lane); break;
#else
      case 2: value_columns<Math, 2>(p + lane, width, count, v, step, v_rows, d_v, keep + lane, out + lane); break;
      case 3: value_columns<Math, 3>(p + lane, width, count, v, step, v_rows, d_v, keep + lane, out + lane); break;
      default: value_columns<Math, 4>(p + lane, width, count, v, step, v_rows, d_v, keep + lane, out + lane); break;
#endif
    }
    lane += vectors * kLanes;
  }
}

}  // namespace heed::HEED_ISA
