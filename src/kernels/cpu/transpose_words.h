// Squares of 32-bit words, transposed in registers.
#pragma once
#include "kernels/cpu/simd.h"

namespace heed::HEED_ISA {

#if defined(__x86_64__)
using Lane = __m256;
inline constexpr int kSquare = 8;
HEED_INLINE Lane load_lane(const float* p) { return _mm256_loadu_ps(p); }
HEED_INLINE void store_lane(float* p, Lane x) { _mm256_storeu_ps(p, x); }
HEED_INLINE void transpose(Lane r[kSquare]) {
  Lane t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
#else
using Lane = float32x4_t;
inline constexpr int kSquare = 4;
HEED_INLINE Lane load_lane(const float* p) { return vld1q_f32(p); }
HEED_INLINE void store_lane(float* p, Lane x) { vst1q_f32(p, x); }
HEED_INLINE void transpose(Lane r[kSquare]) {
  const float32x4x2_t a = vtrnq_f32(r[0], r[1]), b = vtrnq_f32(r[2], r[3]);
  r[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
  r[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
  r[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
  r[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}
#endif

/// out [16][16 words] = in [16][16 words]^T; strides in words.
HEED_INLINE void transpose_words(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride) {
  for (int a = 0; a < 16; a += kSquare)
    for (int b = 0; b < 16; b += kSquare) {
      Lane square[kSquare];
      for (int i = 0; i < kSquare; ++i)
        square[i] = load_lane(reinterpret_cast<const float*>(in + (a + i) * in_stride + b));
      transpose(square);
      for (int i = 0; i < kSquare; ++i) store_lane(reinterpret_cast<float*>(out + (b + i) * out_stride + a), square[i]);
    }
}

}  // namespace heed::HEED_ISA
