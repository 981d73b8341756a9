// What proxy.cu and proxy_mma.cu share.
#pragma once
#include "kernels/cuda/device.cuh"

namespace heed::cuda {

struct Scored {
  Matrix q, k;
  Segments qs, ks;
  Matrix cells;
  Segments at;
  int h, g;
  float scale, softcap;
  bool softmax, causal;
  int q_tile, k_tile;
  int64_t offset;
  int64_t q_rows, k_rows;  // of all segments

  /// The segment of k that segment s of q meets.
  __device__ int keys_of(int s) const { return s / h * g + s % h * g / h; }
  /// Row i sees column j when some query of its tile sees some key of the block.
  __device__ bool hidden(int i, int j) const {
    return causal && int64_t(j) * k_tile > offset + int64_t(i + 1) * q_tile - 1;
  }
  __device__ float score(float dot) const {
    const float x = scale * dot;
    return softcap > 0 ? softcap * tanhf(x / softcap) : x;
  }
};

/// Fills the cells by products on the tensor cores, of f32 numbers as two of bf16 each (some 2^-17 of a product is lost); false,
/// having done nothing, for what it does not take.
bool proxy_mma(Queue&, const Scored&);

}  // namespace heed::cuda
