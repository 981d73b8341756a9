// What recur_sm90_direct.cuh makes of a chunk whose channels decay each on its own.
#pragma once
#include "kernels/cuda/recur_sm90_direct.cuh"

namespace heed::cuda {
namespace {

/// Whether `yes` holds for all 256 threads that make.
__device__ __forceinline__ bool all_makers(bool yes) {
  uint32_t all;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.u32 p, %1, 0;\nbarrier.cta.red.and.pred q, 1, 256, p;\nselp.u32 %0, 1, 0, q;\n}\n"
      : "=r"(all)
      : "r"(uint32_t(yes))
      : "memory");
  return all;
}

/// d (64 × 32) += a·b^T, both from shared memory.
__device__ __forceinline__ void multiply32(float (&d)[16], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
      "%16, %17, p, 1, 1, 0, 0;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
      : "l"(a), "l"(b), "r"(accumulate));
}

/// P of a chunk that decays too much for one reference: a warp takes a key, which decays from row to row.
template <class P>
__device__ __noinline__ void pairs_one_by_one(const Direct& a, const Rows& at, uint8_t* to_p, int j) {
  const int tid = threadIdx.x - 256, warp = tid / 32, lane = tid % 32, row0 = (at.first + j) * kChunk,
            rows = min(kChunk, at.n - row0);
  for (int e = tid; e < 2 * kPanel / 16; e += 256) reinterpret_cast<uint4*>(to_p)[e] = {};
  named_sync(1, 256);
  const int64_t q_row = at.q + row0, k_row = at.k + row0;
  for (int c = warp; c < rows; c += 8) {
    float k[P::d / 32];
#pragma unroll
    for (int m = 0; m < P::d / 32; ++m) k[m] = lane + 32 * m < a.in.d ? a.in.k.get(k_row + c, lane + 32 * m) : 0;
    for (int i = c; i < rows; ++i) {
      float sum = 0, largest = 0;
#pragma unroll
      for (int m = 0; m < P::d / 32; ++m) {
        if (lane + 32 * m >= a.in.d) continue;
        if (i > c) k[m] *= expf(a.in.g.get(q_row + i, lane + 32 * m));
        sum += k[m] * a.in.q.get(q_row + i, lane + 32 * m);
        largest = fmaxf(largest, fabsf(k[m]));
      }
      if (__all_sync(~0u, largest == 0)) break;
      sum = warp_sum(sum);
      if (lane == 0) {
        const __nv_bfloat16 high = __float2bfloat16_rn(sum);
        uint8_t* to = to_p + swizzled(i, c / 8) + c % 8 * 2;
        *reinterpret_cast<__nv_bfloat16*>(to) = high;
        *reinterpret_cast<__nv_bfloat16*>(to + kPanel) = __float2bfloat16_rn(sum - __bfloat162float(high));
      }
    }
  }
}

