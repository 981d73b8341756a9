// The forms of attend, and what they write to.
#pragma once
#include "kernels/cuda/attention.cuh"

namespace heed::cuda {

struct AttendOut {
  float* out;
  int64_t part_stride, row_stride;
  float* lse;  // may be null
  int64_t lse_part, lse_row;
};

/// Every type, plan and mod, in f32 (attend_plain.cu).
void attend_plain(Queue& queue, const AttentionView& a, const AttendOut& to);

}  // namespace heed::cuda
