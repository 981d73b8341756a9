// Dot products by halves of warps: sixteen lanes share a row, eight channels each; several rows and queries are summed at once.
#pragma once
#include "kernels/cuda/device.cuh"

namespace heed::cuda {

/// Sums of the first N numbers of x over 16 lanes: lane i of them is left with that of number i · N / 16. (A loop over N kept x
/// in local memory.)
template <int N, int Far = 8, int All>
__device__ float spread_sums(float (&x)[All], int lane) {
  if constexpr (N > 1) {
    const bool upper = lane & Far;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float sent = upper ? x[i] : x[i + N / 2], kept = upper ? x[i + N / 2] : x[i];
      x[i] = kept + __shfl_xor_sync(~0u, sent, Far);
    }
    return spread_sums<N / 2, Far / 2>(x, lane);
  } else if constexpr (Far > 0) {
    x[0] += __shfl_xor_sync(~0u, x[0], Far);
    return spread_sums<1, Far / 2>(x, lane);
  } else {
    return x[0];
  }
}

/// Eight numbers of a row, 16-byte aligned: asked for, and unpacked when they are there.
template <class T> struct Eight {
  uint4 words[sizeof(T) / 2];
  __device__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 2); ++i) words[i] = reinterpret_cast<const uint4*>(from)[i];
  }
  __device__ void get(float (&x)[8]) const {
    if constexpr (sizeof(T) == 2) {
      unpack8<T>(words[0], x);
    } else {
      const uint4 &a = words[0], &b = words[1];
      const uint32_t bits[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = __uint_as_float(bits[i]);
    }
  }
};

/// Rows of queries in shared memory, `row` floats each (a multiple of 128 that holds them): the first four channels of every eight
/// lie before the other ones, so that sixteen lanes read theirs without conflicts.
struct SharedQueries {
  float4* rows;
  int row;
  __device__ void put(int r, int c, float x) const {
    reinterpret_cast<float*>(rows)[r * row + c / 8 * 4 + c % 4 + (c % 8 >= 4 ? row / 2 : 0)] = x;
  }
  /// Channels c … c + 7, c a multiple of 8.
  __device__ void get(int r, int c, float (&x)[8]) const {
    const float4 a = rows[r * (row / 4) + c / 8], b = rows[r * (row / 4) + c / 8 + row / 8];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
  }
};

}  // namespace heed::cuda
