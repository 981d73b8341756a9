#include "kernels/cuda/matmul.cuh"
#include "kernels/cuda/tile.cuh"

namespace heed::cuda {
namespace {

__global__ void __launch_bounds__(kTileThreads)
    matmul_plain_kernel(Matrix w, int outputs, Matrix x, int64_t tokens, const float* bias, bool accumulate, Matrix y) {
  __shared__ TileMemory memory;
  const int out = blockIdx.x * kKeys;
  const int64_t first = int64_t(blockIdx.y) * kRows;
  tile_dots(memory, x.width, numbers_of(x, [&](int r) { return first + r < tokens ? first + r : int64_t(-1); }),
            numbers_of(w, [&](int j) { return out + j < outputs ? int64_t(out + j) : int64_t(-1); }));
  for (int e = threadIdx.x; e < kRows * kKeys; e += kTileThreads) {
    const int r = e / kKeys, j = e % kKeys;
    if (first + r >= tokens || out + j >= outputs) continue;
    float& to = y.row<float>(first + r)[out + j];
    to = memory.scores[r][j] + (bias ? bias[out + j] : 0.0f) + (accumulate ? to : 0.0f);
  }
}

}  // namespace

void matmul_plain(Queue& queue, const Tensor& w, const Tensor& x, const Tensor& bias, bool accumulate, const Tensor& y) {
  launch(queue, "matmul", matmul_plain_kernel,
         dim3(unsigned(ceil_div(w.size[0], kKeys)), unsigned(ceil_div(x.size[0], kRows))), kTileThreads, 0, matrix(w),
         int(w.size[0]), matrix(x), x.size[0], bias.as<float>(), accumulate, matrix(y));
}

}  // namespace heed::cuda
