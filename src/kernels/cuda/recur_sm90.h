// The recurrence on Hopper's tensor cores, without heed's queue: what recur.cu hands to recur_sm90.cu.
#pragma once
#include "kernels/cuda/recur.cuh"

namespace heed::cuda {

/// Whether recur_sm90 takes this call (the device is asked by the caller): 32 < d ≤ 128, no normaliser, no low-rank
/// correction, and segments that may have 16 rows or more.
bool recur_sm90_fits(const RecurView&, int64_t bound);
/// Bytes of scratch memory that recur_sm90 needs. `rows`: of q.values; `bound`: most rows of a segment.
int64_t recur_sm90_scratch(const RecurView&, int64_t rows, int64_t bound);
/// Starts the kernels on the stream. Precondition: recur_sm90_fits. Segments lie one behind the other in q's rows.
cudaError_t recur_sm90(const RecurView&, const RecurOut&, int64_t rows, int64_t bound, void* scratch, cudaStream_t);

/// The same for rows of bf16 that the copy engine can read, but for a decay of each channel together with the delta rule
/// (recur_sm90_direct.cu).
/// Precondition of the other two: recur_sm90_fits, recur_sm90_direct_fits.
bool recur_sm90_direct_fits(const RecurView&, int64_t rows);
int64_t recur_sm90_direct_scratch(const RecurView&, int64_t rows, int64_t bound);
cudaError_t recur_sm90_direct(const RecurView&, const RecurOut&, int64_t rows, int64_t bound, void* scratch, cudaStream_t);

/// One row, or a few, a segment: the states are read once and written once. Columns of states lie next to each other.
bool recur_step_fits(const RecurView&, const RecurOut&, int64_t bound);
cudaError_t recur_step(const RecurView&, const RecurOut&, int64_t bound, bool on_hopper, cudaStream_t);

}  // namespace heed::cuda
