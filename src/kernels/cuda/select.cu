// select: the k-th largest is found digit by digit (radix selection), then a second walk writes what lies above it in
// order of index. A block a segment.
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
  double unit;
  __device__ unsigned long long of(float x) const { return static_cast<unsigned long long>(double(x) / unit + 0.5); }
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
  const float largest = top > 0x80000000u ? score_of(top) : 0;
  // 2^62 holds n times the largest.
  int exponent = 0;
  frexpf(largest, &exponent);
  const FixedPoint fixed{ldexp(1.0, exponent - 62 + 32 - __clz(max(n, 1)))};
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
            const double x = double(score_of(prefix_shared));
            int64_t taken = 0;
            const int64_t there = h.counts[b];
            if (a.crossing) {
              if (before < limit) taken = x > 0 ? int64_t(ceil((limit - before) / x)) : there;
            } else {
              taken = x > 0 ? int64_t(floor((limit - before) / x)) : before <= limit ? there : 0;
            }
            taken = max(int64_t(0), min(taken, there));
            // The quotient may be off by one where it is nearly whole.
            if (x > 0 && a.crossing) {
              while (taken > 0 && before + double(taken - 1) * x >= limit) --taken;
              while (taken < there && before + double(taken) * x < limit) ++taken;
            } else if (x > 0) {
              while (taken > 0 && before + double(taken) * x > limit) --taken;
              while (taken < there && before + double(taken + 1) * x <= limit) ++taken;
            }
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

__global__ void __launch_bounds__(kSortThreads) select_kernel(const __grid_constant__ Selection a) {
  __shared__ Histogram h;
  __shared__ uint32_t prefix_shared;
  __shared__ int64_t left_shared;
  const int s = blockIdx.x, n = a.at.length(s);
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
  launch(queue, where, select_kernel, dim3(unsigned(segments_of)), kSortThreads, 0, a);
}

}  // namespace heed::cuda
