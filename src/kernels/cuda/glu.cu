#include "kernels/cuda/device.cuh"

namespace heed::cuda {
namespace {

__global__ void glu_kernel(Matrix gate, Matrix up, Activation activation, Matrix y, int64_t rows) {
  await();
  each_eight(rows, y.width, [&](int64_t row, int c) {
    float x[8], by[8];
    load8(gate.data, gate.type, row * gate.stride + c, y.width - c, x);
    load8(up.data, up.type, row * up.stride + c, y.width - c, by);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = by[i] * activate(activation, x[i]);
    store8(y, row, c, x);
  });
}

}  // namespace

void glu(Queue& queue, Tensor gate, Tensor up, Activation activation, Tensor y) {
  check_tensor("glu", "gate", gate, {gate.size[0], gate.size[1]}, false, row_type(gate));
  check_tensor("glu", "up", up, {gate.size[0], gate.size[1]}, false, row_type(up));
  check_tensor("glu", "y", y, {gate.size[0], gate.size[1]}, false, row_type(y));
  if (gate.numel() == 0) return;
  launch_early(queue, "glu", glu_kernel, blocks_for_eights(y.size[0], y.size[1]), 256, 0, matrix(gate), matrix(up),
               activation, matrix(y), y.size[0]);
}

}  // namespace heed::cuda
