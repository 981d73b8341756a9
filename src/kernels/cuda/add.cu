#include "kernels/cuda/device.cuh"

namespace heed::cuda {
namespace {

__global__ void add_kernel(Matrix x, Matrix y, int64_t rows) {
  each_eight(rows, y.width, [&](int64_t row, int c) {
    float a[8], b[8];
    load8(x.data, Dtype::F32, row * x.stride + c, y.width - c, a);
    load8(y.data, Dtype::F32, row * y.stride + c, y.width - c, b);
#pragma unroll
    for (int i = 0; i < 8; ++i) b[i] += a[i];
    store8(static_cast<float*>(y.data), row * y.stride + c, y.width - c, b);
  });
}

}  // namespace

void add(Queue& queue, Tensor x, Tensor y) {
  check_tensor("add", "y", y, {x.size[0], x.size[1]});
  check_tensor("add", "x", x, {x.size[0], x.size[1]});
  if (x.numel() > 0)
    launch(queue, "add", add_kernel, blocks_for_eights(y.size[0], y.size[1]), 256, 0, matrix(x), matrix(y), y.size[0]);
}

}  // namespace heed::cuda
