// The recurrence in chunks of 64 rows on Hopper's tensor cores. Three steps: `prepare` makes of every chunk, all at once, what
// does not depend on the state (products of rows inside the chunk and, for the delta rule, the inverse of I + N; Yang et al. 2024);
// `scan` walks chunks with the state in registers. Where segments are few, each is cut into parts: a first scan finds what a part
// makes of no state, and of any state (a matrix, or decay alone), `join` hands states on, the second scan knows them.
//
// Numbers that are no bf16 are multiplied as two bf16, high and low, without the product of the lows: sixteen bits of each operand.
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
  // A packet holds a chunk's operands: T (high, low), left rows where they are not the keys, keys, values by slices, queries,
  // P (high, low); then numbers of each row and channel.
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
  // Decay between the start of a sub-block and the end of another: of row and column sub-blocks w ≥ v at w (w + 1) / 2 + v, and of
  // a sub-block from the chunk's start and to its end.
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
}

/// A matrix in memory: the state's row is a channel.
struct States {
  float* data;
  int64_t row, column;
};

/// sum += A·B, of A and of B high and low where there are both.
template <int Steps, bool ALow, bool BLow, int N, class Multiply>
__device__ __forceinline__ void product(float (&sum)[N], const uint32_t* high, const uint32_t* low, uint64_t b,
                                        uint64_t b_low, bool start, Multiply multiply) {
#pragma unroll
  for (int k = 0; k < Steps; ++k) {
    multiply(sum, high + 4 * k, b, k, start && k == 0 ? 0 : 1);
    if constexpr (ALow) multiply(sum, low + 4 * k, b, k, 1);
    if constexpr (BLow) multiply(sum, high + 4 * k, b_low, k, 1);
  }
}
/// B as [N][K] in panels of 64 k.
struct AlongK {
  __device__ __forceinline__ void operator()(float (&sum)[32], const uint32_t* a, uint64_t b, int k, int accumulate) const {
    Product<64>::register_a_k(sum, a, b + k / 4 * (kPanel / 16) + k % 4 * 2, accumulate);
  }
};
/// B as [K][N].
template <int D> struct AcrossK {
  __device__ __forceinline__ void operator()(float (&sum)[D / 2], const uint32_t* a, uint64_t b, int k, int accumulate) const {
    Product<D>::register_a(sum, a, b + k * (2048 / 16), accumulate);
  }
};

/// What a block of the scan works on.
struct Place {
  int s, n, chunks, per, part, first, count, slice, columns, groups;
  bool transition;  // the slice is one of the transition matrix
};

/// Where things lie in a stage.
template <class F, bool Out>
struct Stage {
  static constexpr int bytes = F::template stage<Out>(), count = F::template stages<Out>();
  static constexpr int left = F::triangle * kPanel, keys = left + F::left * kPanel, values = F::keys * kPanel,
                       queries = values + F::values * kPanel, pairs = queries + F::rows * kPanel,
                       numbers = Out ? pairs + 2 * kPanel : queries;
};

/// One thread brings chunk after chunk.
template <class F, bool Out>
__device__ __forceinline__ void bring(const Job& a, const Place& at, uint8_t* memory, uint64_t* full, uint64_t* empty) {
  using S = Stage<F, Out>;
  const uint8_t* packet = a.packets + (first_packet(a, at.s) + at.first) * a.packet;
  for (int i = 0; i < at.count; ++i, packet += a.packet) {
    const int slot = i % S::count;
    barrier_wait(empty + slot, uint32_t(i / S::count + 1) & 1);
    const uint8_t* queries = packet + (F::keys + a.slices * F::values) * kPanel;
    uint8_t* to = memory + slot * S::bytes;
    barrier_expect(full + slot,
                   uint32_t(F::keys + (at.transition ? 0 : F::values) + (Out ? F::queries : 0)) * kPanel + F::numbers);
    bulk_load(to, packet, F::keys * kPanel, full + slot);
    if (!at.transition)
      bulk_load(to + S::values, packet + (F::keys + at.slice * F::values) * kPanel, F::values * kPanel, full + slot);
    if (Out) bulk_load(to + S::queries, queries, F::queries * kPanel, full + slot);
    bulk_load(to + S::numbers, queries + F::queries * kPanel, F::numbers, full + slot);
  }
}

