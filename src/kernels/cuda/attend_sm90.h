// Exact attention on Hopper's tensor cores: what the kernel of attend_sm90.cu takes, without heed's views.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace heed::sm90 {

/// All pointers are device memory; conventions are those of kernels.h. Rows of q, k, v start at multiples of 16 bytes.
struct Attend {
  const __nv_bfloat16 *q = nullptr, *k = nullptr, *v = nullptr;
  int64_t q_rows = 0, k_rows = 0, v_rows = 0;        // rows the tensors have
  int64_t q_stride = 0, k_stride = 0, v_stride = 0;  // elements from row to row
  const int64_t *q_begin = nullptr, *q_end = nullptr;
  const int64_t *k_begin = nullptr, *k_end = nullptr, *v_begin = nullptr;
  int segments = 0, heads = 1, kv_heads = 1;  // segments: of q
  int d = 0, d_v = 0;
  float scale = 0;
  bool causal = true;
  int window = 0;
  const int32_t *k_map = nullptr, *v_map = nullptr;
  const float* sink = nullptr;
  float* out = nullptr;
  int64_t out_stride = 0;
  float* lse = nullptr;
  // A block plan; k_tile 0: every key.
  int q_tile = 0, k_tile = 0, plan_heads = 1;
  const int64_t* rowptr = nullptr;
  const int32_t *count = nullptr, *index = nullptr, *mask = nullptr;
  const uint64_t* bits = nullptr;
};

/// Whether a kernel for these widths, tiles and strides exists (the device is asked by the caller).
bool attend_fits(const Attend&);
/// Bytes of scratch memory that attend_launch needs.
int64_t attend_scratch(const Attend&);
/// Starts the kernels on the stream. Precondition: attend_fits.
cudaError_t attend_launch(const Attend&, void* scratch, cudaStream_t);

}  // namespace heed::sm90
