// The forms of matmul.
#pragma once
#include "kernels/cuda/weights.cuh"

namespace heed::cuda {

/// What products of one token are asked besides.
struct How {
  const Norm* norm = nullptr;       // of x
  const Activation* glu = nullptr;  // act(y[0]) · y[1] → y[0]
  bool weights = false;             // nothing that is under way writes the matrices
};

/// Matrices of one type that are multiplied in one launch, at most.
constexpr int kMostAtOnce = 3;
/// y (+)= x · w^T + bias of each, of weights of one type, quantised or of 16 bits, for one token (x F32). False when it can
/// not: rows of weights that are not aligned, or x too long for shared memory (matmul_one.cu).
bool matmul_one(Queue& queue, std::span<const Linear> each, const Tensor& x, const How& how);
/// The same of block-quantised weights, for up to 16 tokens that are normed already (matmul_few.cu).
bool matmul_few(Queue& queue, std::span<const Linear> each, const Matrix& x, int64_t tokens);
/// The same of other weights, which are read once for up to 8 tokens. Takes any rows (matmul_rows.cu).
void matmul_rows(Queue& queue, std::span<const Linear> each, const Matrix& x, int64_t tokens);
/// The same in f32 for F32 weights and many tokens (matmul_plain.cu).
void matmul_plain(Queue& queue, const Tensor& w, const Tensor& x, const Tensor& bias, bool accumulate, const Tensor& y);
/// Many tokens: x normed and rounded to bf16 once for all matrices, panels of each in bf16, multiplied by cuBLASLt where that
/// is installed (matmul_many.cu). y F32, or BF16 without bias or add.
void matmul_many(Queue& queue, std::span<const Linear> each, const Tensor& x, const Norm* norm);

/// Rows of x, normed where there is a norm → to (F32 or BF16, aligned), 0 in columns past x's (rms_norm.cu).
void norm_rows(Queue& queue, const char* where, const Tensor& x, const Tensor& weight, float eps, const Matrix& to);

/// y [T, out] = x [T, in] · w [out, in]^T (+ y), all rows `width` bf16 (a multiple of 8, 16-byte aligned); y f32 or bf16.
struct Panel {
  const __nv_bfloat16 *x, *w;
  int64_t x_stride, w_stride;
  Matrix y;  // of `outputs` columns, or more
  int tokens, outputs, width;
  bool add;  // to what y holds; otherwise y is not read
};
/// Through cuBLASLt; false when that is not installed or has no way to do it (cublas.cu).
bool multiply_with_cublas(Queue& queue, const Panel& panel);
/// Our own (matmul_tile.cu).
void multiply_tiles(Queue& queue, const Panel& panel);

/// Four numbers of a run of 32 that eight lanes round to 8 bits. Sums are of the rounded activations, as the products of codes
/// are: an error of rounding then meets the weight, small and of either sign, and not its code from 0 to 15. Decoding SmolLM2
/// (Q4_1), logits were 0.23 to 0.42 (rms) from a CPU's with sums of x and are 0.12 to 0.20 with these, as two kinds of CPU
/// are from each other.
struct RoundedFour {
  uint32_t codes;
  float scale, half, all;  // the run's scale, and scale times the sum of codes of its half and of the run
};
__device__ inline RoundedFour round_four(float4 v) {
  const float most = warp_max(fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))), 8);
  const float by = most > 0 ? __fdividef(127, most) : 0, scale = most * (1.0f / 127);
  const int c0 = __float2int_rn(v.x * by), c1 = __float2int_rn(v.y * by), c2 = __float2int_rn(v.z * by),
            c3 = __float2int_rn(v.w * by);
  const int half = warp_sum(c0 + c1 + c2 + c3, 4), all = half + __shfl_xor_sync(~0u, half, 4);
  return {uint32_t((c0 & 255) | (c1 & 255) << 8 | (c2 & 255) << 16 | c3 << 24), scale, scale * float(half),
          scale * float(all)};
}

/// 16 bytes to shared memory without waiting; of `from` only the first `bytes` are read, the rest are zeros.
__device__ inline void copy16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))),
               "l"(from), "r"(bytes)
               : "memory");
}

}  // namespace heed::cuda
