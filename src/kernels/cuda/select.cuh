// The core of select. A block or a cluster of blocks holds a segment's numbers in registers and finds the smallest one that is
// chosen in a histogram of 2048 bins between the smallest and the largest, then in one of the bin where it lies, and so on; what
// they do not hold is found digit by digit, in walks over the numbers (radix selection). Then what lies above it is written in
// order of index.
#pragma once
#include "kernels/cuda/device.cuh"

namespace heed::cuda {

/// What becomes of segments; the numbers come from elsewhere.
struct Selection {
  Select::By by;
  int64_t k, at_least, capacity;
  const int32_t* count;  // k of each segment
  const float* held;
  float p;
  bool crossing;
  int32_t *index, *chosen;
};

/// Numbers in the order of their scores; those never chosen are 0.
__device__ inline uint32_t ordered(float x) {
  if (isnan(x) || x == -kInfinity) return 0;
  const uint32_t bits = __float_as_uint(x + 0.0f);  // −0 is 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float score_of(uint32_t ordered) {
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}
constexpr uint32_t kForced = 0xff800000u;  // ordered(+∞)

/// Sums of scores, exact in any order: integers in units of the largest score's last places.
struct FixedPoint {
  int power;  // the unit is 2^power
  double unit;
  /// x ≥ 0, rounded.
  __device__ unsigned long long of(float x) const {
    const uint32_t bits = __float_as_uint(x);
    const int exponent = max(int(bits >> 23), 1), shift = exponent - 150 - power;
    const unsigned long long digits = (bits & 0x7fffff) | (bits >> 23 ? 0x800000u : 0u);
    return shift >= 0 ? digits << shift : shift < -24 ? 0 : (digits + (1u << (-shift - 1))) >> -shift;
  }
};

/// 2^62 holds n times the largest score, and 2^51 the largest score.
__device__ inline FixedPoint fixed_point(uint32_t top, int n) {
  int exponent = 0;
  frexpf(top > 0x80000000u ? score_of(top) : 0, &exponent);
  const int power = exponent - min(51, 62 - (32 - __clz(max(n, 1))));
  return {power, ldexp(1.0, power)};
}

/// How many of `there` entries of score x a share takes, when `before` lies before the first of them.
__device__ inline int64_t equals_taken(bool crossing, double x, double before, double limit, int64_t there) {
  if (!(x > 0)) return crossing ? (before < limit ? there : 0) : before <= limit ? there : 0;
  int64_t taken = crossing ? (before < limit ? int64_t(ceil((limit - before) / x)) : 0)
                           : int64_t(floor((limit - before) / x));
  taken = max(int64_t(0), min(taken, there));
  // The quotient may be off by one where it is nearly whole.
  if (crossing) {
    while (taken > 0 && before + double(taken - 1) * x >= limit) --taken;
    while (taken < there && before + double(taken) * x < limit) ++taken;
  } else {
    while (taken > 0 && before + double(taken) * x > limit) --taken;
    while (taken < there && before + double(taken + 1) * x <= limit) ++taken;
  }
  return taken;
}

/// Numbers that threads make together: two sums, and the larger ones of two.
struct Tally {
  int sum[2];
  uint32_t largest[2];
  __device__ Tally over_warp() const {
    Tally out;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      out.sum[i] = __reduce_add_sync(~0u, sum[i]), out.largest[i] = __reduce_max_sync(~0u, largest[i]);
    return out;
  }
};

constexpr int kTeamThreads = 512, kTeamWarps = kTeamThreads / 32, kMostCluster = 8, kBins = 4 * kTeamThreads;
constexpr int kMostOwn = 40;  // numbers that a thread holds
/// Sums of scores are made of limbs, since blocks add 32-bit numbers without trying twice.
constexpr int kLimbs = 3, kLimb = 17;
static_assert(kMostOwn * kTeamThreads <= 1 << (32 - kLimb));

/// What the warps of a block leave for others to read. Tallies are written in turn with others, so that an exchange takes one
/// barrier: who writes one again has met everybody behind the reading of it.
struct TeamMemory {
  Tally warps[2][kTeamWarps], blocks[2][kMostCluster];
  alignas(16) unsigned counts[kBins];
  int counted[kTeamWarps];
  unsigned long long added[kTeamWarps];
  struct {
    int bin, above, inside;  // −1: in none
    unsigned long long sum_above;
  } stop;
};

/// Where a walk over numbers from the largest down stops.
struct Stop {
  bool found;
  uint32_t low, high;                 // keys of the bin
  int above, inside;                  // numbers above the bin, and in it
  unsigned long long sum_above, sum;  // of their scores, and of all
};

/// A block of kTeamThreads, or a cluster of such blocks, whose threads hold a segment's numbers.
struct Team {
  TeamMemory& memory;
  unsigned* sums;     // shared memory for kLimbs · kBins numbers, where shares are asked for
  int blocks, block;  // of the cluster
  int turn = 0;

