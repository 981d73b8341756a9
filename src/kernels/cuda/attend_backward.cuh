// The forms of attend_backward.
#pragma once
#include "kernels/cuda/attention.cuh"

namespace heed::cuda {

struct Gradients {
  Matrix q, d_out;             // q: attend_backward_mma's own, in bf16
  const float *lse, *out_dot;  // out_dot: Σ out · d_out of a row
  Matrix d_q, d_k, d_v;
  float* d_key_bias;  // or null
};

/// On the tensor cores; false when this attention is not for them (attend_backward_mma.cu).
bool attend_backward_mma(Queue& queue, const AttentionView& a, Gradients gradients);

}  // namespace heed::cuda
