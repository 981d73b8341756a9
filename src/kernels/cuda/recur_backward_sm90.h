// The recurrence's gradient on Hopper's tensor cores, without heed's queue: what recur_backward.cu hands to
// recur_backward_sm90.cu.
#pragma once
#include "kernels/cuda/recur.cuh"

namespace heed::cuda {

/// Gradients, each the shape of what it is the gradient of, and what they come from; empty: not wanted, or zero.
struct RecurBackward {
  Matrix d_out;
  const float* d_state;
  int64_t d_state_stride[3];
  Matrix q, k, v, g, a, b;
  float* beta;
  float* state;
  int64_t state_stride[3];
};

/// Whether recur_backward_sm90 takes this call (the device is asked by the caller): rows of bf16 that the copy engine can
/// read, 32 < d ≤ 128, d_v ≤ 128, at most one decay a row, no normaliser, no low-rank correction.
/// Operands are one bf16 each: states, pseudo-values and products of rows are rounded once before they are multiplied, which
/// makes an error of some 2^-9 of a gradient's norm. Sums are f32.
bool recur_backward_sm90_fits(const RecurView&, const RecurBackward&, int64_t rows, int64_t bound);
/// Bytes of scratch memory that it needs. `rows`: of q.values; `bound`: most rows of a segment.
int64_t recur_backward_sm90_scratch(const RecurView&, int64_t rows);
/// Starts the kernels on the stream. Precondition: it fits. Segments lie one behind the other in q's rows.
cudaError_t recur_backward_sm90(const RecurView&, const RecurBackward&, int64_t rows, int64_t bound, void* scratch,
                                cudaStream_t stream);

}  // namespace heed::cuda