  __device__ Team(TeamMemory& memory, unsigned* sums) : memory(memory), sums(sums), blocks(1), block(0) {
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(block));
    if (blocks > 1) meet();  // nobody writes to a block that has not begun
#endif
  }
  __device__ int warp() const { return block * kTeamWarps + int(threadIdx.x) / 32; }

  __device__ void meet() {
#if __CUDA_ARCH__ >= 900
    if (blocks > 1) {
      asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
      return;
    }
#endif
    __syncthreads();
  }
  /// The same place in the shared memory of another block.
  template <class T>
  __device__ T* of_block(T* here, int other) {
#if __CUDA_ARCH__ >= 900
    uint64_t there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(here), "r"(other));
    return reinterpret_cast<T*>(there);
#else
    return here;
#endif
  }
  __device__ Tally all(const Tally& own) {
    const int lane = threadIdx.x % 32;
    turn ^= 1;
    const Tally mine = own.over_warp();
    if (lane == 0) memory.warps[turn][threadIdx.x / 32] = mine;
    __syncthreads();
    Tally out = (lane < kTeamWarps ? memory.warps[turn][lane] : Tally{}).over_warp();
    if (blocks == 1) return out;
    if (int(threadIdx.x) < blocks) *of_block(&memory.blocks[turn][block], int(threadIdx.x)) = out;
    meet();
    return (lane < blocks ? memory.blocks[turn][lane] : Tally{}).over_warp();
  }
  /// Of a pair that is the same for all threads of a warp: the sums over the warps before this one.
  __device__ int2 before(int2 own) {
    const int lane = threadIdx.x % 32, w = threadIdx.x / 32;
    const auto part = [&](const Tally& x, bool of) {
      return make_int2(__reduce_add_sync(~0u, of ? x.sum[0] : 0), __reduce_add_sync(~0u, of ? x.sum[1] : 0));
    };
    turn ^= 1;
    Tally mine{};
    mine.sum[0] = own.x, mine.sum[1] = own.y;
    if (lane == 0) memory.warps[turn][w] = mine;
    __syncthreads();
    const Tally other = lane < kTeamWarps ? memory.warps[turn][lane] : Tally{};
    int2 out = part(other, lane < w);
    if (blocks == 1) return out;
    const int2 here = part(other, true);
    mine.sum[0] = here.x, mine.sum[1] = here.y;
    if (int(threadIdx.x) < blocks) *of_block(&memory.blocks[turn][block], int(threadIdx.x)) = mine;
    meet();
    const int2 earlier = part(lane < blocks ? memory.blocks[turn][lane] : Tally{}, lane < block);
    return make_int2(out.x + earlier.x, out.y + earlier.y);
  }

  /// Walks down the numbers with keys low … high, in bins of equal width in keys, and stops in the first one with a number in
  /// it behind which stops(numbers so far, sum of their scores so far, that of all) says so. Without kShares sums are 0.
  template <bool kShares, int Own, class Stops>
  __device__ Stop walk(const uint32_t (&key)[Own], uint32_t low, uint32_t high, const FixedPoint& fixed, Stops stops) {
    using Sum = unsigned long long;
    const int lane = threadIdx.x % 32, w = threadIdx.x / 32, shift = max(0, 21 - __clz(int(high - low)));
    for (int b = threadIdx.x; b < kBins; b += kTeamThreads) {
      memory.counts[b] = 0;
      if constexpr (kShares)
        for (int limb = 0; limb < kLimbs; ++limb) sums[limb * kBins + b] = 0;
    }
    if (threadIdx.x == 0) memory.stop.bin = -1;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Own; ++i)
      if (key[i] >= low && key[i] <= high) {
        const uint32_t bin = (key[i] - low) >> shift;
        atomicAdd(&memory.counts[bin], 1u);
        if constexpr (kShares)
          if (key[i] > 0x80000000u) {
            const Sum x = fixed.of(score_of(key[i]));
            for (int limb = 0; limb < kLimbs; ++limb)
              atomicAdd(&sums[limb * kBins + bin], unsigned(x >> (kLimb * limb)) & ((1u << kLimb) - 1));
          }
      }
    meet();
    const auto carried = [&](unsigned low_limb, unsigned middle, unsigned high_limb) {
      return low_limb + (Sum(middle) << kLimb) + (Sum(high_limb) << (2 * kLimb));
    };
    if (blocks > 1) {  // a block adds up a part of the bins and tells the others, in two limbs of 32 bits
      const int each = kBins / blocks;
      for (int i = threadIdx.x; i < each; i += kTeamThreads) {
        const int b = block * each + i;
        unsigned count = 0;
        Sum sum = 0;
        for (int other = 0; other < blocks; ++other) {
          count += *of_block(&memory.counts[b], other);
          if constexpr (kShares)
            sum += carried(*of_block(&sums[b], other), *of_block(&sums[kBins + b], other),
                           *of_block(&sums[2 * kBins + b], other));
        }
        for (int other = 0; other < blocks; ++other) {
          *of_block(&memory.counts[b], other) = count;
          if constexpr (kShares)
            *of_block(&sums[b], other) = unsigned(sum), *of_block(&sums[kBins + b], other) = unsigned(sum >> 32);
        }
      }
      meet();
    }
    // A thread has four bins, the first one the highest.
    const int last = kBins / 4 - 1 - int(threadIdx.x);
    const auto four_of = [&](const unsigned* of, unsigned(&x)[4]) {
      const uint4 four = reinterpret_cast<const uint4*>(of)[last];
      x[0] = four.w, x[1] = four.z, x[2] = four.y, x[3] = four.x;
    };
    unsigned count[4];
    four_of(memory.counts, count);
    Sum sum[4] = {0, 0, 0, 0};
    if constexpr (kShares) {
      unsigned limbs[kLimbs][4];
      for (int limb = 0; limb < kLimbs; ++limb) four_of(sums + limb * kBins, limbs[limb]);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        sum[j] = blocks > 1 ? limbs[0][j] + (Sum(limbs[1][j]) << 32) : carried(limbs[0][j], limbs[1][j], limbs[2][j]);
    }
    const int all = int(count[0] + count[1] + count[2] + count[3]);
    const Sum total = sum[0] + sum[1] + sum[2] + sum[3];
    int counted = all;
    Sum added = total;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      const int c = __shfl_up_sync(~0u, counted, by);
      if (lane >= by) counted += c;
      if constexpr (kShares) {
        const Sum x = __shfl_up_sync(~0u, added, by);
        if (lane >= by) added += x;
      }
    }
    if (lane == 31) memory.counted[w] = counted, memory.added[w] = added;
    __syncthreads();
    counted -= all, added -= total;
    Sum whole = 0;
    for (int other = 0; other < kTeamWarps; ++other) {
      if (other < w) counted += memory.counted[other];
      if constexpr (kShares) added += other < w ? memory.added[other] : 0, whole += memory.added[other];
    }
    if (all > 0 && !(counted > 0 && stops(counted, added, whole)))
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (count[j] > 0 && stops(counted + int(count[j]), added + sum[j], whole)) {
          memory.stop = {kBins - 1 - 4 * int(threadIdx.x) - j, counted, int(count[j]), added};
          break;
        }
        counted += int(count[j]), added += sum[j];
      }
    __syncthreads();
    const auto stop = memory.stop;
    __syncthreads();
    const uint32_t from = low + (uint32_t(max(stop.bin, 0)) << shift);
    return {stop.bin >= 0,  from, shift == 0 ? from : min(high, from + ((1u << shift) - 1)), stop.above, stop.inside,
            stop.sum_above, whole};
  }
};