/// A warpgroup's walk through the chunks. It holds 64 columns of the state, transposed: rows of the accumulators are columns of the
/// state, so that a product's sums are the next one's A operand, and only what all columns share lies in shared memory.
template <class F, bool Out>
__device__ __forceinline__ void walk(const Job& a, const Place& at, uint8_t* memory, uint64_t* full, uint64_t* empty) {
  using S = Stage<F, Out>;
  constexpr int D = F::d;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4, c0 = lane % 4 * 2,
            column = at.slice * kSlice + group * 64 + warp % 4 * 16 + lane / 4;
  if (group >= at.groups) return;
  float state[D / 2];
  const int width = at.columns, s = at.s, n = at.n;
  const bool transition = at.transition;
  const int64_t piece = int64_t(s) * a.parts + at.part;
  {
    States from{nullptr, a.in.d_v, 1};
    if (at.part == 0) from = {const_cast<float*>(a.in.state), a.in.state_stride[1], a.in.state_stride[2]};
    else if (Out) from.data = a.local + (piece - 1) * a.in.d * a.in.d_v;
    if (at.part == 0 && from.data) from.data += s * a.in.state_stride[0];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      const int c = i / 4 * 8 + c0 + i % 2, v = column + i / 2 % 2 * 8;
      state[i] = transition                             ? float(c == v)
                 : from.data && c < a.in.d && v < width ? from.data[c * from.row + v * from.column]
                                                        : 0;
    }
  }

  for (int chunk = 0; chunk < at.count; ++chunk) {
    const int slot = chunk % S::count;
    barrier_wait(full + slot, uint32_t(chunk / S::count) & 1);
    const uint8_t* stage = memory + slot * S::bytes;
    const uint64_t triangle = descriptor_k(stage), left = descriptor_k(stage + S::left),
                   keys = descriptor_mn(stage + S::keys, kPanel), queries = descriptor_k(stage + S::queries),
                   pairs = descriptor_k(stage + S::pairs);
    constexpr uint64_t kLow = F::split ? F::wide * kPanel / 16 : 0;  // from high rows to low ones
    const float* numbers = reinterpret_cast<const float*>(stage + S::numbers);
    const float *from_start = numbers + c0, *to_end = from_start + kChunk, *through = numbers + 2 * kChunk + c0;
    float out[32], known[32];
    uint32_t high[D / 4], low[D / 4];
    if constexpr (Out || F::delta) {
#pragma unroll
      for (int i = 0; i < D / 4; ++i) split_bf16(state[2 * i], state[2 * i + 1], high[i], low[i]);
      pin(high), pin(low);
      wgmma_fence();
      if constexpr (F::delta) {
        product<D / 16, true, F::split>(known, high, low, left, left + kLow, true, AlongK());
        wgmma_commit();
      }
      if constexpr (Out) {
        product<D / 16, true, F::split>(out, high, low, queries, queries + kLow, true, AlongK());
        wgmma_commit();
      }
    }
    // Values: fragments as the accumulators' layout has them.
    uint32_t value[16], value_low[16];
    auto take_values = [&] {
      const int j = lane / 16 * 8 + lane % 8, piece_of = warp % 4 * 2 + lane / 8 % 2;
      const uint32_t panel = shared_address(stage + S::values + group * kPanel);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t x[4], y[4] = {};
        load_transposed(x, panel + swizzled(16 * k + j, piece_of));
        if constexpr (F::low) load_transposed(y, panel + 2 * kPanel + swizzled(16 * k + j, piece_of));
#pragma unroll
        for (int i = 0; i < 4; ++i)
          value[4 * k + i] = transition ? 0 : x[i], value_low[4 * k + i] = transition ? 0 : y[i];
      }
    };
    uint32_t last[F::vector ? 1 : 16], last_low[F::vector ? 1 : 16];  // values as the chunk's end sees them
    constexpr bool kValueLow = F::low || F::delta, kLastLow = kValueLow || !F::vector;
    if constexpr (F::delta) {
      wgmma_wait<0>();  // for queries too: their operand's registers are wanted
      pin(known), pin(high), pin(low);
      if constexpr (Out) pin(out);
      take_values();
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        float by[2] = {1, 1};
        if constexpr (!F::vector) by[0] = from_start[i / 2 * 8], by[1] = from_start[i / 2 * 8 + 1];
        float x = __uint_as_float(value[i] << 16) - by[0] * known[2 * i],
              y = __uint_as_float(value[i] & 0xffff0000u) - by[1] * known[2 * i + 1];
        if constexpr (F::low)
          x += __uint_as_float(value_low[i] << 16), y += __uint_as_float(value_low[i] & 0xffff0000u);
        split_bf16(x, y, value[i], value_low[i]);
      }
      pin(value), pin(value_low);
      wgmma_fence();
      product<4, true, true>(known, value, value_low, triangle, triangle + kPanel / 16, true, AlongK());
      wgmma_commit();
      wgmma_wait<0>();
      pin(known), pin(value), pin(value_low);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        split_bf16(known[2 * i], known[2 * i + 1], value[i], value_low[i]);
        if constexpr (!F::vector)
          split_bf16(known[2 * i] * to_end[i / 2 * 8], known[2 * i + 1] * to_end[i / 2 * 8 + 1], last[i], last_low[i]);
      }
    } else {
      take_values();
#pragma unroll
      for (int i = 0; i < 16; ++i)
        if constexpr (!F::vector) {
          float x = __uint_as_float(value[i] << 16), y = __uint_as_float(value[i] & 0xffff0000u);
          if constexpr (F::low)
            x += __uint_as_float(value_low[i] << 16), y += __uint_as_float(value_low[i] & 0xffff0000u);
          split_bf16(x * to_end[i / 2 * 8], y * to_end[i / 2 * 8 + 1], last[i], last_low[i]);
        }
      if constexpr (Out) {
        wgmma_wait<0>();
        pin(high), pin(low);
      }
    }
    if constexpr (Out) {
      pin(out);
      if constexpr (!F::vector)
#pragma unroll
        for (int i = 0; i < 32; ++i) out[i] *= from_start[i / 4 * 8 + i % 2];
      pin(out), pin(value), pin(value_low);
      wgmma_fence();
      product<4, kValueLow, true>(out, value, value_low, pairs, pairs + kPanel / 16, false, AlongK());
      wgmma_commit();
    }
