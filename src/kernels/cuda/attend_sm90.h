// Exact attention on Hopper's tensor cores: what the kernels of attend_sm90.cu and attend_store_sm90.cu take, without heed's views.
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
  int segments = 0, heads = 1, kv_heads = 1, v_heads = 1;  // segments: of q; kv_heads: of k
  int d = 0, d_v = 0;
  float scale = 0;
  bool causal = true;
  int window = 0;
  const int32_t *q_pos = nullptr, *k_pos = nullptr;  // for the window alone
  const int32_t *k_map = nullptr, *v_map = nullptr;
  const float* sink = nullptr;
  float* out = nullptr;
  int64_t out_stride = 0;
  float* lse = nullptr;
  // A block plan; k_tile 0: every key. With `halves` a mask has words for the upper 64 rows of a tile and for the lower
  // (pair_rows, blocks_of_ranges), else for each of q_tile rows.
  int q_tile = 0, k_tile = 0, plan_heads = 1;
  bool halves = false;
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

/// Gradients of it, likewise. A sequence's heads have equally many rows.
struct AttendBackward {
  const __nv_bfloat16 *q = nullptr, *k = nullptr, *v = nullptr;
  const float *out = nullptr, *lse = nullptr, *d_out = nullptr;
  int64_t q_rows = 0, k_rows = 0, v_rows = 0;
  int64_t q_stride = 0, k_stride = 0, v_stride = 0, out_stride = 0, d_out_stride = 0;
  const int64_t *q_begin = nullptr, *q_end = nullptr;
  const int64_t *k_begin = nullptr, *k_end = nullptr, *v_begin = nullptr;
  int segments = 0, heads = 1, kv_heads = 1;  // segments: of q; kv_heads: of k and v
  int d = 0;                                  // of queries, keys and values
  float scale = 0;
  bool causal = true;
  int window = 0;  // counts keys
  float *d_q = nullptr, *d_k = nullptr, *d_v = nullptr;
  int64_t d_q_stride = 0, d_k_stride = 0, d_v_stride = 0;
  float* out_dot = nullptr;  // or null; row: Σ out · d_out
};

bool attend_backward_fits(const AttendBackward&);
int64_t attend_backward_scratch(const AttendBackward&);
/// Precondition: attend_backward_fits.
cudaError_t attend_backward_launch(const AttendBackward&, void* scratch, cudaStream_t);

/// Decode attention over pages of bf16, likewise. Pages start at multiples of 16 bytes.
struct AttendStore {
  const void* q = nullptr;  // f32 or bf16 rows, at multiples of 16 bytes
  bool q_f32 = false;
  int64_t q_stride = 0;
  const int64_t *q_begin = nullptr, *q_end = nullptr;
  int sequences = 0, heads = 1, kv_heads = 1, d = 0, d_v = 0;
  const uint64_t* table = nullptr;
  int64_t capacity = 0;
  const int32_t* length = nullptr;
  int64_t k_at = 0, v_at = 0, bias_at = -1, position_at = 0;
  float scale = 0;
  bool causal = true;
  int window = 0;
  const int32_t* q_pos = nullptr;
  const float* sink = nullptr;
  float* out = nullptr;
  int64_t out_stride = 0;
  float* lse = nullptr;
  // Blocks of k_tile entries (a divisor of 64); k_tile 0: every entry. One plan row for each (sequence with rows, scope head).
  int k_tile = 0, plan_heads = 1;
  const int64_t* rowptr = nullptr;
  const int32_t *count = nullptr, *index = nullptr;
  int* arrived = nullptr;  // 512 zeros, which the kernel leaves as zeros; null: in scratch, cleared by a launch of their own
};

bool attend_store_fits(const AttendStore&);
int64_t attend_store_scratch(const AttendStore&);
/// Precondition: attend_store_fits.
cudaError_t attend_store_launch(const AttendStore&, void* scratch, cudaStream_t);

}  // namespace heed::sm90

namespace heed {
struct Mods;
struct Pages;
struct Plan;
struct Queue;
struct Ragged;
struct Read;
struct Tensor;
}  // namespace heed

namespace heed::cuda {

struct AttentionView;

/// As attend, attend_backward and attend_store of kernels.h, on a GPU of compute capability 9.0. They return false, having done nothing, for what
/// has no fast kernel here; arguments have been checked by the caller.
bool attend_sm90(Queue&, const AttentionView&, const Ragged& q, const Ragged& k, const Ragged& v, const Plan&,
                 const Mods&, Tensor out, Tensor lse);
bool attend_backward_sm90(Queue&, const Ragged& q, const Ragged& k, const Ragged& v, const Plan&, const Mods&, Tensor out,
                          Tensor lse, Tensor d_out, Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_key_bias, Tensor d_gain);
bool attend_store_sm90(Queue&, const Ragged& q, const Pages&, const Read&, const Mods&, Tensor out, Tensor lse);

/// Makes of a plan of `rows` rows and at most `entries` entries, tiles of 64 rows and no masks, lists for tiles of 128, in scratch.
void pair_rows(Queue&, int64_t rows, int64_t entries, sm90::Attend&);
/// Makes of a plan of intervals, tiles of 64 rows or multiples of 128, lists of blocks of 64 keys for tiles of 128, in
/// scratch. False where they might be more than kMostBlocks.
bool blocks_of_ranges(Queue&, const AttentionView&, const Plan&, sm90::Attend&);
constexpr int64_t kMostBlocks = int64_t(1) << 28;

}  // namespace heed::cuda
