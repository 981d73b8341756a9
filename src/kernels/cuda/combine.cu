#include "kernels/cuda/device.cuh"

namespace heed::cuda {
namespace {

__device__ float combined(float x, float y, Combine how, float factor) {
  switch (how) {
    case Combine::Add: return x + factor * y;
    case Combine::Multiply: return factor * x * y;
    case Combine::Divide: return y == 0 ? 0 : factor * x / y;
    case Combine::Max: return fmaxf(x, factor * y);
    case Combine::Exp: return expf(factor * x) * y;
    case Combine::Log: return factor * logf(x) * y;
    case Combine::Power: return powf(x, factor) * y;
    case Combine::AtLeast: return x >= factor * y ? 1 : 0;
    case Combine::Finite: return isfinite(x) ? x : factor * y;
    case Combine::Forced: return x == kInfinity ? x : factor * y;
  }
  return 0;
}

__global__ void combine_kernel(Matrix x, Matrix y, Combine how, float factor, Matrix out, int64_t count) {
  for (int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; e < count; e += int64_t(gridDim.x) * blockDim.x) {
    const int64_t row = e / x.width;
    const int c = int(e % x.width);
    out.set(row, c, combined(x.get(row, c), y ? y.get(row, y.width > 1 ? c : 0) : 1, how, factor));
  }
}

}  // namespace

void combine(Queue& queue, Tensor x, Tensor y, Combine how, float factor, Tensor out) {
  check_combine("combine", x, y, out);
  if (const int64_t count = x.numel(); count > 0)
    launch(queue, "combine", combine_kernel, blocks_for(ceil_div(count, 256), 1), 256, 0, matrix(x), matrix(y), how,
           factor, matrix(out), count);
}

}  // namespace heed::cuda