#pragma unroll
    for (int i = 0; i < D / 2; ++i) state[i] *= through[i / 4 * 8 + i % 2];
    if constexpr (!F::vector) pin(last), pin(last_low);
    else if constexpr (!Out) pin(value), pin(value_low);
    pin(state);
    wgmma_fence();
    product<4, kLastLow, F::split>(state, F::vector ? value : last, F::vector ? value_low : last_low, keys, keys + kLow,
                                   false, AcrossK<D>());
    wgmma_commit();
    if constexpr (Out) {
      wgmma_wait<1>();
      pin(out);
      const int row0 = (at.first + chunk) * kChunk;
      float* to = a.to.out + (a.in.qs.begin(s) + row0) * a.to.out_stride;
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int row = i / 4 * 8 + c0 + i % 2, v = column + i / 2 % 2 * 8;
        if (row0 + row < n && v < width) to[row * a.to.out_stride + v] = a.in.scale * out[i];
      }
    }
    wgmma_wait<0>();
    pin(state), pin(value), pin(value_low);
    if constexpr (!F::vector) pin(last), pin(last_low);
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + slot);
  }

  States to{nullptr, width, 1};
  if (!Out) to.data = (transition ? a.transit : a.local) + piece * a.in.d * width;
  else if (a.to.state && at.part == (at.chunks == 0 ? 0 : (at.chunks - 1) / at.per))
    to = {a.to.state + s * a.to.state_stride[0], a.to.state_stride[1], a.to.state_stride[2]};
  if (to.data)
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      const int c = i / 4 * 8 + c0 + i % 2, v = column + i / 2 % 2 * 8;
      if (c < a.in.d && v < width) to.data[c * to.row + v * to.column] = state[i];
    }
}

