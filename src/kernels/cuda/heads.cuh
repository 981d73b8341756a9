// A head's row on its way from a product to where it is read: its norm and rotation.
#pragma once
#include "kernels/cuda/device.cuh"

namespace heed::cuda {

/// Where a part (queries, keys or values) of all tokens comes from, as Heads has it.
struct HeadRows {
  const float* x;
  int64_t token_stride, head_stride;
  int heads, d;
  const float* norm;
  RopeView rope;
  const int32_t* positions;
  int64_t position_stride;  // 0: one position a token
  __device__ const float* row(int64_t t, int head) const { return x + t * token_stride + head * head_stride; }
  __device__ int position(int64_t t, int head) const {
    return positions[position_stride ? t * position_stride + head : t];
  }
};

/// Calls put(channel, number) for each of a row, by a warp.
template <class Put>
__device__ inline void put_row(const HeadRows& part, int64_t t, int head, float eps, Put put) {
  const int lane = threadIdx.x % 32;
  const float* x = part.row(t, head);
  float factor = 1;
  if (part.norm) {
    float squares = 0;
    for (int c = lane; c < part.d; c += 32) squares += x[c] * x[c];
    factor = 1 / sqrtf(warp_sum(squares) / float(part.d) + eps);
  }
  const auto value = [&](int c) { return part.norm ? x[c] * factor * part.norm[c] : x[c]; };
  const RopeView& rope = part.rope;
  const int turned = rope.inv_freq ? rope.dims : 0;
  if (turned) {
    const int position = part.position(t, head);
    for (int pair = lane; pair < turned / 2; pair += 32) {
      const int first = rope.first(pair), second = rope.second(pair);
      float u = value(first), v = value(second);
      turn(u, v, float(position) * rope.inv_freq[pair]);
      put(first, u);
      put(second, v);
    }
  }
  for (int c = turned + lane; c < part.d; c += 32) put(c, value(c));
}

/// What split_heads asks of a part of so many tokens. Error(Invalid).
HeadRows head_rows(const char* where, const Heads& part, int64_t tokens);

}  // namespace heed::cuda
