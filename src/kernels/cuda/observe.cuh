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

/// What observe makes of each key, and where that goes. `heads`: LayerMean is the group's sum here.
struct ObservedColumns {
  Matrix values;
  Segments at;
  int64_t bound;  // rows that segments lie in
  const float* lse;
  Observe::Rows rows;
  Observe::Heads heads;
  float decay;
  bool logits;
};

/// Whether the kernels of observe_mma.cu take this attention.
bool observes_on_tensor_cores(const AttentionView& a);
/// Not of decayed logits.
void observe_mma(Queue& queue, const AttentionView& a, const ObservedColumns& to);
/// lse [shares, q's rows], of share_keys keys each; the last has what is left.
void row_lse_mma(Queue& queue, const AttentionView& a, int64_t share_keys, int shares, float* lse);

/// Logits of the last row over pages of plain keys (observe_last.cu); false, having done nothing, for all else.
bool observe_last(Queue& queue, const Ragged& q, const Keys& keys, const Plan* plan, const Mods& mods,
                  const Observe& how, const Ragged& columns);
/// The same in a run for each query head.
bool observe_last_runs(Queue& queue, const Ragged& q, const Keys& keys, const Mods& mods, const Ragged& runs);

/// lse of every query row, over all parts of the plan (observe_rows.cu).
void row_lse(Queue& queue, const AttentionView& a, float* lse);

}  // namespace heed::cuda