/// What is chosen: all keys above `least`, and of those equal to it the first `equals`.
struct Chosen {
  int64_t taken;
  uint32_t least;
  int equals;
};
constexpr int kAllEquals = 1 << 30;

/// The `taken` largest of the keys low … high, `past` keys above them besides.
template <int Own>
__device__ Chosen largest_of(Team& team, const uint32_t (&key)[Own], int64_t taken, int past, uint32_t low, uint32_t high) {
  int need = int(taken) - past;
#pragma unroll 1
  while (true) {
    const Stop stop = team.walk<false>(key, low, high, {}, [&](int counted, auto, auto) { return counted >= need; });
    need -= stop.above;
    if (stop.inside == need) return {taken, stop.low, kAllEquals};
    if (stop.low == stop.high) return {taken, stop.low, need};
    low = stop.low, high = stop.high;
  }
}

/// How many numbers a share p takes (rules of kernels.h) of the keys low … high and of `forced` ones above them, whose scores
/// count nothing.
template <int Own>
__device__ Chosen share_of(Team& team, const Selection& a, int s, int n, const uint32_t (&key)[Own], int forced,
                           int there, uint32_t low, uint32_t high) {
  const FixedPoint fixed = fixed_point(high, n);
  const double held = a.held ? double(a.held[s]) : 0;
  if (there == forced) return {forced, kForced, kAllEquals};
  double limit = -1;  // known behind the first walk
  int past = forced;
  unsigned long long before = 0;
#pragma unroll 1
  while (true) {
    const auto of_all = [&](unsigned long long whole) { return double(a.p) * (held + double(whole) * fixed.unit); };
    const Stop stop = team.walk<true>(key, low, high, fixed, [&](int, unsigned long long sum, unsigned long long whole) {
      const double at = held + double(before + sum) * fixed.unit, end = limit < 0 ? of_all(whole) : limit;
      return a.crossing ? at >= end : at > end;
    });
    if (!stop.found) return {there, 1, kAllEquals};
    if (limit < 0) limit = of_all(stop.sum);
    past += stop.above, before += stop.sum_above;
    low = stop.low, high = stop.high;
    if (low < high) continue;
    const int64_t own = equals_taken(a.crossing, double(score_of(low)), held + double(before) * fixed.unit, limit,
                                     stop.inside);
    return {past + own, low, int(own)};
  }
}

