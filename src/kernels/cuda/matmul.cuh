// The forms of matmul.
#pragma once
#include "kernels/cuda/weights.cuh"

namespace heed::cuda {

/// What products of few tokens are asked besides.
struct How {
  const Norm* norm = nullptr;       // of x
  const Activation* glu = nullptr;  // act(y[0]) · y[1] → y[0]
  bool weights = false;             // nothing that is under way writes the matrices
};

/// y (+)= x · w^T + bias of each, for a few tokens (x F32): each weight is read once for up to 8 of them, matrices of one type
/// in one launch; without glu (matmul_few.cu).
void matmul_few(Queue& queue, std::span<const Linear> each, const Tensor& x, const How& how);
/// The same for one token, of weights of one type. False when it can not (matmul_one.cu).
bool matmul_one(Queue& queue, std::span<const Linear> each, const Tensor& x, const How& how);
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

}  // namespace heed::cuda
