// Plans of 64-row tiles for the Hopper kernel, whose tiles are 128 rows: neighbouring rows of a plan become one list, with bit masks
// where only one of the two reads a block.
#include "kernels/cuda/attend_sm90.h"
#include "kernels/cuda/device.cuh"

namespace heed::cuda {
namespace {

struct Merged {
  const int64_t* rowptr;
  const int32_t *count, *index;
  int64_t rows;
  int64_t* to_rowptr;  // [rows + 1]: row r has room for its own blocks and those of row r + 1
  int32_t *to_count, *to_index, *to_mask;
  uint64_t* bits;  // [2][2][words]: the upper half of a tile alone, the lower
  int words;
};

/// One thread a row: it and the next one, whether they are of one head or not. Where they are not the rows that the second
/// would be for do not exist. Rows of odd number are merged for nothing: who begins a tile is known to the schedule alone.
__global__ void merge_rows_kernel(const __grid_constant__ Merged a) {
  const int64_t r = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (r < 4 * a.words) a.bits[r] = r / a.words % 2 == r / a.words / 2 ? ~uint64_t(0) : 0;
  if (r > a.rows) return;
  const int64_t last = a.rowptr[a.rows], begin = a.rowptr[r], next = r < a.rows ? a.rowptr[r + 1] : last;
  a.to_rowptr[r] = begin + next;
  if (r == a.rows) return;
  const int64_t end = a.count ? begin + a.count[r] : next;
  const int64_t other_end = r + 1 == a.rows ? next : a.count ? next + a.count[r + 1] : a.rowptr[r + 2];
  int32_t *index = a.to_index + begin + next, *mask = a.to_mask + begin + next;
  constexpr int none = 0x7fffffff;
  int64_t i = begin, j = next, written = 0;
  int one = i < end ? a.index[i] : none, two = j < other_end ? a.index[j] : none;
  while (one != none || two != none) {
    index[written] = min(one, two);
    mask[written++] = one == two ? -1 : one < two ? 0 : 1;
    const bool first = one <= two, second = two <= one;
    if (first) one = ++i < end ? a.index[i] : none;
    if (second) two = ++j < other_end ? a.index[j] : none;
  }
  a.to_count[r] = int32_t(written);
}

}  // namespace

void pair_rows(Queue& queue, int64_t rows, int64_t entries, sm90::Attend& a) {
  const int words = a.k_tile / 64;
  const auto ints = [&](int64_t count) {
    return queue.scratch.take(Dtype::I32, {std::max<int64_t>(1, count)}).as<int32_t>();
  };
  const Merged to{a.rowptr,
                  a.count,
                  a.index,
                  rows,
                  queue.scratch.take(Dtype::I64, {rows + 1}).as<int64_t>(),
                  ints(rows),
                  ints(2 * entries),
                  ints(2 * entries),
                  queue.scratch.take(Dtype::U64, {4 * words}).as<uint64_t>(),
                  words};
  launch(queue, "attend", merge_rows_kernel, dim3(unsigned(ceil_div(std::max<int64_t>(rows + 1, 4 * words), 64))), 64, 0, to);
  a.rowptr = to.to_rowptr, a.count = to.to_count, a.index = to.to_index, a.mask = to.to_mask, a.bits = to.bits;
}

}  // namespace heed::cuda
