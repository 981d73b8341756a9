// The recurrence's arguments on the device.
#pragma once
#include "kernels/cuda/device.cuh"

namespace heed::cuda {

struct RecurView {
  Matrix q, k, v, g, a, b;
  Segments qs, ks, vs;
  const float *beta, *state, *z;
  int64_t state_stride[3];
  int64_t z_stride;
  int d, d_v;
  Recur::Decay decay;
  Recur::Correction correction;
  bool normalise;
  float scale;

  __device__ float decay_at(int64_t row, int c) const {
    if (decay == Recur::Decay::None) return 1;
    return expf(decay == Recur::Decay::Scalar ? g.get(row) : g.get(row, c));
  }
  __device__ float state_at(int segment, int i, int c) const {
    return state ? state[segment * state_stride[0] + i * state_stride[1] + c * state_stride[2]] : 0.0f;
  }
};

struct RecurOut {
  float* out;
  int64_t out_stride;
  float* state;
  int64_t state_stride[3];
};

/// Error(Invalid) for what does not fit, Error(Unsupported) for d > 256.
RecurView recur_view(const char* where, const RecurInputs& in, const Recur& how);

}  // namespace heed::cuda