/// A segment of n ≤ 32 · warps · Own numbers; a warp holds consecutive ones. key_of(e): the number of place e (ordered).
/// kShares: by TopP.
template <int Own, bool kShares, class Key>
__device__ void select_held(const Selection& a, int s, int n, int64_t k, Team& team, Key key_of) {
  const int lane = threadIdx.x % 32, first = team.warp() * 32 * Own + lane;
  uint32_t key[Own];
#pragma unroll
  for (int i = 0; i < Own; ++i) {
    const int e = first + 32 * i;
    key[i] = e < n ? key_of(e) : 0;
  }
  Tally own{};  // numbers, forced ones; of the others the largest, and the smallest one's complement
#pragma unroll
  for (int i = 0; i < Own; ++i) {
    own.sum[0] += key[i] != 0, own.sum[1] += key[i] == kForced;
    if (key[i] == 0 || key[i] == kForced) continue;
    own.largest[0] = max(own.largest[0], key[i]), own.largest[1] = max(own.largest[1], ~key[i]);
  }
  const Tally all = team.all(own);
  const int there = all.sum[0], forced = all.sum[1];
  const uint32_t high = all.largest[0], low = ~all.largest[1];
  int64_t taken = k;
  Chosen chosen{-1, 1, kAllEquals};
  if (a.by == Select::By::Threshold && !isnan(a.p)) {
    const uint32_t least = max(ordered(a.p), 1u);
    Tally above{};
#pragma unroll
    for (int i = 0; i < Own; ++i) above.sum[0] += key[i] >= least;
    chosen = {team.all(above).sum[0], least, kAllEquals};
    taken = max(chosen.taken, a.at_least);
  } else if (a.by == Select::By::Threshold) {
    taken = a.at_least;
  }
  if constexpr (kShares) {
    chosen = share_of(team, a, s, n, key, forced, there, low, high);
    taken = max(chosen.taken, a.at_least);
  }
  taken = max(min(taken, min(int64_t(there), a.capacity)), int64_t(0));
  if (team.warp() == 0 && lane == 0) a.chosen[s] = int32_t(taken);
  if (taken == 0) return;
  if (taken != chosen.taken) {
    if (taken == there) chosen = {taken, 1, kAllEquals};
    else if (taken <= forced) chosen = {taken, kForced, int(taken)};
    else chosen = largest_of(team, key, taken, forced, low, high);
  }
  int2 counts = make_int2(0, 0);  // of the warp: above, equal
#pragma unroll
  for (int i = 0; i < Own; ++i) {
    counts.x += __popc(__ballot_sync(~0u, key[i] > chosen.least));
    counts.y += __popc(__ballot_sync(~0u, key[i] == chosen.least));
  }
  int2 before = team.before(counts);
  const unsigned behind = (1u << lane) - 1;
#pragma unroll
  for (int i = 0; i < Own; ++i) {
    const unsigned aboves = __ballot_sync(~0u, key[i] > chosen.least), same = __ballot_sync(~0u, key[i] == chosen.least);
    const int equal_before = before.y + __popc(same & behind);
    if (key[i] > chosen.least || (key[i] == chosen.least && equal_before < chosen.equals))
      a.index[s * a.capacity + before.x + __popc(aboves & behind) + min(equal_before, chosen.equals)] = first + 32 * i;
    before.x += __popc(aboves), before.y += __popc(same);
  }
}