/// Two warpgroups that compute and one whose first thread loads. Grid: slices of columns (then, without Out, of the transition
/// matrix) × parts, segments.
template <class F, bool Out>
__global__ void __launch_bounds__(384, 1) scan_kernel(const __grid_constant__ Job a) {
  extern __shared__ __align__(1024) uint8_t memory[];
  using S = Stage<F, Out>;
  uint64_t *full = reinterpret_cast<uint64_t*>(memory + S::count * S::bytes), *empty = full + S::count;
  Place at;
  at.s = blockIdx.y, at.n = a.in.qs.length(at.s), at.chunks = (at.n + kChunk - 1) / kChunk;
  at.per = (at.chunks + a.parts - 1) / a.parts, at.part = blockIdx.x % a.parts, at.first = at.part * at.per;
  at.count = max(0, min(at.per, at.chunks - at.first)), at.slice = blockIdx.x / a.parts;
  at.transition = !Out && at.slice >= a.slices;
  if (at.transition) at.slice -= a.slices;
  at.columns = at.transition ? a.in.d : a.in.d_v;
  at.groups = min(2, (at.columns - at.slice * kSlice + 63) / 64);
  if (!Out && (at.part == a.parts - 1 || (at.transition && at.part == 0))) return;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::count; ++i) barrier_init(full + i, 1), barrier_init(empty + i, uint32_t(4 * at.groups));
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= 256) {
    registers_down<40>();
    if (threadIdx.x == 256) bring<F, Out>(a, at, memory, full, empty);
  } else {
    registers_up<232>();
    walk<F, Out>(a, at, memory, full, empty);
  }
}

constexpr int kJoined = 16;  // columns that a block of `join` holds

/// The state behind each part but the last: local_p += transition_p · local_(p − 1). Grid: column slices, segments.
template <class F>
__global__ void __launch_bounds__(256) join_kernel(const __grid_constant__ Job a) {
  constexpr int D = F::d;
  __shared__ float state[D][kJoined], by[D][33];
  const int s = blockIdx.y, tid = threadIdx.x, d = a.in.d, d_v = a.in.d_v, left = blockIdx.x * kJoined;
  const int chunks = (a.in.qs.length(s) + kChunk - 1) / kChunk, per = (chunks + a.parts - 1) / a.parts;
  float* local = a.local + int64_t(s) * a.parts * d * d_v;
  constexpr int kLanes = 256 / D, kHeld = kJoined / kLanes;  // threads a row, columns a thread
  const int row = tid / kLanes, v0 = tid % kLanes * kHeld;
  for (int p = 0; p + 1 < a.parts; ++p, local += int64_t(d) * d_v) {
    float sum[kHeld] = {};
    if constexpr (F::delta) {
      const float* transit = a.transit + (int64_t(s) * a.parts + p) * d * d;
      for (int c = 0; c < D && p > 0; c += 32) {
        for (int e = tid; e < D * 32; e += 256)
          by[e / 32][e % 32] = e / 32 < d && c + e % 32 < d ? transit[int64_t(e / 32) * d + c + e % 32] : 0;
        __syncthreads();
#pragma unroll 8
        for (int i = 0; i < 32; ++i)
#pragma unroll
          for (int v = 0; v < kHeld; ++v) sum[v] += by[row][i] * state[c + i][v0 + v];
        __syncthreads();
      }
    } else if (p > 0) {  // decay alone: the product over the part's chunks
      float product = 1;
      for (int i = p * per + tid % kLanes; i < min((p + 1) * per, chunks); i += kLanes) {
        const uint8_t* packet = a.packets + (first_packet(a, s) + i + 1) * a.packet - 1024;
        product *= reinterpret_cast<const float*>(packet)[2 * kChunk + row];
      }
#pragma unroll
      for (int step = 1; step < kLanes; step *= 2) product *= __shfl_xor_sync(~0u, product, step);
#pragma unroll
      for (int v = 0; v < kHeld; ++v) sum[v] = product * state[row][v0 + v];
      __syncthreads();
    }
#pragma unroll
    for (int v = 0; v < kHeld; ++v) {
      const bool in = row < d && left + v0 + v < d_v;
      float* at = local + int64_t(row) * d_v + left + v0 + v;
      state[row][v0 + v] = in ? sum[v] + *at : 0;
      if (in) *at = state[row][v0 + v];
    }
    __syncthreads();
  }
}

template <class K>
cudaError_t start(K kernel, dim3 grid, int threads, size_t shared, const Job& a, cudaStream_t stream) {
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (status != cudaSuccess) return status;
  kernel<<<grid, threads, shared, stream>>>(a);
  return cudaGetLastError();
}

