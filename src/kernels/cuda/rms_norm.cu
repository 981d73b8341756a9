#include "kernels/cuda/matmul.cuh"

namespace heed::cuda {
namespace {

/// One block a row; a thread's first eight numbers stay in registers.
__global__ void rms_norm_kernel(Matrix x, const float* weight, float eps, Matrix y) {
  await();
  const int64_t row = blockIdx.x;
  const int width = x.width, first = 8 * threadIdx.x, step = 8 * blockDim.x;
  const auto load = [&](int c, float(&to)[8]) { load8(x.data, Dtype::F32, row * x.stride + c, width - c, to); };
  float kept[8], squares = 0;
  load(first, kept);
#pragma unroll
  for (int i = 0; i < 8; ++i) squares += kept[i] * kept[i];
  for (int c = first + step; c < width; c += step) {
    float more[8];
    load(c, more);
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += more[i] * more[i];
  }
  const float factor = 1 / sqrtf(block_sum(squares) / float(width) + eps);
  for (int c = first; c < y.width; c += step) {
    if (c > first) load(c, kept);
    float by[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    if (weight) load8(weight, Dtype::F32, c, width - c, by);
#pragma unroll
    for (int i = 0; i < 8; ++i) kept[i] *= factor * by[i];
    store8(y, row, c, kept);
  }
}

}  // namespace

void norm_rows(Queue& queue, const char* where, const Tensor& x, const Tensor& weight, float eps, const Matrix& to) {
  check_tensor(where, "x", x, {x.size[0], x.size[1]});
  check_tensor(where, "weight", weight, {x.size[1]}, true);
  const int threads = int(std::clamp<int64_t>(ceil_div(to.width, 256) * 32, 32, 1024));
  launch_early(queue, where, rms_norm_kernel, dim3(unsigned(x.size[0])), threads, 0, matrix(x), weight.as<float>(), eps, to);
}

void rms_norm(Queue& queue, Tensor x, Tensor weight, float eps, Tensor y) {
  check_tensor("rms_norm", "y", y, {x.size[0], x.size[1]});
  norm_rows(queue, "rms_norm", x, weight, eps, matrix(y));
}

}  // namespace heed::cuda