__device__ inline int64_t block_count(int x) {
  __shared__ int sums[kTeamThreads / 32];
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  int out = 0;
  for (int w = 0; w < kTeamThreads / 32; ++w) out += sums[w];
  return out;
}

struct Histogram {
  unsigned counts[256];
  unsigned long long sums[256];
};

__device__ inline void clear(Histogram& h) {
  __syncthreads();
  for (int b = threadIdx.x; b < 256; b += kTeamThreads) h.counts[b] = 0, h.sums[b] = 0;
  __syncthreads();
}

/// How many entries a share p takes (rules of kernels.h), forced ones included.
template <class Key>
__device__ int64_t share_count(const Selection& a, Histogram& h, int segment, int n, Key key_of) {
  __shared__ uint32_t top_shared, prefix_shared;
  __shared__ int64_t count_shared;
  __shared__ double before_shared;
  __shared__ bool done_shared;
  if (threadIdx.x == 0) top_shared = 0;
  __syncthreads();
  uint32_t top = 0;
  int forced = 0;
  for (int i = threadIdx.x; i < n; i += kTeamThreads) {
    const uint32_t key = key_of(i);
    if (key == kForced) ++forced;
    else top = max(top, key);
  }
  atomicMax(&top_shared, top);
  const int64_t all_forced = block_count(forced);
  top = top_shared;
  const FixedPoint fixed = fixed_point(top, n);
  const double held = a.held ? double(a.held[segment]) : 0;

  uint32_t prefix = 0;
  double before = held, limit = 0;
  int64_t count = all_forced;
  for (int shift = 24; shift >= 0; shift -= 8) {
    clear(h);
    for (int i = threadIdx.x; i < n; i += kTeamThreads) {
      const uint32_t key = key_of(i);
      if (key == 0 || key == kForced || (shift < 24 && key >> (shift + 8) != prefix)) continue;
      atomicAdd(&h.counts[key >> shift & 255], 1u);
      if (key > 0x80000000u) atomicAdd(&h.sums[key >> shift & 255], fixed.of(score_of(key)));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      if (shift == 24) {
        unsigned long long total = 0;
        for (int b = 0; b < 256; ++b) total += h.sums[b];
        limit = double(a.p) * (held + double(total) * fixed.unit);
      }
      done_shared = true;
      for (int b = 255; b >= 0; --b) {
        if (h.counts[b] == 0) continue;
        const double sum = double(h.sums[b]) * fixed.unit;
        // Does the walk stop inside this digit?
        const bool stops = a.crossing ? before + sum >= limit : before + sum > limit;
        if (stops) {
          prefix_shared = prefix << 8 | uint32_t(b);
          if (shift == 24) prefix_shared = uint32_t(b);
          done_shared = false;
          if (shift == 0) {  // equal scores: how many of them
            const int64_t taken = equals_taken(a.crossing, double(score_of(prefix_shared)), before, limit, h.counts[b]);
            count += taken;
          }
          break;
        }
        before += sum;
        count += h.counts[b];
      }
      count_shared = count;
      before_shared = before;
    }
    __syncthreads();
    count = count_shared;
    before = before_shared;
    prefix = prefix_shared;
    if (done_shared) break;
  }
  __syncthreads();
  return count;
}

