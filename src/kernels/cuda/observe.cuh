// The keys that an observation is of.
#pragma once
#include "kernels/cuda/attention.cuh"

namespace heed::cuda {

/// Keys from a panel or, unpacked into scratch, from pages; with the mods that go with them. Scratch must outlive it.
struct Observed {
  Ragged k;
  Mods mods;
  Observed(Queue& queue, const char* where, const Keys& keys, const Mods& given);
};

/// lse of every query row, over all parts of the plan (observe_rows.cu).
void row_lse(Queue& queue, const AttentionView& a, float* lse);

}  // namespace heed::cuda
