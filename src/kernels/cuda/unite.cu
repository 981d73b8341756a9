// unite: the keys that tiles of queries read, as ranges.
#include "kernels/cuda/key_bits.cuh"

namespace heed::cuda {
namespace {

struct ListsView {
  const int32_t *index, *count;
  int64_t capacity;
  __device__ int length(int64_t list) const { return index ? count[list] : 0; }
  __device__ int at(int64_t list, int i) const { return index[list * capacity + i]; }
};

struct Union {
  Segments qs, ks;
  int tile, block;
  const int32_t *sinks, *local;
  ListsView keys, distances, blocks;
  const int64_t* rowptr;
  int32_t *index, *count;
};

/// Grid: tiles, segments of q.
__global__ void __launch_bounds__(kBitThreads) unite_kernel(const __grid_constant__ Union a) {
  __shared__ KeyBits bits;
  const int s = blockIdx.y, h = a.qs.heads, sequence = s / h, n = a.qs.length(s), tiles = (n + a.tile - 1) / a.tile;
  if (int(blockIdx.x) >= tiles) return;
  const int m = a.ks.length(sequence * a.ks.heads + s % h * a.ks.heads / h);
  int64_t row = int64_t(s % h) * tiles + blockIdx.x;
  for (int other = 0; other < sequence; ++other) row += int64_t(h) * ((a.qs.length(other * h) + a.tile - 1) / a.tile);
  const int first_query = m - n + int(blockIdx.x) * a.tile, limit = min(first_query + a.tile, m);
  const int64_t begin = a.rowptr[row], room = a.rowptr[row + 1] - begin;
  int starts_before = 0, ends_before = 0;
  bool open = false;  // the last key of the chunk before is in
  for (int first = 0; first < limit; first += kBitKeys) {
    const int last = min(limit, first + kBitKeys);
    bits.clear(last - first);
    __syncthreads();
    // Keys from … to − 1, those in the chunk, by one thread or by all.
    auto set = [&](int from, int to, int thread, int threads) {
      from = max(from, first), to = min(to, last);
      if (from < to) bits.set(from - first, to - first, thread, threads);
    };
    if (a.sinks) set(0, a.sinks[s], threadIdx.x, kBitThreads);
    if (a.local && a.local[s] > 0) set(first_query - a.local[s] + 1, limit, threadIdx.x, kBitThreads);
    for (int i = threadIdx.x; i < a.keys.length(s); i += kBitThreads) set(a.keys.at(s, i), a.keys.at(s, i) + 1, 0, 1);
    for (int i = threadIdx.x; i < a.distances.length(s); i += kBitThreads) {
      const int distance = a.distances.at(s, i);
      set(first_query - distance, limit - distance, 0, 1);
    }
    for (int i = threadIdx.x; i < a.blocks.length(row); i += kBitThreads) {
      const int64_t from = int64_t(a.blocks.at(row, i)) * a.block;
      if (from < last) set(int(from), int(min(from + a.block, int64_t(last))), 0, 1);
    }
    __syncthreads();
    const BitWords own = bits.own(last - first);
    uint32_t before = threadIdx.x == 0 ? open : bits.word(threadIdx.x * kBitOwn - 1) >> 31;
    if (int(threadIdx.x) * 32 * kBitOwn > last - first) before = 0;
    uint32_t starts[kBitOwn], ends[kBitOwn];
    int start_count = 0, end_count = 0;
#pragma unroll
    for (int w = 0; w < kBitOwn; ++w) {
      const uint32_t shifted = own.x[w] << 1 | before;
      starts[w] = own.x[w] & ~shifted, ends[w] = shifted & ~own.x[w];
      start_count += __popc(starts[w]), end_count += __popc(ends[w]);
      before = own.x[w] >> 31;
    }
    int all_starts, all_ends;
    int64_t start = begin + starts_before + bit_prefix(start_count, all_starts),
            end = begin + ends_before + bit_prefix(end_count, all_ends);
    const int key = first + int(threadIdx.x) * 32 * kBitOwn;
#pragma unroll
    for (int w = 0; w < kBitOwn; ++w) {
      for (uint32_t left = starts[w]; left; left &= left - 1, ++start)
        if (start - begin < room) a.index[2 * start] = key + 32 * w + __ffs(int(left)) - 1;
      for (uint32_t left = ends[w]; left; left &= left - 1, ++end)
        if (end - begin < room) a.index[2 * end + 1] = key + 32 * w + __ffs(int(left)) - 1;
    }
    starts_before += all_starts, ends_before += all_ends;
    open = starts_before > ends_before;
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  if (open && ends_before < room) a.index[2 * (begin + ends_before) + 1] = limit;
  a.count[row] = int32_t(min(int64_t(starts_before), room));
}

ListsView lists_view(const KeyLists& lists) {
  return {lists.index.as<int32_t>(), lists.count.as<int32_t>(), lists.capacity};
}

}  // namespace

void unite(Queue& queue, const Ragged& q, const Ragged& k, const KeySets& sets, const Plan& out) {
  constexpr const char* where = "unite";
  check_union(where, q, k, sets, out);
  const Union a{segments(q),
                segments(k),
                sets.tile,
                sets.block,
                sets.sinks.as<int32_t>(),
                sets.local.as<int32_t>(),
                lists_view(sets.keys),
                lists_view(sets.distances),
                lists_view(sets.blocks),
                out.rowptr.as<int64_t>(),
                out.index.as<int32_t>(),
                out.count.as<int32_t>()};
  const int64_t most = ceil_div(out.rows(), std::max<int64_t>(1, q.heads));  // no head has more tiles
  launch(queue, where, unite_kernel, dim3(unsigned(most), unsigned(q.segments())), kBitThreads, 0, a);
}

}  // namespace heed::cuda
