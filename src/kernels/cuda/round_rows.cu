#include "kernels/cuda/device.cuh"

namespace heed::cuda {
namespace {

__global__ void to_bf16_kernel(Matrix from, int64_t rows, Matrix to) {
  each_eight(rows, to.width, [&](int64_t row, int c) {
    float x[8];
    load8(from.data, from.type, row * from.stride + c, from.width - c, x);
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
      words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    *reinterpret_cast<uint4*>(to.row<__nv_bfloat16>(row) + c) = make_uint4(words[0], words[1], words[2], words[3]);
  });
}

}  // namespace

void round_rows(Queue& queue, const char* where, const Matrix& from, int64_t rows, const Matrix& to) {
  if (rows > 0 && to.width > 0)
    launch(queue, where, to_bf16_kernel, blocks_for_eights(rows, to.width), 256, 0, from, rows, to);
}

}  // namespace heed::cuda
