// First step of recur_sm90.cu: what of a chunk does not depend on the state, packed as the scan multiplies it.
#pragma once
#include "kernels/cuda/recur_sm90.h"
#include "kernels/cuda/sm90.h"

namespace heed::cuda {
namespace {

using namespace sm90;

constexpr int kChunk = 64, kSub = 16, kPanel = 64 * 128;  // a panel: 64 rows of 64 bf16, swizzled
constexpr int kSlice = 128;                               // columns of v that a block of the scan holds

/// Which operands there are. Widths are padded with zeros.
template <int D, bool Delta, bool Vector, bool Low>
struct Form {
  static constexpr int d = D;
  static constexpr bool delta = Delta, vector = Vector;  // vector: a decay for each channel
  static constexpr bool low = Low;                       // q, k and v are no bf16
  static constexpr bool split = Vector || Low;           // rows of q and k come as high and low
  static constexpr int wide = D / 64, rows = wide * (split ? 2 : 1), values = Low ? 4 : 2;  // in panels
  // A packet holds a chunk's operands: T (high, low), left rows where they are not the keys, keys, values by slices,
  // queries, P (high, low); then numbers of each row and channel.
  static constexpr int triangle = Delta ? 2 : 0, left = Delta && Vector ? rows : 0;
  static constexpr int keys = triangle + left + rows, queries = rows + 2;
  static constexpr int numbers = (2 * kChunk + D) * 4;  // bytes: e^G, e^(end − G) of each row; e^end of each channel
  static constexpr int64_t packet(int slices) { return int64_t(keys + queries + slices * values) * kPanel + 1024; }
  template <bool Out> static constexpr int stage() { return (keys + values + (Out ? queries : 0)) * kPanel + 1024; }
  template <bool Out> static constexpr int stages() {
    return 3 * stage<Out>() + 2048 <= 227 * 1024 ? 3 : 2 * stage<Out>() + 2048 <= 227 * 1024 ? 2 : 1;
  }
};

struct Job {
  RecurView in;
  RecurOut to;
  uint8_t* packets;
  int64_t packet;  // bytes
  int parts, slices;
  float *local, *transit;  // [segments, parts, d, d_v] and [segments, parts, d, d]
  bool lined;              // rows of q, k and v start at multiples of 16 bytes and are multiples long
};

/// Packets of a segment follow each other; no two segments share one, since each takes at most ⌊rows before / 64⌋ + 1 more.
__device__ __forceinline__ int64_t first_packet(const Job& a, int s) { return a.in.qs.begin(s) / kChunk + s; }

/// Where 16 bytes of a panel lie.
__device__ __forceinline__ int swizzled(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

__device__ __forceinline__ void split8(const float (&x)[8], uint4& high, uint4& low) {
  split_bf16(x[0], x[1], high.x, low.x), split_bf16(x[2], x[3], high.y, low.y);
  split_bf16(x[4], x[5], high.z, low.z), split_bf16(x[6], x[7], high.w, low.w);
}

/// A fragment of 16 rows and 16 channels of f32 rows, each channel times `by` if given, as two bf16.
struct Fragment {
  uint32_t high[4], low[4];
  template <bool Low> __device__ __forceinline__ void take(const float* row, int stride, int c, const float* by) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = c + i / 2 * 8;
      float2 x = *reinterpret_cast<const float2*>(row + i % 2 * 8 * stride + at);
      if (by) x.x *= by[at], x.y *= by[at + 1];
      if constexpr (Low) split_bf16(x.x, x.y, high[i], low[i]);
      else high[i] = pack_bf16(x.x, x.y);
    }
  }
  template <bool Low> __device__ __forceinline__ void times(float (&sum)[4], const uint32_t (&b)[2],
                                                            const uint32_t (&b_low)[2]) {
    multiply(sum, high[0], high[1], high[2], high[3], b[0], b[1]);
    if constexpr (Low) {
      multiply(sum, low[0], low[1], low[2], low[3], b[0], b[1]);
      multiply(sum, high[0], high[1], high[2], high[3], b_low[0], b_low[1]);
    }
  }
};

template <class F>
struct Prepared {
  static constexpr int stride = F::d + 4;
  float q[kChunk * stride], k[kChunk * stride], left[F::left ? kChunk * stride : 1];
};
struct Results {  // in the same memory
  uint8_t p[2 * kPanel], t[2 * kPanel];
  float n[kChunk * 68];
};
template <class F>
struct PrepareShared {
  union {
    Prepared<F> rows;
    Results results;
  };
  double sum[kChunk];
  float beta[kChunk];
  // Decay between the start of a sub-block and the end of another: of row and column sub-blocks w ≥ v at w (w + 1) / 2
  // + v, and of a sub-block from the chunk's start and to its end.
  float between[F::vector ? 10 : 1][F::d], before[F::vector ? 4 : 1][F::d], behind[F::vector ? 4 : 1][F::d];
  float diagonal[F::vector ? 4 : 1][2][kSub][kSub + 1];
};

/// x = (I + N)^-1 column by column, N strictly lower triangular: thread c < 64 makes column c.
__device__ __forceinline__ void invert(const float* n, float (&x)[kChunk]) {
  const int c = threadIdx.x;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half == 0 && c >= 32) {  // columns above the diagonal
#pragma unroll
      for (int i = 0; i < 32; ++i) x[i] = 0;
      continue;
    }
#pragma unroll
    for (int i = 32 * half; i < 32 * half + 32; ++i) {
      float sums[4] = {i == c ? 1.0f : 0.0f, 0, 0, 0};
#pragma unroll
      for (int j = 0; j < i; j += 4) {
        const float4 by = *reinterpret_cast<const float4*>(n + i * 68 + j);
        sums[0] -= by.x * x[j];
        if (j + 1 < i) sums[1] -= by.y * x[j + 1];
        if (j + 2 < i) sums[2] -= by.z * x[j + 2];
        if (j + 3 < i) sums[3] -= by.w * x[j + 3];
      }
      x[i] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
  }
}

