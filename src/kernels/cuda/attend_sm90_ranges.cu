// Plans of key ranges for the Hopper kernel, which reads blocks of 64 keys: of each tile of rows the blocks that hold a key
// of it, with a bit for every key, one word for the upper 64 rows and one for the lower.
#include "kernels/cuda/attend_sm90.h"
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/key_bits.cuh"

namespace heed::cuda {
namespace {

struct Ranges {
  Plan::Scope scope;
  int q_tile, h, g, scope_heads, sequences;
  bool causal;
  Segments qs, ks;
  const int64_t* rowptr;
  const int32_t *count, *index;
  int64_t* to_rowptr;  // [rows]
  int32_t *to_count, *to_index, *to_mask;
  uint64_t* bits;
  unsigned long long* used;  // entries taken of `room`
  int64_t room;
};

/// Keys of the longest segment that the rows of (sequence, scope head) read.
__device__ int longest(const Ranges& a, int sequence, int head) {
  int first = 0, each = 1;  // KV heads
  if (a.scope == Plan::Scope::Layer) each = a.g;
  else first = a.scope == Plan::Scope::KvHead ? head : head * a.g / a.h;
  int out = 0;
  for (int kv = first; kv < first + each; ++kv) out = max(out, a.ks.length(sequence * a.g + kv));
  return out;
}

/// Grid: tiles of rows, (sequence, scope head).
__global__ void __launch_bounds__(kBitThreads) find_blocks_kernel(const __grid_constant__ Ranges a) {
  __shared__ KeyBits bits[2];
  __shared__ unsigned long long base_shared;
  const int sequence = blockIdx.y / a.scope_heads, head = blockIdx.y % a.scope_heads, rows = max(128, a.q_tile);
  const int n = a.qs.length(sequence * a.h), i = blockIdx.x * rows;
  if (i >= n) return;
  int64_t row = i / a.q_tile;
  for (int s = 0; s <= sequence; ++s) {
    const int tiles = (a.qs.length(s * a.h) + a.q_tile - 1) / a.q_tile;
    row += int64_t(s < sequence ? a.scope_heads : head) * tiles;
  }
  const bool two = a.q_tile == 64 && i + 64 < n;
  const int m = longest(a, sequence, head), limit = a.causal ? min(m, m - n + min(i + rows, n)) : m;
  const int chunks = (max(limit, 0) + kBitKeys - 1) / kBitKeys;
  BitWords upper, lower;
  auto fill = [&](int chunk) {
    const int first = chunk * kBitKeys, last = min(limit, first + kBitKeys);
    for (int half = 0; half < 1 + two; ++half) {
      bits[half].clear(last - first);
      __syncthreads();
      const int64_t begin = a.rowptr[row + half], end = a.count ? begin + a.count[row + half] : a.rowptr[row + half + 1];
      for (int64_t e = begin + threadIdx.x; e < end; e += kBitThreads) {
        const int from = max(a.index[2 * e], first), to = min(a.index[2 * e + 1], last);
        if (from < to) bits[half].toggle(from - first), bits[half].toggle(to - first);
      }
    }
    __syncthreads();
    upper = bits[0].between_toggles(last - first);
    lower = two ? bits[1].between_toggles(last - first) : upper;
  };
  auto window = [](const BitWords& words, int w) { return uint64_t(words.x[2 * w + 1]) << 32 | words.x[2 * w]; };
  auto blocks = [&] {
    int out = 0;
    for (int w = 0; w < kBitOwn / 2; ++w) out += (window(upper, w) | window(lower, w)) != 0;
    return out;
  };
  int64_t total = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    fill(chunk);
    int all;
    bit_prefix(blocks(), all);
    total += all;
  }
  if (threadIdx.x == 0) {
    const unsigned long long base = atomicAdd(a.used, static_cast<unsigned long long>(total));
    if (int64_t(base) + total > a.room) __trap();
    a.to_rowptr[row] = int64_t(base), a.to_count[row] = int32_t(total);
    base_shared = base;
  }
  __syncthreads();
  int64_t at = int64_t(base_shared);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    if (chunks > 1) fill(chunk);
    int all;
    int64_t e = at + bit_prefix(blocks(), all);
#pragma unroll
    for (int w = 0; w < kBitOwn / 2; ++w) {
      const uint64_t one = window(upper, w), other = window(lower, w);
      if ((one | other) == 0) continue;
      a.to_index[e] = (chunk * kBitKeys + int(threadIdx.x) * 32 * kBitOwn) / 64 + w;
      a.to_mask[e] = (one & other) == ~uint64_t(0) ? -1 : int32_t(e);
      a.bits[2 * e] = one, a.bits[2 * e + 1] = other;
      ++e;
    }
    at += all;
  }
}

}  // namespace

bool blocks_of_ranges(Queue& queue, const AttentionView& view, const Plan& plan, sm90::Attend& a) {
  const int64_t tiles = ceil_div(view.n_bound, 128) + view.sequences,
                groups = plan.scope == Plan::Scope::QueryHead ? view.h / view.g : 1;
  const int64_t room = tiles * groups * (ceil_div(view.m_bound, 64) + int64_t(view.g) * view.sequences);
  if (room > kMostBlocks) return false;
  const int64_t rows = std::max<int64_t>(1, plan.rows());
  const auto ints = [&](int64_t count) { return queue.scratch.take(Dtype::I32, {count}).as<int32_t>(); };
  const Tensor used = queue.scratch.take(Dtype::I64, {1});
  queue.fill(used, 0);
  const Ranges to{plan.scope,
                  plan.q_tile,
                  view.h,
                  view.g,
                  view.plan.scope_heads,
                  view.sequences,
                  plan.causal,
                  view.qs,
                  view.ks,
                  view.plan.rowptr,
                  view.plan.count,
                  view.plan.index,
                  queue.scratch.take(Dtype::I64, {rows}).as<int64_t>(),
                  ints(rows),
                  ints(room),
                  ints(room),
                  queue.scratch.take(Dtype::U64, {2 * room}).as<uint64_t>(),
                  reinterpret_cast<unsigned long long*>(used.as<int64_t>()),
                  room};
  launch(queue, "attend", find_blocks_kernel,
         dim3(unsigned(ceil_div(view.n_bound, std::max(128, plan.q_tile))), unsigned(view.sequences * view.plan.scope_heads)),
         kBitThreads, 0, to);
  a.rowptr = to.to_rowptr, a.count = to.to_count, a.index = to.to_index, a.mask = to.to_mask, a.bits = to.bits;
  return true;
}

}  // namespace heed::cuda
