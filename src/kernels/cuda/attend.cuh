// The forms of attend, and what they write to.
#pragma once
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/page.cuh"

namespace heed::cuda {

struct AttendOut {
  float* out;
  int64_t part_stride, row_stride;
  float* lse;  // may be null
  int64_t lse_part, lse_row;
};
/// Checks out and lse (Error(Invalid)).
AttendOut attend_out(const char* where, const Plan& plan, int64_t rows, int64_t d_v, const Tensor& out, const Tensor& lse);

/// Keys in equal shares, so that a few rows over many keys fill the device.
struct KeyShares {
  int shares;
  int64_t keys;  // of a share, Dense; the last takes what is left
};

constexpr int kMmaRows = 64;  // of a block
/// Whether attend_mma takes this attention.
bool attends_on_tensor_cores(const AttentionView& a);
/// Rows in tiles of kMmaRows; grid along z: shares of the keys, then parts (attend_mma.cu).
void attend_mma(Queue& queue, const AttentionView& a, const RowTiles& tiles, dim3 grid, const KeyShares& split,
                const AttendOut& to);

/// Every type, plan and mod: on the tensor cores where they take it, else in f32 (attend_plain.cu).
void attend_plain(Queue& queue, const AttentionView& a, const AttendOut& to);
/// The same over pages; a's keys and values name segments of at most `most_keys` entries and are not read.
void attend_pages(Queue& queue, const AttentionView& a, const PagesView& pages, const RopeView& rope,
                  const ReadPlaces& places, int64_t most_keys, const AttendOut& to);

}  // namespace heed::cuda
