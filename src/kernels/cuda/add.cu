#include "kernels/cuda/device.cuh"

namespace heed::cuda {
namespace {

__global__ void add_kernel(Matrix x, Matrix y, int64_t count) {
  for (int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; e < count; e += int64_t(gridDim.x) * blockDim.x) {
    const int64_t row = e / y.width;
    const int c = int(e % y.width);
    y.row<float>(row)[c] += x.row<float>(row)[c];
  }
}

}  // namespace

void add(Queue& queue, Tensor x, Tensor y) {
  check_tensor("add", "y", y, {x.size[0], x.size[1]});
  check_tensor("add", "x", x, {x.size[0], x.size[1]});
  const int64_t count = x.numel();
  if (count > 0)
    launch(queue, "add", add_kernel, blocks_for(ceil_div(count, 256), 1), 256, 0, matrix(x), matrix(y), count);
}

}  // namespace heed::cuda
