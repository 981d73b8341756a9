#include "kernels/cuda/device.cuh"

namespace heed::cuda {
namespace {

__global__ void glu_kernel(Matrix gate, Matrix up, Activation activation, Matrix y, int64_t count) {
  await();
  for (int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; e < count; e += int64_t(gridDim.x) * blockDim.x) {
    const int64_t row = e / y.width;
    const int c = int(e % y.width);
    const float x = gate.row<float>(row)[c];
    const float active = activation == Activation::Silu
                             ? x / (1 + expf(-x))
                             : 0.5f * x * (1 + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));  // √(2/π)
    y.row<float>(row)[c] = active * up.row<float>(row)[c];
  }
}

}  // namespace

void glu(Queue& queue, Tensor gate, Tensor up, Activation activation, Tensor y) {
  check_tensor("glu", "gate", gate, {gate.size[0], gate.size[1]});
  check_tensor("glu", "up", up, {gate.size[0], gate.size[1]});
  check_tensor("glu", "y", y, {gate.size[0], gate.size[1]});
  const int64_t count = gate.numel();
  if (count == 0) return;
  launch_early(queue, "glu", glu_kernel, blocks_for(ceil_div(count, 256), 1), 256, 0, matrix(gate), matrix(up),
               activation, matrix(y), count);
}

}  // namespace heed::cuda
