#include "kernels/cuda/device.cuh"

namespace heed::cuda {
namespace {

struct TileLists {
  const int32_t *index, *count;
  int64_t capacity;
  const int64_t* first;
  int split, q_tile;
  const int64_t* rowptr;
  int32_t *out_index, *out_mask, *out_count;
  uint64_t* bits;
};

constexpr int kLaneRows = 4;

/// One warp a tile; a lane merges rows lane, lane + 32, ….
__global__ void tile_blocks_kernel(const __grid_constant__ TileLists a) {
  constexpr int none = 0x7fffffff;
  const int64_t t = blockIdx.x, begin = a.first[t];
  const int rows = int(a.first[t + 1] - begin), lane = threadIdx.x;
  const int64_t start = a.rowptr[t], room = a.rowptr[t + 1] - start;
  int next[kLaneRows] = {};
  int64_t written = 0;
  auto front = [&](int i) {
    const int r = lane + 32 * i;
    return r < rows && next[i] < a.count[begin + r] ? a.index[(begin + r) * a.capacity + next[i]] : none;
  };
  while (true) {
    int own[kLaneRows], least = none;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) own[i] = front(i), least = min(least, own[i]);
    const int block = __reduce_min_sync(0xffffffffu, least);
    if (block == none || written + a.split > room) break;
    const int64_t mask = (start + written) / a.split;
    int listed = 0;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const bool has = own[i] == block;
      if (lane + 32 * i < a.q_tile) a.bits[mask * a.q_tile + lane + 32 * i] = has ? ~uint64_t(0) : 0;
      next[i] += has;
      listed += __popc(__ballot_sync(0xffffffffu, has));
    }
    for (int i = lane; i < a.split; i += 32) {
      a.out_index[start + written + i] = block * a.split + i;
      a.out_mask[start + written + i] = listed == rows ? -1 : int32_t(mask);
    }
    written += a.split;
  }
  if (lane == 0) a.out_count[t] = int32_t(written);
}

}  // namespace

void tile_blocks(Queue& queue, Tensor index, Tensor count, int64_t capacity, Tensor first, int split, Plan out) {
  constexpr const char* where = "tile_blocks";
  const int64_t tiles = first.size[0] - 1;
  require(split >= 1 && out.q_tile >= 1 && out.q_tile <= 32 * kLaneRows && out.k_tile <= 64, where,
          "tiles of 1…128 queries and 1…64 keys");
  require(index.type == Dtype::I32 && index.numel() >= count.numel() * capacity, where,
          "index is I32 [rows · capacity]");
  require(out.rows() == tiles && out.count && out.mask && out.bits, where,
          "the plan has a row, a count, masks and bits for each tile");
  const TileLists a{index.as<int32_t>(),
                    count.as<int32_t>(),
                    capacity,
                    first.as<int64_t>(),
                    split,
                    out.q_tile,
                    out.rowptr.as<int64_t>(),
                    out.index.as<int32_t>(),
                    out.mask.as<int32_t>(),
                    out.count.as<int32_t>(),
                    out.bits.as<uint64_t>()};
  launch(queue, where, tile_blocks_kernel, dim3(unsigned(tiles)), 32, 0, a);
}

}  // namespace heed::cuda
