#include "kernels/cuda/device.cuh"

namespace heed::cuda {
namespace {

/// One block a row.
__global__ void rms_norm_kernel(Matrix x, const float* weight, float eps, Matrix y) {
  await();
  const float* from = x.row<float>(blockIdx.x);
  float* to = y.row<float>(blockIdx.x);
  float squares = 0;
  for (int c = threadIdx.x; c < x.width; c += blockDim.x) squares += from[c] * from[c];
  const float factor = 1 / sqrtf(block_sum(squares) / float(x.width) + eps);
  for (int c = threadIdx.x; c < x.width; c += blockDim.x) to[c] = from[c] * factor * (weight ? weight[c] : 1.0f);
}

}  // namespace

void rms_norm(Queue& queue, Tensor x, Tensor weight, float eps, Tensor y) {
  check_tensor("rms_norm", "x", x, {x.size[0], x.size[1]});
  check_tensor("rms_norm", "y", y, {x.size[0], x.size[1]});
  check_tensor("rms_norm", "weight", weight, {x.size[1]}, true);
  const int threads = x.size[1] >= 2048 ? 512 : x.size[1] >= 256 ? 128 : 32;
  launch_early(queue, "rms_norm", rms_norm_kernel, dim3(unsigned(x.size[0])), threads, 0, matrix(x), weight.as<float>(),
               eps, matrix(y));
}

}  // namespace heed::cuda
