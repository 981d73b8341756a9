// bf16 products without cuBLASLt: 64 × 64 tiles, four warps of 32 × 32, through the compiler's matrix fragments.
#include <mma.h>

#include "kernels/cuda/matmul.cuh"

namespace heed::cuda {
namespace {

using namespace nvcuda;
constexpr int kTile = 64, kDepth = 32, kPad = kDepth + 8;

__device__ void load_tile(__nv_bfloat16 (*to)[kPad], const __nv_bfloat16* from, int64_t stride, int first, int rows,
                          int at, int width) {
  for (int e = threadIdx.x; e < kTile * kDepth / 8; e += blockDim.x) {
    const int r = e / (kDepth / 8), c = e % (kDepth / 8) * 8;
    uint4 x = make_uint4(0, 0, 0, 0);
    if (first + r < rows && at + c < width) x = *reinterpret_cast<const uint4*>(from + (first + r) * stride + at + c);
    *reinterpret_cast<uint4*>(&to[r][c]) = x;
  }
}

__global__ void __launch_bounds__(128) tiles_kernel(const __grid_constant__ Panel p) {
  __shared__ __align__(16) __nv_bfloat16 x[kTile][kPad], w[kTile][kPad];
  __shared__ __align__(16) float sums[kTile][kTile + 4];
  const int out = blockIdx.x * kTile, first = blockIdx.y * kTile, warp = threadIdx.x / 32, top = warp / 2 * 32,
            left = warp % 2 * 32;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum[2][2];
  for (auto& line : sum)
    for (auto& f : line) wmma::fill_fragment(f, 0.0f);
  for (int at = 0; at < p.width; at += kDepth) {
    __syncthreads();
    load_tile(x, p.x, p.x_stride, first, p.tokens, at, p.width);
    load_tile(w, p.w, p.w_stride, out, p.outputs, at, p.width);
    __syncthreads();
    for (int k = 0; k < kDepth; k += 16) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, __nv_bfloat16, wmma::row_major> a[2];
      wmma::fragment<wmma::matrix_b, 16, 16, 16, __nv_bfloat16, wmma::col_major> b[2];
      for (int i = 0; i < 2; ++i) {
        wmma::load_matrix_sync(a[i], &x[top + 16 * i][k], kPad);
        wmma::load_matrix_sync(b[i], &w[left + 16 * i][k], kPad);
      }
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j) wmma::mma_sync(sum[i][j], a[i], b[j], sum[i][j]);
    }
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j)
      wmma::store_matrix_sync(&sums[top + 16 * i][left + 16 * j], sum[i][j], kTile + 4, wmma::mem_row_major);
  __syncthreads();
  for (int e = threadIdx.x; e < kTile * kTile; e += blockDim.x) {
    const int r = e / kTile, c = e % kTile;
    if (first + r >= p.tokens || out + c >= p.outputs) continue;
    p.y.set(first + r, out + c, sums[r][c] + (p.add ? p.y.get(first + r, out + c) : 0.0f));
  }
}

}  // namespace

void multiply_tiles(Queue& queue, const Panel& panel) {
  launch(queue, "matmul", tiles_kernel,
         dim3(unsigned(ceil_div(panel.outputs, kTile)), unsigned(ceil_div(panel.tokens, kTile))), 128, 0, panel);
}

}  // namespace heed::cuda