/// One number of a matrix, which is bf16 unless Low.
template <bool Low> __device__ __forceinline__ float number(const Matrix& m, int64_t row, int c) {
  if constexpr (Low) return m.get(row, c);
  else return to_float(m.row<__nv_bfloat16>(row)[c]);
}

/// Eight numbers of a row from channel c on, zeros past `width`; one load where rows are bf16 at multiples of 16 bytes.
template <bool Low>
__device__ __forceinline__ void numbers8(const Matrix& m, bool lined, bool there, int64_t row, int c, int width,
                                         float (&x)[8]) {
  if (!Low && lined) {
    uint4 bits = {0, 0, 0, 0};
    if (there && c < width) bits = *reinterpret_cast<const uint4*>(m.row<__nv_bfloat16>(row) + c);
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      x[2 * i] = __uint_as_float(words[i] << 16), x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = 0;
  if (there) load8(m.data, m.type, row * m.stride + c, width - c, x);
}

/// Eight numbers of a row to a panel of packets, high and low.
template <bool Low>
__device__ __forceinline__ void put8(uint8_t* panels, int wide, int row, int channel, const float (&x)[8]) {
  uint4 high, low;
  split8(x, high, low);
  uint8_t* to = panels + channel / 64 * kPanel + swizzled(row, channel % 64 / 8);
  *reinterpret_cast<uint4*>(to) = high;
  if constexpr (Low) *reinterpret_cast<uint4*>(to + wide * kPanel) = low;
}

/// Sums over pairs of one sub-block whose decay is too strong for a common reference, one pair after another.
template <class F>
__device__ void diagonal_block(const Job& a, PrepareShared<F>& sh, int64_t q_row, int64_t k_row, int top, int rows, int warp) {
  const int lane = threadIdx.x % 32;
  for (int j = 0; j < kSub; ++j) {
    float k[F::d / 32], decayed[F::d / 32];
#pragma unroll
    for (int m = 0; m < F::d / 32; ++m) {
      const int c = lane + 32 * m;
      k[m] = top + j < rows && c < a.in.d ? a.in.k.get(k_row + top + j, c) : 0;
      decayed[m] = k[m];
    }
    for (int i = j; i < kSub; ++i) {
      float p = 0, n = 0;
      const bool there = top + i < rows;
#pragma unroll
      for (int m = 0; m < F::d / 32; ++m) {
        const int c = lane + 32 * m;
        if (!there || c >= a.in.d) continue;
        if (i > j) decayed[m] *= expf(a.in.g.get(q_row + top + i, c));
        p += decayed[m] * a.in.q.get(q_row + top + i, c);
        if (F::delta) n += decayed[m] * a.in.k.get(k_row + top + i, c);
      }
      p = warp_sum(p);
      if (F::delta) n = warp_sum(n);
      if (lane == 0) sh.diagonal[warp][0][i][j] = p, sh.diagonal[warp][1][i][j] = n;
    }
  }
}

/// One block a chunk. Warp w makes rows 16 w … 16 w + 15 of the products.
template <class F>
__global__ void __launch_bounds__(128) prepare_kernel(const __grid_constant__ Job a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // the build also makes PTX for GPUs that lack all this; nothing starts it there
  extern __shared__ __align__(1024) uint8_t memory[];
  PrepareShared<F>& sh = *reinterpret_cast<PrepareShared<F>*>(memory);
  constexpr int D = F::d, kStride = Prepared<F>::stride;
  const int s = blockIdx.y, n = a.in.qs.length(s), tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  for (int chunk = blockIdx.x; chunk * kChunk < n; chunk += gridDim.x) {
    const int rows = min(kChunk, n - chunk * kChunk);
    const int64_t q_row = a.in.qs.begin(s) + chunk * kChunk, k_row = a.in.ks.begin(s) + chunk * kChunk,
                  v_row = a.in.vs.begin(s) + chunk * kChunk;
    uint8_t* packet = a.packets + (first_packet(a, s) + chunk) * a.packet;
    uint8_t *to_left = packet + F::triangle * kPanel, *to_k = to_left + F::left * kPanel,
            *to_v = to_k + F::rows * kPanel, *to_q = to_v + a.slices * F::values * kPanel;
    float* numbers = reinterpret_cast<float*>(to_q + F::queries * kPanel);
    __syncthreads();
    if (F::delta && tid < kChunk) sh.beta[tid] = tid < rows ? a.in.beta[q_row + tid] : 0;
#pragma unroll 4
    for (int e = tid; e < a.slices * kChunk * (kSlice / 8); e += 128) {
      const int row = e / (kSlice / 8) % kChunk, slice = e / (kSlice / 8 * kChunk), c = e % (kSlice / 8) * 8;
      float x[8];
      numbers8<F::low>(a.in.v, a.lined, row < rows, v_row + row, slice * kSlice + c, a.in.d_v, x);
      put8<F::low>(to_v + slice * F::values * kPanel, 2, row, c, x);
    }
    bool fast = true;  // this warp's diagonal sub-block has a common reference
    if constexpr (!F::vector) {
#pragma unroll 4
      for (int e = tid; e < kChunk * (D / 8); e += 128) {
        const int row = e / (D / 8), c = e % (D / 8) * 8;
        float q[8], k[8];
        numbers8<F::low>(a.in.q, a.lined, row < rows, q_row + row, c, a.in.d, q);
        numbers8<F::low>(a.in.k, a.lined, row < rows, k_row + row, c, a.in.d, k);
        put8<F::split>(to_q, F::wide, row, c, q);
        put8<F::split>(to_k, F::wide, row, c, k);
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
          *reinterpret_cast<float4*>(sh.rows.q + row * kStride + c + i) = {q[i], q[i + 1], q[i + 2], q[i + 3]};
          *reinterpret_cast<float4*>(sh.rows.k + row * kStride + c + i) = {k[i], k[i + 1], k[i + 2], k[i + 3]};
        }
      }
      if (warp == 0) {  // sums of log decays in f64: differences of them are then exact enough, however strong others are
        double carried = 0;
        for (int half = 0; half < 2; ++half) {
          const int i = 32 * half + lane;
          double g = a.in.decay == Recur::Decay::Scalar && i < rows ? double(fmaxf(a.in.g.get(q_row + i), -1000.0f)) : 0;
          for (int step = 1; step < 32; step *= 2) {
            const double other = __shfl_up_sync(~0u, g, step);
            if (lane >= step) g += other;
          }
          sh.sum[i] = carried + g;
          carried += __shfl_sync(~0u, g, 31);
        }
      }
      __syncthreads();
      if (tid < kChunk)
        numbers[tid] = expf(float(sh.sum[tid])), numbers[kChunk + tid] = expf(float(sh.sum[kChunk - 1] - sh.sum[tid]));
      if (tid < D) numbers[2 * kChunk + tid] = expf(float(sh.sum[kChunk - 1]));
    } else {
      if (tid < D) {
        const int c = tid;
        float total[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          // All loads before the first use: a row that is not there reads the chunk's first and counts for nothing.
          float g[kSub], q[kSub], k[kSub], sum = 0;
          const int channel = min(c, a.in.d - 1);
#pragma unroll
          for (int i = 0; i < kSub; ++i) {
            const int row = kSub * w + i < rows ? kSub * w + i : 0;
            g[i] = a.in.g.template row<float>(q_row + row)[channel];
            q[i] = number<F::low>(a.in.q, q_row + row, channel);
            k[i] = number<F::low>(a.in.k, k_row + row, channel);
          }
#pragma unroll
          for (int i = 0; i < kSub; ++i)
            if (kSub * w + i >= rows || c >= a.in.d) g[i] = q[i] = k[i] = 0;
#pragma unroll
          for (int i = 0; i < kSub; ++i) {
            const int row = kSub * w + i;
            sum += g[i];
            const float e = expf(sum);
            sh.rows.q[row * kStride + c] = q[i] * e;
            if (F::left) sh.rows.left[row * kStride + c] = k[i] * e;
          }
          total[w] = sum;
          sum = 0;
#pragma unroll
          for (int i = kSub - 1; i >= 0; --i) {
            const int row = kSub * w + i;
            sh.rows.k[row * kStride + c] = k[i] * expf(sum);
            sum += g[i];
          }
        }
        float sum = 0;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          sh.before[w][c] = expf(sum);
          sum += total[w];
          sh.between[w * (w + 1) / 2 + w][c] = expf(-fmaxf(total[w], -80.0f));
          if (w > 0) sh.between[w * (w + 1) / 2 + w - 1][c] = 1;
        }
        numbers[2 * kChunk + c] = expf(sum);
        sh.between[3][c] = expf(total[1]), sh.between[6][c] = expf(total[1] + total[2]), sh.between[7][c] = expf(total[2]);
        sum = 0;
#pragma unroll
        for (int w = 3; w >= 0; --w) sh.behind[w][c] = expf(sum), sum += total[w];
      }
      __syncthreads();
      for (int e = tid; e < kChunk * (D / 8); e += 128) {
        const int row = e / (D / 8), c = e % (D / 8) * 8;
        float q[8], k[8], left[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float before = sh.before[row / kSub][c + i];
          q[i] = sh.rows.q[row * kStride + c + i] * before;
          k[i] = sh.rows.k[row * kStride + c + i] * sh.behind[row / kSub][c + i];
          if (F::left) left[i] = sh.rows.left[row * kStride + c + i] * before;
        }
        put8<true>(to_q, F::wide, row, c, q);
        put8<true>(to_k, F::wide, row, c, k);
        if (F::left) put8<true>(to_left, F::wide, row, c, left);
      }
      for (int c = lane; c < D; c += 32) fast &= sh.between[warp * (warp + 1) / 2 + warp][c] < 2.6e10f;  // e^24
      fast = __all_sync(~0u, fast);
      if (!fast) diagonal_block<F>(a, sh, q_row, k_row, kSub * warp, rows, warp);
    }

    float p[8][4] = {}, m[8][4] = {};
    const int row = kSub * warp + lane / 4, c0 = lane % 4 * 2;
    const float* k_rows = sh.rows.k + lane / 4 * kStride + c0;
    if constexpr (!F::vector) {
#pragma unroll 2
      for (int c = 0; c < D; c += 16) {
        Fragment q, k;
        q.template take<F::split>(sh.rows.q + row * kStride + c0, kStride, c, nullptr);
        if constexpr (F::delta) k.template take<F::split>(sh.rows.k + row * kStride + c0, kStride, c, nullptr);
#pragma unroll
        for (int t = 0; t < 8; ++t) {
          if (t > 2 * warp + 1) continue;
          uint32_t b[2], b_low[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float2 x = *reinterpret_cast<const float2*>(k_rows + 8 * t * kStride + c + 8 * i);
            split_bf16(x.x, x.y, b[i], b_low[i]);
          }
          q.template times<F::split>(p[t], b, b_low);
          if constexpr (F::delta) k.template times<F::split>(m[t], b, b_low);
        }
      }
    } else {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        if (v > warp || (v == warp && !fast)) continue;
        const float* by = sh.between[warp * (warp + 1) / 2 + v] + c0;
        for (int c = 0; c < D; c += 16) {
          Fragment q, k;
          q.template take<true>(sh.rows.q + row * kStride + c0, kStride, c, by);
          if constexpr (F::left) k.template take<true>(sh.rows.left + row * kStride + c0, kStride, c, by);
#pragma unroll
          for (int t = 2 * v; t < 2 * v + 2; ++t) {
            uint32_t b[2], b_low[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float2 x = *reinterpret_cast<const float2*>(k_rows + 8 * t * kStride + c + 8 * i);
              split_bf16(x.x, x.y, b[i], b_low[i]);
            }
            q.template times<true>(p[t], b, b_low);
            if constexpr (F::left) k.template times<true>(m[t], b, b_low);
          }
        }
      }
    }
    __syncthreads();
    // Rows decay between their columns and themselves; nothing is seen above the diagonal.
