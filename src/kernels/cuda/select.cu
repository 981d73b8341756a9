#include "kernels/cuda/select.cuh"

namespace heed::cuda {
namespace {

constexpr int kShort = 1024;  // numbers that a warp holds

struct Scores {
  Matrix values;
  Segments at;
};

__device__ inline unsigned long long warp_add(unsigned long long x) {  // three limbs: warps add 32-bit numbers in one instruction
  constexpr unsigned long long limb = (1 << 27) - 1;
  return __reduce_add_sync(~0u, unsigned(x & limb)) +
         ((unsigned long long)__reduce_add_sync(~0u, unsigned(x >> 27 & limb)) << 27) +
         ((unsigned long long)__reduce_add_sync(~0u, unsigned(x >> 54)) << 54);
}

/// A segment of n ≤ 32 · Own numbers, bit by bit.
template <int Own, bool kShares, class Key>
__device__ void select_by_warp(const Selection& a, int s, int n, int64_t k, Key key_of) {
  const int lane = threadIdx.x % 32;
  uint32_t key[Own];
#pragma unroll
  for (int i = 0; i < Own; ++i) key[i] = lane + 32 * i < n ? key_of(lane + 32 * i) : 0;
  const auto count_from = [&](uint32_t least) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < Own; ++i) count += key[i] >= least;
    return __reduce_add_sync(~0u, count);
  };
  const int there = count_from(1);
  int64_t taken = k;
  if (a.by == Select::By::Threshold)
    taken = max(int64_t(isnan(a.p) ? 0 : count_from(max(ordered(a.p), 1u))), a.at_least);
  if constexpr (kShares) {
    uint32_t top = 0;
#pragma unroll
    for (int i = 0; i < Own; ++i)
      if (key[i] != kForced) top = max(top, key[i]);
    const FixedPoint fixed = fixed_point(__reduce_max_sync(~0u, top), n);
    const double held = a.held ? double(a.held[s]) : 0;
    // The walk stops at the largest score with which the limit is reached, or passed: bit by bit, behind the whole sum and
    // before that of what lies above.
    uint32_t last = 0;
    double limit = 0, sum = 0;
#pragma unroll 1
    for (int bit = 32; bit >= -1; --bit) {
      const uint32_t from = bit == 32 ? 1 : bit < 0 ? last + 1 : last | 1u << bit;
      unsigned long long own = 0;  // of what is not forced
#pragma unroll
      for (int i = 0; i < Own; ++i)
        if (key[i] >= from && key[i] != kForced && key[i] > 0x80000000u) own += fixed.of(score_of(key[i]));
      sum = held + double(warp_add(own)) * fixed.unit;
      if (bit == 32) limit = double(a.p) * sum;
      else if (bit >= 0 && (a.crossing ? sum >= limit : sum > limit)) last = from;
    }
    // What is held already may be enough: then the forced ones alone.
    taken = count_from(last < kForced ? max(last, 1u) : kForced);
    if (last != 0 && last < kForced) {
      const int past = count_from(last + 1);
      taken = past + equals_taken(a.crossing, double(score_of(last)), sum, limit, taken - past);
    }
    taken = max(taken, a.at_least);
  }
  taken = max(min(taken, min(int64_t(there), a.capacity)), int64_t(0));
  if (lane == 0) a.chosen[s] = int32_t(taken);
  if (taken == 0) return;
  uint32_t least = 0;  // the smallest one chosen
#pragma unroll 1
  for (int bit = 31; bit >= 0; --bit)
    if (count_from(least | 1u << bit) >= taken) least |= 1u << bit;
  int equals = int(taken) - count_from(least + 1), written = 0;  // no key is the largest number
  const unsigned behind = (1u << lane) - 1;
#pragma unroll
  for (int i = 0; i < Own; ++i) {
    const unsigned same = __ballot_sync(~0u, key[i] == least);
    const bool in = key[i] > least || (key[i] == least && __popc(same & behind) < equals);
    const unsigned ins = __ballot_sync(~0u, in);
    if (in) a.index[s * a.capacity + written + __popc(ins & behind)] = lane + 32 * i;
    written += __popc(ins), equals = max(0, equals - __popc(same));
  }
}