/// A segment of any length, by a block.
template <bool kShares, class Key>
__device__ void select_long(const Selection& a, int s, int n, int64_t k, Key key_of) {
  __shared__ Histogram h;
  __shared__ uint32_t prefix_shared;
  __shared__ int64_t left_shared;
  const uint32_t floor = ordered(a.p);
  int there_own = 0, above_own = 0;
  for (int i = threadIdx.x; i < n; i += kTeamThreads) {
    const uint32_t key = key_of(i);
    there_own += key != 0;
    above_own += key != 0 && key >= floor && !isnan(a.p);
  }
  const int64_t there = block_count(there_own);
  int64_t taken = k;
  if (a.by == Select::By::Threshold) taken = max(block_count(above_own), a.at_least);
  if constexpr (kShares) taken = max(share_count(a, h, s, n, key_of), a.at_least);
  taken = max(int64_t(0), min(taken, min(there, a.capacity)));
  if (threadIdx.x == 0) a.chosen[s] = int32_t(taken);
  if (taken == 0) return;

  // The smallest score chosen, and how many of those equal to it.
  uint32_t prefix = 0;
  int64_t left = taken;
  for (int shift = 24; shift >= 0; shift -= 8) {
    clear(h);
    for (int i = threadIdx.x; i < n; i += kTeamThreads) {
      const uint32_t key = key_of(i);
      if (key == 0 || (shift < 24 && key >> (shift + 8) != prefix)) continue;
      atomicAdd(&h.counts[key >> shift & 255], 1u);
    }
    __syncthreads();
    if (threadIdx.x < 32) {  // a lane has eight digits, lane 0 the highest
      int b = 255 - 8 * int(threadIdx.x);
      int64_t own = 0;
      for (int i = 0; i < 8; ++i) own += h.counts[b - i];
      int64_t above = own;
      for (int by = 1; by < 32; by *= 2) {
        const int64_t other = __shfl_up_sync(0xffffffffu, above, by);
        if (int(threadIdx.x) >= by) above += other;
      }
      above -= own;
      if (above < left && left <= above + own) {
        int64_t rest = left - above;
        for (; rest > int64_t(h.counts[b]); --b) rest -= h.counts[b];
        prefix_shared = shift == 24 ? uint32_t(b) : prefix << 8 | uint32_t(b);
        left_shared = rest;
      }
    }
    __syncthreads();
    prefix = prefix_shared;
    left = left_shared;
  }

  // Writes in order of index: of equal ones the first `left`.
  __shared__ int2 warps[kTeamThreads / 32];
  int written = 0, equals = 0;
  for (int i0 = 0; i0 < n; i0 += kTeamThreads) {
    const int i = i0 + threadIdx.x, lane = threadIdx.x % 32, w = threadIdx.x / 32;
    const uint32_t key = i < n ? key_of(i) : 0;
    const bool above = key > prefix, equal = key == prefix && key != 0;
    const unsigned aboves = __ballot_sync(0xffffffffu, above), equal_ones = __ballot_sync(0xffffffffu, equal),
                   before = (1u << lane) - 1;
    __syncthreads();
    if (lane == 0) warps[w] = make_int2(__popc(aboves), __popc(equal_ones));
    __syncthreads();
    int above_before = __popc(aboves & before), equal_before = equals + __popc(equal_ones & before), all_above = 0,
        all_equal = 0;
    for (int other = 0; other < kTeamThreads / 32; ++other) {
      if (other < w) {
        above_before += warps[other].x;
        equal_before += warps[other].y;
      }
      all_above += warps[other].x;
      all_equal += warps[other].y;
    }
    const int kept_equals = int(min(left, int64_t(equals))),
              place = written + above_before + int(min(left, int64_t(equal_before))) - kept_equals;
    if (above || (equal && equal_before < left)) a.index[s * a.capacity + place] = i;
    equals += all_equal;
    written += all_above + int(min(left, int64_t(equals))) - kept_equals;
  }
}