/// Starts one of the steps: prepare, scan for what parts make of states, join, scan for outputs.
template <class F>
cudaError_t run_step(int step, const Job& a, int64_t bound, cudaStream_t stream) {
  const unsigned segments = unsigned(a.in.qs.count);
  switch (step) {
    case 0:
      return start(prepare_kernel<F>, dim3(blocks_for(ceil_div(bound, kChunk), segments), segments), 128,
                   sizeof(PrepareShared<F>), a, stream);
    case 1:
      return start(scan_kernel<F, false>, dim3(unsigned((a.slices + F::delta) * a.parts), segments), 384,
                   F::template stages<false>() * F::template stage<false>() + 64, a, stream);
    case 2: return start(join_kernel<F>, dim3(unsigned(ceil_div(a.in.d_v, kJoined)), segments), 256, 0, a, stream);
    default:
      return start(scan_kernel<F, true>, dim3(unsigned(a.slices * a.parts), segments), 384,
                   F::template stages<true>() * F::template stage<true>() + 64, a, stream);
  }
}

/// Calls `use` with the form that fits.
template <class Use>
auto with_form(const RecurView& in, Use use) {
  const bool delta = in.correction == Recur::Correction::Delta, vector = in.decay == Recur::Decay::Vector;
  const bool low = in.q.type != Dtype::BF16 || in.k.type != Dtype::BF16 || in.v.type != Dtype::BF16;
  auto of = [&]<int D>() {
    if (delta) {
      if (vector) return low ? use(Form<D, true, true, true>()) : use(Form<D, true, true, false>());
      return low ? use(Form<D, true, false, true>()) : use(Form<D, true, false, false>());
    }
    if (vector) return low ? use(Form<D, false, true, true>()) : use(Form<D, false, true, false>());
    return low ? use(Form<D, false, false, true>()) : use(Form<D, false, false, false>());
  };
  return in.d <= 64 ? of.template operator()<64>() : of.template operator()<128>();
}

/// Whether rows of q, k and v can be read 16 bytes at a time (if they are bf16).
bool lined(const RecurView& in) {
  auto fits = [](const Matrix& m) {
    return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride % 8 == 0 && m.width % 8 == 0;
  };
  return fits(in.q) && fits(in.k) && fits(in.v);
}

struct Sizes {
  int slices, parts;
  int64_t packet, packets, local, transit;  // bytes
  int64_t total() const { return packets + local + transit; }
};

/// Parts by shapes alone: as many as make one wave of an H100's multiprocessors, of eight chunks or more.
Sizes sizes(const RecurView& in, int64_t rows, int64_t bound) {
  Sizes out{};
  out.slices = int(ceil_div(in.d_v, kSlice));
  const int64_t wave = 132 / std::max<int64_t>(1, int64_t(in.qs.count) * out.slices);
  out.parts = int(std::clamp<int64_t>(wave, 1, std::max<int64_t>(1, ceil_div(bound, kChunk) / 8)));
  out.packet = with_form(in, [&](auto form) { return decltype(form)::packet(out.slices); });
  out.packets = (rows / kChunk + in.qs.count + 1) * out.packet;
  if (out.parts > 1) {
    out.local = ceil_div(int64_t(in.qs.count) * out.parts * in.d * in.d_v * 4, 256) * 256;
    if (in.correction == Recur::Correction::Delta) out.transit = int64_t(in.qs.count) * out.parts * in.d * in.d * 4;
  }
  return out;
}

}  // namespace

bool recur_sm90_fits(const RecurView& in, int64_t bound) {
  const bool low = in.q.type != Dtype::BF16 || in.k.type != Dtype::BF16 || in.v.type != Dtype::BF16;
  return in.d > 32 && in.d <= 128 && !in.normalise && in.correction != Recur::Correction::LowRank &&
         bound >= (low ? 256 : 16);
}

int64_t recur_sm90_scratch(const RecurView& in, int64_t rows, int64_t bound) { return sizes(in, rows, bound).total(); }

cudaError_t recur_sm90(const RecurView& in, const RecurOut& to, int64_t rows, int64_t bound, void* scratch,
                       cudaStream_t stream) {
  const Sizes size = sizes(in, rows, bound);
  Job a{in, to, static_cast<uint8_t*>(scratch), size.packet, size.parts, size.slices, nullptr, nullptr, lined(in)};
  a.local = reinterpret_cast<float*>(a.packets + size.packets);
  a.transit = reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(a.local) + size.local);
  return with_form(in, [&](auto form) {
    cudaError_t status = cudaSuccess;
    for (int step = 0; step < 4 && status == cudaSuccess; ++step)
      if (a.parts > 1 || step == 0 || step == 3) status = run_step<decltype(form)>(step, a, bound, stream);
    return status;
  });
}

}  // namespace heed::cuda