/// Segments of up to kShort numbers. Grid: segments, four a block.
template <bool kShares>
__global__ void __launch_bounds__(128)
    select_short_kernel(const __grid_constant__ Selection a, const __grid_constant__ Scores scores) {
  await();
  const int s = blockIdx.x * 4 + threadIdx.x / 32;
  if (s >= scores.at.count) return;
  const int n = scores.at.length(s);
  const int64_t first = scores.at.begin(s), k = a.count ? a.count[s] : a.k;
  const auto key_of = [&](int e) { return ordered(scores.values.get(first + e)); };
  if (n <= 64) select_by_warp<2, kShares>(a, s, n, k, key_of);
  else if (n <= 256) select_by_warp<8, kShares>(a, s, n, k, key_of);
  else if (n <= kShort) select_by_warp<kShort / 32, kShares>(a, s, n, k, key_of);
}

/// Of every segment, or of those longer than kShort numbers: there may be a few among a million. Grid: clusters (strided).
template <bool kShares>
__global__ void __launch_bounds__(kTeamThreads, 1)
    select_kernel(const __grid_constant__ Selection a, const __grid_constant__ Scores scores, bool short_too) {
  await();
  __shared__ TeamMemory memory;
  __shared__ unsigned found[kTeamThreads / 32];
  __shared__ alignas(16) unsigned sums[kShares ? kLimbs * kBins : 4];
  Team team(memory, sums);
  const int cluster = blockIdx.x / team.blocks, clusters = gridDim.x / team.blocks;
  const auto one = [&](int s) {
    const int64_t first = scores.at.begin(s);
    select_by_team<kShares>(a, s, scores.at.length(s), a.count ? a.count[s] : a.k, team,
                            [&](int e) { return ordered(scores.values.get(first + e)); });
  };
  if (short_too) {
    for (int s = cluster; s < scores.at.count; s += clusters) one(s);
    return;
  }
  for (int64_t first = cluster; first < scores.at.count; first += int64_t(clusters) * kTeamThreads) {
    const int64_t s = first + int64_t(threadIdx.x) * clusters;
    const unsigned is = __ballot_sync(~0u, s < scores.at.count && scores.at.length(int(s)) > kShort);
    __syncthreads();
    if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = is;
    __syncthreads();
    for (int w = 0; w < kTeamThreads / 32; ++w)
      for (unsigned left = found[w]; left; left &= left - 1)
        one(int(first + (32 * w + __ffs(int(left)) - 1) * int64_t(clusters)));
  }
}

template <bool kShares>
void start(Queue& queue, const char* where, const Selection& a, const Scores& scores, int64_t most) {
  const int64_t count = scores.at.count;
  const int blocks = count > 0 ? team_blocks(ceil_div(most, count), count) : 1;
  if (count <= 1024) return launch_clusters(queue, where, select_kernel<kShares>, count, blocks, a, scores, true);
  launch_early(queue, where, select_short_kernel<kShares>, dim3(unsigned(ceil_div(count, 4))), 128, 0, a, scores);
  if (most > kShort) launch_clusters(queue, where, select_kernel<kShares>, 2048 / blocks, blocks, a, scores, false);
}

}  // namespace

void select(Queue& queue, const Ragged& scores, const Select& how, int64_t capacity, Tensor index, Tensor count) {
  constexpr const char* where = "select";
  const int64_t segments_of = scores.segments();
  require(scores.values.type == Dtype::F32 && (scores.values.rank == 1 || scores.values.size[1] == 1), where,
          "scores are F32 [rows]");
  check_tensor(where, "index", index, {segments_of * capacity}, false, Dtype::I32);
  check_tensor(where, "count", count, {segments_of}, false, Dtype::I32);
  check_tensor(where, "k of each segment", how.count, {segments_of}, true, Dtype::I32);
  check_tensor(where, "weight held already", how.held, {segments_of}, true, Dtype::F32);
  const Selection a{
      how.by, how.k,        how.at_least,        capacity,           how.count.as<int32_t>(), how.held.as<float>(),
      how.p,  how.crossing, index.as<int32_t>(), count.as<int32_t>()};
  const Scores of{matrix(scores.values), segments(scores)};
  const int64_t all = scores.values.size[0];  // the most that a segment can have
  if (how.by == Select::By::TopP) start<true>(queue, where, a, of, all);
  else start<false>(queue, where, a, of, all);
}

}  // namespace heed::cuda
