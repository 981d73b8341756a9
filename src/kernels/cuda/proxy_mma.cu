// proxy on the tensor cores. Cheap scores are not so cheap where their rows are long: XAttention's are those of stride · d
// channels, half a tera-operation a layer at 32k tokens.
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/proxy.cuh"

namespace heed::cuda {
namespace {

constexpr int kTile = 128, kThreads = 256, kDepth = 32;  // rows and columns of a block, channels of a stage
constexpr int kQuads = kTile * kDepth / 4 / kThreads;    // groups of four channels that a thread copies of either side

/// A stage of one side: each number as a bf16 and, unless numbers were bf16, what that leaves. Rows are padded so that eight
/// rows' 16 bytes lie in different banks.
struct Side {
  __nv_bfloat16 x[2][kTile][kDepth + 8];
};

/// The bf16 in the upper half.
__device__ inline float upper(uint32_t bits) { return __uint_as_float(bits & 0xffff0000u); }

/// Four channels of a row from c on, zeros past its end.
__device__ inline float4 four_of(const Matrix& from, int64_t row, int c) {
  if (row < 0 || c >= from.width) return {0, 0, 0, 0};
  if (from.type == Dtype::F32) return *reinterpret_cast<const float4*>(from.row<const float>(row) + c);
  const uint2 x = *reinterpret_cast<const uint2*>(from.row<const __nv_bfloat16>(row) + c);
  return {upper(x.x << 16), upper(x.x), upper(x.y << 16), upper(x.y)};
}

/// The stage's channels from `at` on, to registers; row(r) → the row, or −1.
template <class Row>
__device__ inline void fetch(float4 (&to)[kQuads], const Matrix& from, int at, Row row) {
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const int e = threadIdx.x + kThreads * i;
    to[i] = four_of(from, row(e / (kDepth / 4)), at + e % (kDepth / 4) * 4);
  }
}

template <int kParts>
__device__ inline void store(Side& to, const float4 (&from)[kQuads]) {
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const int e = threadIdx.x + kThreads * i, r = e / (kDepth / 4), c = e % (kDepth / 4) * 4;
    float4 x = from[i];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint2 word = {mma::pair_of(x.x, x.y), mma::pair_of(x.z, x.w)};
      *reinterpret_cast<uint2*>(&to.x[part][r][c]) = word;
      x.x -= upper(word.x << 16), x.y -= upper(word.x), x.z -= upper(word.y << 16), x.w -= upper(word.y);
    }
  }
}

/// Grid: tiles (strided), segments of q. A warp holds 64 rows by 32 columns.
template <int kParts>
__global__ void __launch_bounds__(kThreads) proxy_mma_kernel(const __grid_constant__ Scored a) {
  __shared__ __align__(16) Side q, k;
  const int s = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32, own_row = warp / 4 * 64,
            own_column = warp % 4 * 32;
  const int64_t q_first = a.qs.begin(s), k_first = a.ks.begin(a.keys_of(s)), out = a.at.begin(s);
  a.each_tile<kTile, kTile>(s, [&](int i0, int j0, int rows, int cols, bool hidden) {
    if (hidden) return a.hide_tile<kTile, kTile>(out, i0, j0, rows, cols);
    float sum[4][4][4] = {};  // 16 rows by 8 columns each
    float4 next_q[kQuads], next_k[kQuads];
    const auto fetch_both = [&](int at) {
      fetch(next_q, a.q, at, [&](int r) { return i0 + r < rows ? q_first + i0 + r : int64_t(-1); });
      fetch(next_k, a.k, at, [&](int r) { return j0 + r < cols ? k_first + j0 + r : int64_t(-1); });
    };
    fetch_both(0);
    for (int at = 0; at < a.q.width; at += kDepth) {
      __syncthreads();
      store<kParts>(q, next_q);
      store<kParts>(k, next_k);
      __syncthreads();
      if (at + kDepth < a.q.width) fetch_both(at + kDepth);
#pragma unroll
      for (int step = 0; step < kDepth; step += 16) {
        uint32_t b[kParts][2][4];
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
          for (int c = 0; c < 2; ++c)
            mma::load_four(b[part][c], &k.x[part][own_column + 16 * c + lane % 8 + lane / 16 * 8][step + lane / 8 % 2 * 8]);
#pragma unroll
        for (int t = 0; t < 4; ++t)
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            uint32_t x[4];
            mma::load_four(x, &q.x[part][own_row + 16 * t + lane % 16][step + lane / 16 * 8]);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              mma::multiply(sum[t][c], x, b[0][c / 2][c % 2 * 2], b[0][c / 2][c % 2 * 2 + 1]);
              if (kParts == 2 && part == 0)
                mma::multiply(sum[t][c], x, b[kParts - 1][c / 2][c % 2 * 2], b[kParts - 1][c / 2][c % 2 * 2 + 1]);
            }
          }
      }
    }
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int c = 0; c < 4; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = i0 + own_row + 16 * t + lane / 4 + e / 2 * 8, j = j0 + own_column + 8 * c + lane % 4 * 2 + e % 2;
          if (i < rows && j < cols)
            a.cells.set(out + int64_t(i) * cols + j, 0, a.hidden(i, j) ? -kInfinity : a.score(sum[t][c][e]));
        }
  });
}

}  // namespace

bool proxy_mma(Queue& queue, const Scored& a) {
  const auto fits = [](const Matrix& x) {
    return (x.type == Dtype::F32 || x.type == Dtype::BF16) && x.stride % 4 == 0 &&
           reinterpret_cast<uint64_t>(x.data) % 16 == 0;
  };
  // In narrow rows what the second bf16 leaves out shows.
  if (a.q.width < 64 || a.q.width % 4 || !fits(a.q) || !fits(a.k)) return false;
  const dim3 grid = a.tiles(kTile, kTile);
  // Keys of bf16 come from a model whose attention rounds queries to that as well.
  if (a.k.type == Dtype::F32) launch(queue, "proxy", proxy_mma_kernel<2>, grid, kThreads, 0, a);
  else launch(queue, "proxy", proxy_mma_kernel<1>, grid, kThreads, 0, a);
  return true;
}

}  // namespace heed::cuda