#pragma unroll
    for (int t = 0; t < 8; ++t)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = row + 8 * r;
        float x[2], y[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int j = 8 * t + c0 + e;
          x[e] = p[t][2 * r + e], y[e] = m[t][2 * r + e];
          if constexpr (!F::vector) {
            const float by = j <= i ? expf(float(sh.sum[i] - sh.sum[j])) : 0;
            x[e] *= by, y[e] *= by;
          } else if (!fast && t / 2 == warp && j <= i) {
            x[e] = sh.diagonal[warp][0][i % kSub][j % kSub], y[e] = sh.diagonal[warp][1][i % kSub][j % kSub];
          }
          if (j > i) x[e] = 0;
          if (F::delta) sh.results.n[i * 68 + j] = j < i ? y[e] * sh.beta[i] : 0;
        }
        uint32_t high, low;
        split_bf16(x[0], x[1], high, low);
        const int at = swizzled(i, t) + c0 * 2;
        *reinterpret_cast<uint32_t*>(sh.results.p + at) = high;
        *reinterpret_cast<uint32_t*>(sh.results.p + kPanel + at) = low;
      }
    __syncthreads();
    for (int e = tid; e < 2 * kPanel / 16; e += 128)
      reinterpret_cast<uint4*>(to_q + F::rows * kPanel)[e] = reinterpret_cast<const uint4*>(sh.results.p)[e];
    if constexpr (F::delta) {
      if (tid < kChunk) {
        float x[kChunk];
        invert(sh.results.n, x);
        const float beta = sh.beta[tid];
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          const float value = x[i] * beta;
          const __nv_bfloat16 high = __float2bfloat16_rn(value);
          const int at = swizzled(i, tid / 8) + tid % 8 * 2;
          *reinterpret_cast<__nv_bfloat16*>(sh.results.t + at) = high;
          *reinterpret_cast<__nv_bfloat16*>(sh.results.t + kPanel + at) = __float2bfloat16_rn(value - __bfloat162float(high));
        }
      }
      __syncthreads();
      for (int e = tid; e < 2 * kPanel / 16; e += 128)
        reinterpret_cast<uint4*>(packet)[e] = reinterpret_cast<const uint4*>(sh.results.t)[e];
    }
  }
#endif
}

}  // namespace
}  // namespace heed::cuda
