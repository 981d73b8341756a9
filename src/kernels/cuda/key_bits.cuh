// Sets of keys as bits in shared memory, a chunk of keys at a time, by a block of kBitThreads threads.
#pragma once
#include "kernels/cuda/device.cuh"

namespace heed::cuda {

constexpr int kBitThreads = 256, kBitKeys = 65536, kBitOwn = kBitKeys / 32 / kBitThreads;

/// A thread's words of a set: keys from threadIdx.x · 32 · kBitOwn on.
struct BitWords {
  uint32_t x[kBitOwn];
};

/// Exclusive prefix sum over the block's threads; `all`: the sum. Synchronises.
__device__ inline int bit_prefix(int own, int& all) {
  __shared__ int sums[kBitThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int x = own;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, x, step);
    if (lane >= step) x += other;
  }
  __syncthreads();
  if (lane == 31) sums[warp] = x;
  __syncthreads();
  int before = 0;
  all = 0;
#pragma unroll
  for (int w = 0; w < kBitThreads / 32; ++w) {
    if (w < warp) before += sums[w];
    all += sums[w];
  }
  return before + x - own;
}

struct KeyBits {
  // A thread's words lie kBitThreads apart, so that neighbours read neighbours.
  uint32_t words[kBitOwn][kBitThreads];

  __device__ uint32_t& word(int w) { return words[w % kBitOwn][w / kBitOwn]; }
  /// Of the first `keys` keys and the one behind them. The caller synchronises behind it, and before it where others read.
  __device__ void clear(int keys) {
    if (int(threadIdx.x) * 32 * kBitOwn > keys) return;
#pragma unroll
    for (int i = 0; i < kBitOwn; ++i) words[i][threadIdx.x] = 0;
  }
  __device__ void toggle(int key) {
    if (key < kBitKeys) atomicXor(&word(key / 32), 1u << key % 32);
  }
  /// Keys from … to − 1, those words of them that are `thread` modulo `threads`.
  __device__ void set(int from, int to, int thread, int threads) {
    for (int w = from / 32 + thread; 32 * w < to; w += threads) {
      const int low = max(from - 32 * w, 0), high = min(to - 32 * w, 32);
      atomicOr(&word(w), (~0u >> (32 - (high - low))) << low);
    }
  }
  /// This thread's words; of keys past `keys` zeros.
  __device__ BitWords own(int keys) const {
    BitWords out;
    const bool there = int(threadIdx.x) * 32 * kBitOwn <= keys;
#pragma unroll
    for (int i = 0; i < kBitOwn; ++i) out.x[i] = there ? words[i][threadIdx.x] : 0;
    return out;
  }
  /// The keys that an odd number of toggles does not lie behind: ranges, where both ends of each were toggled. Synchronises.
  __device__ BitWords between_toggles(int keys) const {
    __shared__ unsigned odd[kBitThreads / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    BitWords out = own(keys);
    uint32_t carry = 0;
#pragma unroll
    for (int i = 0; i < kBitOwn; ++i) {
      uint32_t x = out.x[i];
      x ^= x << 1, x ^= x << 2, x ^= x << 4, x ^= x << 8, x ^= x << 16;
      out.x[i] = x ^ carry;
      carry = out.x[i] & 0x80000000u ? ~0u : 0;
    }
    const unsigned odds = __ballot_sync(~0u, carry != 0);
    __syncthreads();
    if (lane == 0) odd[warp] = odds;
    __syncthreads();
    int before = __popc(odds & ((1u << lane) - 1));
#pragma unroll
    for (int w = 0; w < kBitThreads / 32; ++w)
      if (w < warp) before += __popc(odd[w]);
    if (before % 2)
#pragma unroll
      for (int i = 0; i < kBitOwn; ++i) out.x[i] = ~out.x[i];
    return out;
  }
};

}  // namespace heed::cuda
