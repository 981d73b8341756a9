// Decode attention over pages of bf16: what the kernel of attend_store_sm90.cu takes, without heed's views.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace heed::sm90 {

/// All pointers are device memory; conventions are those of kernels.h and pages.h. Pages start at multiples of 16 bytes.
struct AttendStore {
  const void* q = nullptr;  // f32 or bf16 rows, at multiples of 16 bytes
  bool q_f32 = false;
  int64_t q_stride = 0;
  const int64_t *q_begin = nullptr, *q_end = nullptr;
  int sequences = 0, heads = 1, kv_heads = 1, d = 0, d_v = 0;
  const uint64_t* table = nullptr;
  int64_t capacity = 0;
  const int32_t* length = nullptr;
  int64_t k_at = 0, v_at = 0, bias_at = -1;
  float scale = 0;
  bool causal = true;
  const float* sink = nullptr;
  float* out = nullptr;
  int64_t out_stride = 0;
  float* lse = nullptr;
  // Blocks of k_tile entries (16, 32 or 64); k_tile 0: every entry. One plan row for each (sequence with rows, scope head).
  int k_tile = 0, plan_heads = 1;
  const int64_t* rowptr = nullptr;
  const int32_t *count = nullptr, *index = nullptr;
};

bool attend_store_fits(const AttendStore&);
int64_t attend_store_scratch(const AttendStore&);
/// Precondition: attend_store_fits.
cudaError_t attend_store_launch(const AttendStore&, void* scratch, cudaStream_t);

}  // namespace heed::sm90