/// Numbers that a cluster of `blocks` blocks holds.
__host__ __device__ constexpr int64_t most_held(int blocks) { return int64_t(blocks) * kTeamThreads * kMostOwn; }

/// A segment, by a cluster.
template <bool kShares, class Key>
__device__ void select_by_team(const Selection& a, int s, int n, int64_t k, Team& team, Key key_of) {
  const int each = team.blocks * kTeamThreads;
  if (n <= 4 * each) select_held<4, kShares>(a, s, n, k, team, key_of);
  else if (n <= 8 * each) select_held<8, kShares>(a, s, n, k, team, key_of);
  else if (n <= 20 * each) select_held<20, kShares>(a, s, n, k, team, key_of);
  else if (n <= kMostOwn * each) select_held<kMostOwn, kShares>(a, s, n, k, team, key_of);
  else if (team.block == 0) select_long<kShares>(a, s, n, k, key_of);
}

/// Blocks for each of `segments` segments of about `mean` numbers: as many as hold them, and as keep the device busy.
inline int team_blocks(int64_t mean, int64_t segments) {
  int blocks = 1;
  while (launches_early() && blocks < kMostCluster &&
         (mean > most_held(blocks) ||
          (mean > int64_t(blocks) * kTeamThreads * 16 && 2 * blocks * segments <= multiprocessors())))
    blocks *= 2;
  return blocks;
}

/// As launch_early, in clusters of `blocks` blocks along x.
template <class... Formal, class... Actual>
void launch_clusters(Queue& queue, const char* where, void (*kernel)(Formal...), int64_t clusters, int blocks,
                     const Actual&... args) {
  if (blocks == 1) return launch_early(queue, where, kernel, dim3(unsigned(clusters)), kTeamThreads, 0, args...);
  if (clusters == 0) return;
  cudaLaunchAttribute how_each[2]{};
  how_each[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  how_each[0].val.programmaticStreamSerializationAllowed = 1;
  how_each[1].id = cudaLaunchAttributeClusterDimension;
  how_each[1].val.clusterDim.x = unsigned(blocks), how_each[1].val.clusterDim.y = how_each[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t how{};
  how.gridDim = dim3(unsigned(clusters * blocks)), how.blockDim = dim3(kTeamThreads), how.stream = stream(queue);
  how.attrs = how_each, how.numAttrs = 2;
  check(cudaLaunchKernelEx(&how, kernel, Formal(args)...), where);
}

}  // namespace heed::cuda