/// A thread has two channels of 16 rows. Where no channel decays by more than e^−35 in 16 rows, queries and keys are
/// decayed to and from the chunk's middle, so that the same numbers make P and meet the state, which the walk decays by
/// half chunks; else to the start and from the end.
template <class P>
__device__ __forceinline__ void decay_chunks(const Direct& a, const Rows& at, uint8_t* memory, const Barriers& bar) {
  static_assert(P::d == 128 && P::makers == 256);
  constexpr int kRows = 16;
  const int tid = threadIdx.x - 256, warp = uniform(tid / 32), lane = tid % 32, quarter = uniform(tid / 64),
            channel = tid % 64 * 2;
  const bool second = quarter >= 2;
  float2 g[kRows];
  auto fetch = [&](int j) {
    const int row0 = (at.first + j) * kChunk + kRows * quarter, rows = j < at.count && channel < a.in.d ? at.n - row0 : 0;
    const float* from = a.in.g.template row<float>(at.q + row0) + channel;
    if (rows >= kRows) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) g[i] = *reinterpret_cast<const float2*>(from + i * a.in.g.stride);
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        g[i] = i < rows ? *reinterpret_cast<const float2*>(from + i * a.in.g.stride) : float2{0, 0};
    }
  };
  if (tid == 0)
    for (int j = 0; j < min(P::stages, at.count); ++j) load_chunk<P>(a, at, memory, bar, j);
  if (!P::out) fetch(0);
  float2 carried = {1, 1}, whole = {0, 0};  // decay behind the middle of the chunk before; the part's
  auto exp_of = [](float2 x) { return float2{exp2_fast(x.x * kLog2e), exp2_fast(x.y * kLog2e)}; };
  auto sum_of = [](float2 x, float2 y) { return float2{x.x + y.x, x.y + y.y}; };
  for (int j = 0; j < at.count; ++j) {
    const int slot = j % P::stages;
    uint8_t *stage = memory + slot * P::stage, *made = memory + P::at_made + j % 2 * P::made;
    float* numbers = reinterpret_cast<float*>(memory + P::at_numbers + j % 2 * P::numbers);
    // Sums of quarters pass through P's place, or where there is none that of low keys.
    float2* totals = reinterpret_cast<float2*>((P::out ? made : stage + P::key_lows) + channel * 4);
    if (P::out) fetch(j);  // ahead of its chunk they would fill the registers
    if (j >= 2) {
      barrier_wait(bar.done + j % 2, uint32_t(j / 2 - 1) & 1);
      if (tid == 0 && j - 2 + P::stages < at.count) load_chunk<P>(a, at, memory, bar, j - 2 + P::stages);
    }
    float2 total = {0, 0};
#pragma unroll
    for (int i = 0; i < kRows; ++i) total = sum_of(total, g[i]);
    totals[quarter * 64] = total;
    barrier_wait(bar.full + slot, uint32_t(j / P::stages) & 1);
    clear_tail<P>(at, stage, j);
    const bool near = all_makers(total.x > -35 && total.y > -35), middle = P::out && near;
    const float2 t[4] = {totals[0], totals[64], totals[128], totals[192]};
    const float2 start = sum_of(t[0], t[1]), end = sum_of(t[2], t[3]);
    if (!middle) {
      named_sync(1, 256);  // sums are read
      if (P::out) pairs_one_by_one<P>(a, at, made, j);
    }
    // Both channels of every row times a factor, high in place and low behind; eight rows are read before the first is
    // written. Factors are asked for in order.
    auto decay_rows = [&](auto forward, int high_at, int low_at, auto factor) {
      uint8_t* panel = stage + high_at + channel / 64 * kPanel + kRows * quarter * 128 + channel % 8 * 2;
#pragma unroll
      for (int block = 0; block < kRows / 8; ++block) {
        const int first = (forward ? block : kRows / 8 - 1 - block) * 8;
        uint8_t* rows = panel + first * 128;
        uint32_t x[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = *reinterpret_cast<const uint32_t*>(rows + swizzled(i, channel % 64 / 8));
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int i = forward ? e : 7 - e;
          const float2 by = factor(first + i);
          uint32_t high, low;
          split_bf16(__uint_as_float(x[i] << 16) * by.x, __uint_as_float(x[i] & 0xffff0000u) * by.y, high, low);
          uint32_t* word = reinterpret_cast<uint32_t*>(rows + swizzled(i, channel % 64 / 8));
          word[0] = high, word[(low_at - high_at) / 4] = low;
        }
      }
    };
    using Forward = std::true_type;
    using Backward = std::false_type;
    if (middle) {
      float2 sum = quarter == 0 ? t[1] : quarter == 3 ? t[2] : float2{0, 0};
      if (second) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) sum = sum_of(sum, g[i]), g[i] = sum;
      } else {
#pragma unroll
        for (int i = kRows - 1; i >= 0; --i) {
          const float2 x = g[i];
          g[i] = sum;
          sum = sum_of(sum, x);
        }
      }
      const float sign = second ? kLog2e : -kLog2e;
      if constexpr (P::out)
        decay_rows(Forward(), P::queries, P::query_lows,
                   [&](int i) { return float2{exp2_fast(sign * g[i].x), exp2_fast(sign * g[i].y)}; });
      decay_rows(Forward(), 0, P::key_lows,
                 [&](int i) { return float2{exp2_fast(-sign * g[i].x), exp2_fast(-sign * g[i].y)}; });
    } else {
      float2 sum = quarter == 0 ? float2{0, 0} : quarter == 1 ? t[0] : quarter == 2 ? start : sum_of(start, t[2]);
      if constexpr (P::out)
        decay_rows(Forward(), P::queries, P::query_lows, [&](int i) {
          sum = sum_of(sum, g[i]);
          return exp_of(sum);
        });
      sum = quarter == 3 ? float2{0, 0} : quarter == 2 ? t[3] : quarter == 1 ? end : sum_of(end, t[1]);
      decay_rows(Backward(), 0, P::key_lows, [&](int i) {
        const float2 by = exp_of(sum);
        sum = sum_of(sum, g[i]);
        return by;
      });
    }
    if (!P::out) fetch(j + 1);
    proxy_fence();
    named_sync(1, 256);
    if (quarter == 0) {
      const float2 all = sum_of(start, end), by = middle ? exp_of(start) : float2{1, 1};
      whole = sum_of(whole, all);
      *reinterpret_cast<float2*>(numbers + channel) = {carried.x * by.x, carried.y * by.y};
      *reinterpret_cast<float2*>(numbers + P::d + channel) = middle ? float2{1, 1} : exp_of(all);
      carried = middle ? exp_of(end) : float2{1, 1};
      if (j + 1 == at.count) *reinterpret_cast<float2*>(memory + P::at_last + channel * 4) = carried;
    }
    if constexpr (P::out)
      if (middle) {  // each warpgroup makes 32 columns
        const int left = warp / 4 * 32;
        float pairs[16];
        const uint64_t keys = descriptor_k(stage) + left * 128 / 16, queries = descriptor_k(stage + P::queries),
                       key_lows = descriptor_k(stage + P::key_lows) + left * 128 / 16,
                       query_lows = descriptor_k(stage + P::query_lows);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < P::d / 16; ++k) {
          const int step = k / 4 * (kPanel / 16) + k % 4 * 2;
          multiply32(pairs, queries + step, keys + step, k > 0);
          multiply32(pairs, query_lows + step, keys + step, 1);
          multiply32(pairs, queries + step, key_lows + step, 1);
        }
        wgmma_commit();
        wgmma_wait<0>();
        pin(pairs);
        write_pairs(pairs, made, left);
      }
    proxy_fence();
    warp_arrive(bar.made + j % 2);
  }
  if (!P::out && at.slice == 0 && quarter == 0)
    *reinterpret_cast<float2*>(a.decays + (int64_t(at.s) * a.parts + at.part) * P::d + channel) = exp_of(whole);
}

}  // namespace
}  // namespace heed::cuda
