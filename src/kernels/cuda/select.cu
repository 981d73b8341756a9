// select: the k-th largest is found, then a second walk writes what lies above it in order of index. Where a warp or a block
// can hold a segment's numbers in registers it is found bit by bit, else digit by digit in walks over the numbers (radix
// selection).
#include "kernels/cuda/device.cuh"

namespace heed::cuda {
namespace {

constexpr int kSortThreads = 512;

struct Selection {
  Matrix scores;
  Segments at;
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

__device__ inline int64_t block_count(int x) {
  __shared__ int sums[kSortThreads / 32];
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  int out = 0;
  for (int w = 0; w < kSortThreads / 32; ++w) out += sums[w];
  return out;
}

struct Histogram {
  unsigned counts[256];
  unsigned long long sums[256];
};

__device__ inline void clear(Histogram& h) {
  __syncthreads();
  for (int b = threadIdx.x; b < 256; b += kSortThreads) h.counts[b] = 0, h.sums[b] = 0;
  __syncthreads();
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

/// 2^62 holds n times the largest score.
__device__ inline FixedPoint fixed_point(uint32_t top, int n) {
  int exponent = 0;
  frexpf(top > 0x80000000u ? score_of(top) : 0, &exponent);
  const int power = exponent - 62 + 32 - __clz(max(n, 1));
  return {power, ldexp(1.0, power)};
}

/// How many entries a share p takes (rules of kernels.h), forced ones included.
__device__ int64_t share_count(const Selection& a, Histogram& h, int segment, int64_t first, int n) {
  __shared__ uint32_t top_shared, prefix_shared;
  __shared__ int64_t count_shared;
  __shared__ double before_shared;
  __shared__ bool done_shared;
  if (threadIdx.x == 0) top_shared = 0;
  __syncthreads();
  uint32_t top = 0;
  int forced = 0;
  for (int i = threadIdx.x; i < n; i += kSortThreads) {
    const uint32_t key = ordered(a.scores.get(first + i));
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
    for (int i = threadIdx.x; i < n; i += kSortThreads) {
      const float x = a.scores.get(first + i);
      const uint32_t key = ordered(x);
      if (key == 0 || key == kForced || (shift < 24 && key >> (shift + 8) != prefix)) continue;
      atomicAdd(&h.counts[key >> shift & 255], 1u);
      if (x > 0) atomicAdd(&h.sums[key >> shift & 255], fixed.of(x));
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

constexpr int kShort = 1024, kHeld = 32768;  // numbers that a warp, and a block, hold in registers

/// The largest key for which `passes`, which holds for all keys below one that passes; 0: none but that.
template <class Passes>
__device__ inline uint32_t largest_key(Passes passes) {
  uint32_t key = 0;
  for (int bit = 31; bit >= 0; --bit)
    if (passes(key | 1u << bit)) key |= 1u << bit;
  return key;
}

/// By a block.
__device__ void select_long(const Selection& a, int s) {
  __shared__ Histogram h;
  __shared__ uint32_t prefix_shared;
  __shared__ int64_t left_shared;
  const int n = a.at.length(s);
  const int64_t first = a.at.begin(s);
  int there_own = 0, above_own = 0;
  for (int i = threadIdx.x; i < n; i += kSortThreads) {
    const float x = a.scores.get(first + i);
    const bool is = ordered(x) != 0;
    there_own += is;
    above_own += is && x >= a.p;
  }
  const int64_t there = block_count(there_own);
  int64_t taken = a.count ? a.count[s] : a.k;
  if (a.by == Select::By::Threshold) taken = max(block_count(above_own), a.at_least);
  if (a.by == Select::By::TopP) taken = max(share_count(a, h, s, first, n), a.at_least);
  taken = max(int64_t(0), min(taken, min(there, a.capacity)));
  if (threadIdx.x == 0) a.chosen[s] = int32_t(taken);
  if (taken == 0) return;

  // The smallest score chosen, and how many of those equal to it.
  uint32_t prefix = 0;
  int64_t left = taken;
  for (int shift = 24; shift >= 0; shift -= 8) {
    clear(h);
    for (int i = threadIdx.x; i < n; i += kSortThreads) {
      const uint32_t key = ordered(a.scores.get(first + i));
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
  __shared__ int2 warps[kSortThreads / 32];
  int written = 0, equals = 0;
  for (int i0 = 0; i0 < n; i0 += kSortThreads) {
    const int i = i0 + threadIdx.x, lane = threadIdx.x % 32, w = threadIdx.x / 32;
    const uint32_t key = i < n ? ordered(a.scores.get(first + i)) : 0;
    const bool above = key > prefix, equal = key == prefix && key != 0;
    const unsigned aboves = __ballot_sync(0xffffffffu, above), equal_ones = __ballot_sync(0xffffffffu, equal),
                   before = (1u << lane) - 1;
    __syncthreads();
    if (lane == 0) warps[w] = make_int2(__popc(aboves), __popc(equal_ones));
    __syncthreads();
    int above_before = __popc(aboves & before), equal_before = equals + __popc(equal_ones & before), all_above = 0,
        all_equal = 0;
    for (int other = 0; other < kSortThreads / 32; ++other) {
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

/// Threads that hold a segment's numbers in registers: a warp.
struct WarpTeam {
  static constexpr int size = 32;
  __device__ int rank() const { return threadIdx.x % 32; }
  __device__ int sum(int x) { return __reduce_add_sync(~0u, x); }
  __device__ uint32_t largest(uint32_t x) { return __reduce_max_sync(~0u, x); }
  __device__ unsigned long long sum(unsigned long long x) { return warp_sum(x); }
  /// How many threads before this one say yes; `all`: how many do.
  __device__ int before(bool yes, int& all) {
    const unsigned votes = __ballot_sync(~0u, yes);
    all = __popc(votes);
    return __popc(votes & ((1u << rank()) - 1));
  }
};

constexpr int kHeldThreads = 1024;

/// Or a block of kHeldThreads. Results are left in one of two places in turn, so that each takes one barrier.
struct BlockTeam {
  static constexpr int size = kHeldThreads;
  unsigned long long (*place)[32];
  int turn = 0;
  __device__ int rank() const { return threadIdx.x; }
  template <class T> __device__ T all_warps(T own) {
    turn ^= 1;
    if (threadIdx.x % 32 == 0) place[turn][threadIdx.x / 32] = own;
    __syncthreads();
    return T(place[turn][threadIdx.x % 32]);
  }
  __device__ int sum(int x) { return __reduce_add_sync(~0u, all_warps(__reduce_add_sync(~0u, x))); }
  __device__ uint32_t largest(uint32_t x) { return __reduce_max_sync(~0u, all_warps(__reduce_max_sync(~0u, x))); }
  __device__ unsigned long long sum(unsigned long long x) { return warp_sum(all_warps(warp_sum(x))); }
  __device__ int before(bool yes, int& all) {
    const unsigned votes = __ballot_sync(~0u, yes), lane = threadIdx.x % 32;
    const int of_warp = all_warps(__popc(votes));
    all = __reduce_add_sync(~0u, of_warp);
    return __reduce_add_sync(~0u, lane < threadIdx.x / 32 ? of_warp : 0) + __popc(votes & ((1u << lane) - 1));
  }
};

/// A segment of up to Team::size · Own numbers.
template <int Own, class Team>
__device__ void select_held(const Selection& a, int s, int n, Team team) {
  const int64_t first = a.at.begin(s);
  uint32_t key[Own];
  int there = 0, above = 0;
#pragma unroll
  for (int i = 0; i < Own; ++i) {
    const int e = team.rank() + Team::size * i;
    const float x = e < n ? a.scores.get(first + e) : -kInfinity;
    key[i] = ordered(x);
    there += key[i] != 0;
    above += key[i] != 0 && x >= a.p;
  }
  there = team.sum(there);
  auto count_from = [&](uint32_t least) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < Own; ++i) count += key[i] >= least;
    return team.sum(count);
  };
  int64_t taken = a.count ? a.count[s] : a.k;
  if (a.by == Select::By::Threshold) taken = max(int64_t(team.sum(above)), a.at_least);
  if (a.by == Select::By::TopP) {
    uint32_t top = 0;
#pragma unroll
    for (int i = 0; i < Own; ++i)
      if (key[i] != kForced) top = max(top, key[i]);
    const FixedPoint fixed = fixed_point(team.largest(top), n);
    const double held = a.held ? double(a.held[s]) : 0;
    auto sum_from = [&](uint32_t least) {  // of what is not forced
      unsigned long long sum = 0;
#pragma unroll
      for (int i = 0; i < Own; ++i)
        if (key[i] >= least && key[i] != kForced && key[i] > 0x80000000u) sum += fixed.of(score_of(key[i]));
      return held + double(team.sum(sum)) * fixed.unit;
    };
    const double limit = double(a.p) * sum_from(1);
    // The walk stops at the largest score with which the limit is reached, or passed.
    const uint32_t last = largest_key(
        [&](uint32_t least) { return a.crossing ? sum_from(least) >= limit : sum_from(least) > limit; });
    // What is held already may be enough: then the forced ones alone.
    taken = count_from(last < kForced ? max(last, 1u) : kForced);
    if (last != 0 && last < kForced) {
      const int past = count_from(last + 1);
      taken = past + equals_taken(a.crossing, double(score_of(last)), sum_from(last + 1), limit, taken - past);
    }
    taken = max(taken, a.at_least);
  }
  taken = max(int64_t(0), min(taken, min(int64_t(there), a.capacity)));
  if (team.rank() == 0) a.chosen[s] = int32_t(taken);
  if (taken == 0) return;
  const uint32_t least = largest_key([&](uint32_t key) { return count_from(key) >= taken; });
  int equals = int(taken) - count_from(least + 1), written = 0;  // no key is the largest number
#pragma unroll
  for (int i = 0; i < Own; ++i) {
    int same, ins;
    const int same_before = team.before(key[i] == least, same);
    const bool in = key[i] > least || (key[i] == least && same_before < equals);
    const int in_before = team.before(in, ins);
    if (in) a.index[s * a.capacity + written + in_before] = team.rank() + Team::size * i;
    written += ins;
    equals = max(0, equals - same);
  }
}

/// Segments of up to kShort numbers. Grid: segments, four a block.
__global__ void __launch_bounds__(128) select_short_kernel(const __grid_constant__ Selection a) {
  const int s = blockIdx.x * 4 + threadIdx.x / 32;
  if (s >= a.at.count) return;
  const int n = a.at.length(s);
  if (n <= 64) select_held<2>(a, s, n, WarpTeam{});
  else if (n <= 256) select_held<8>(a, s, n, WarpTeam{});
  else if (n <= kShort) select_held<kShort / 32>(a, s, n, WarpTeam{});
}

/// The segments longer than kShort numbers: body(segment) for each, by all threads. There may be a few among a million.
template <int Threads, class Body>
__device__ void each_long(const Selection& a, Body body) {
  __shared__ unsigned found[Threads / 32];
  for (int64_t first = blockIdx.x; first < a.at.count; first += int64_t(gridDim.x) * Threads) {
    const int64_t s = first + int64_t(threadIdx.x) * gridDim.x;
    const unsigned is = __ballot_sync(~0u, s < a.at.count && a.at.length(int(s)) > kShort);
    __syncthreads();
    if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = is;
    __syncthreads();
    for (int w = 0; w < Threads / 32; ++w)
      for (unsigned left = found[w]; left; left &= left - 1) {
        body(int(first + (32 * w + __ffs(int(left)) - 1) * int64_t(gridDim.x)));
        __syncthreads();
      }
  }
}

/// Segments of more than kShort and up to kHeld numbers. Grid: segments (strided).
__global__ void __launch_bounds__(kHeldThreads) select_held_kernel(const __grid_constant__ Selection a) {
  __shared__ unsigned long long place[2][32];
  each_long<kHeldThreads>(a, [&](int s) {
    const int n = a.at.length(s);
    if (n <= 8 * kHeldThreads) select_held<8>(a, s, n, BlockTeam{place});
    else if (n <= kHeld) select_held<kHeld / kHeldThreads>(a, s, n, BlockTeam{place});
  });
}

/// Segments of more than kHeld numbers. Grid: likewise.
__global__ void __launch_bounds__(kSortThreads) select_long_kernel(const __grid_constant__ Selection a) {
  each_long<kSortThreads>(a, [&](int s) {
    if (a.at.length(s) > kHeld) select_long(a, s);
  });
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
      matrix(scores.values),   segments(scores),     how.by, how.k,        how.at_least,        capacity,
      how.count.as<int32_t>(), how.held.as<float>(), how.p,  how.crossing, index.as<int32_t>(), count.as<int32_t>()};
  const int64_t most = scores.values.size[0];  // numbers of a segment
  const dim3 few(unsigned(std::min<int64_t>(segments_of, 2048)));
  launch(queue, where, select_short_kernel, dim3(unsigned(ceil_div(segments_of, 4))), 128, 0, a);
  if (most > kShort) launch(queue, where, select_held_kernel, few, kHeldThreads, 0, a);
  if (most > kHeld) launch(queue, where, select_long_kernel, few, kSortThreads, 0, a);
}

}  // namespace heed::cuda
