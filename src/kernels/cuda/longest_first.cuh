// Lists of work for blocks of unequal lengths, made on the device by one block of 1024 threads.
#pragma once
#include <cstdint>

namespace heed::sm90 {

/// Exclusive prefix sum of one pair a thread over the block; returns the block's totals.
__device__ inline int2 block_prefix(int2& x, int2* warps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int2 all = x;
  for (int step = 1; step < 32; step *= 2) {
    const int a = __shfl_up_sync(~0u, all.x, step), b = __shfl_up_sync(~0u, all.y, step);
    if (lane >= step) all.x += a, all.y += b;
  }
  if (lane == 31) warps[warp] = all;
  __syncthreads();
  if (warp == 0) {
    int2 w = warps[lane];
    for (int step = 1; step < 32; step *= 2) {
      const int a = __shfl_up_sync(~0u, w.x, step), b = __shfl_up_sync(~0u, w.y, step);
      if (lane >= step) w.x += a, w.y += b;
    }
    warps[lane] = w;
  }
  __syncthreads();
  const int2 before = warp ? warps[warp - 1] : int2{0, 0}, total = warps[31];
  __syncthreads();
  x = {before.x + all.x - x.x, before.y + all.y - x.y};
  return total;
}

/// One piece of work. Sections follow one another; in each the longest come first.
template <class Tile>
struct Job {
  Tile tile;
  int section, length;
};

/// to[0 … total − 1] = the tiles of make(0 … total − 1), which returns a Job, in about that order: a counting sort. `longest`: no
/// job is longer. All threads of the block call it.
template <class Tile, class Make>
__device__ void list_longest_first(Tile* to, int total, int sections, int longest, Make make) {
  constexpr int kBuckets = 4096, kOwn = kBuckets / 1024;
  __shared__ int buckets[kBuckets];
  __shared__ int2 warps[32];
  for (int i = threadIdx.x; i < kBuckets; i += 1024) buckets[i] = 0;
  __syncthreads();
  const int each = kBuckets / sections;
  auto bucket = [&](const Job<Tile>& job) {
    return job.section * each + each - 1 - int(int64_t(min(job.length, longest)) * (each - 1) / longest);
  };
  for (int t = threadIdx.x; t < total; t += 1024) atomicAdd(&buckets[bucket(make(t))], 1);
  __syncthreads();
  int counts[kOwn], sum = 0;
  for (int i = 0; i < kOwn; ++i) sum += counts[i] = buckets[threadIdx.x * kOwn + i];
  int2 x = {sum, 0};
  block_prefix(x, warps);
  for (int i = 0; i < kOwn; ++i) buckets[threadIdx.x * kOwn + i] = x.x, x.x += counts[i];
  __syncthreads();
  for (int t = threadIdx.x; t < total; t += 1024) {
    const Job<Tile> job = make(t);
    to[atomicAdd(&buckets[bucket(job)], 1)] = job.tile;
  }
}

}  // namespace heed::sm90
