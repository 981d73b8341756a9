#include "kernels/cuda/device.cuh"

namespace heed::cuda {
namespace {

__global__ void to_bf16_kernel(Matrix from, int64_t rows, Matrix to) {
  each_eight(rows, to.width, [&](int64_t row, int c) {
    float x[8];
    load8(from.data, from.type, row * from.stride + c, from.width - c, x);
    store8(to, row, c, x);
  });
}

}  // namespace

void round_rows(Queue& queue, const char* where, const Matrix& from, int64_t rows, const Matrix& to) {
  if (rows > 0 && to.width > 0)
    launch(queue, where, to_bf16_kernel, blocks_for_eights(rows, to.width), 256, 0, from, rows, to);
}

}  // namespace heed::cuda
