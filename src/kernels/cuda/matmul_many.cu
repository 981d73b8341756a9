// Products for many tokens: w goes through scratch in panels of bf16 that the L2 cache holds.
#include "kernels/cuda/matmul.cuh"

namespace heed::cuda {
namespace {

constexpr int64_t kPanelBytes = 24 << 20;

__global__ void to_bf16_kernel(Matrix x, int64_t count, Matrix to) {
  for (int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; e < count; e += int64_t(gridDim.x) * blockDim.x) {
    const int64_t row = e / to.width;
    const int c = int(e % to.width);
    to.set(row, c, c < x.width ? x.row<float>(row)[c] : 0.0f);
  }
}

/// y = bias, or y += bias, or y = 0: what the product is added to.
__global__ void start_kernel(Matrix y, int64_t count, const float* bias, bool accumulate) {
  for (int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; e < count; e += int64_t(gridDim.x) * blockDim.x) {
    float& to = y.row<float>(e / y.width)[e % y.width];
    to = (bias ? bias[e % y.width] : 0.0f) + (accumulate ? to : 0.0f);
  }
}

}  // namespace

void matmul_many(Queue& queue, const Tensor& w, const Tensor& x, const Tensor& bias, bool accumulate, const Tensor& y) {
  constexpr const char* where = "matmul";
  Scratch scratch(queue.scratch);
  const int64_t outputs = w.size[0], inputs = w.size[1], tokens = x.size[0], width = ceil_div(inputs, 8) * 8;
  const Tensor narrow = queue.scratch.take(Dtype::BF16, {tokens, width});
  launch(queue, where, to_bf16_kernel, blocks_for(ceil_div(tokens * width, 256), 1), 256, 0, matrix(x), tokens * width,
         matrix(narrow));
  if (bias || !accumulate)
    launch(queue, where, start_kernel, blocks_for(ceil_div(y.numel(), 256), 1), 256, 0, matrix(y), y.numel(),
           bias.as<float>(), accumulate);

  const bool ready = w.type == Dtype::BF16 && width == inputs && w.stride[0] % 8 == 0 &&
                     reinterpret_cast<uint64_t>(w.data) % 16 == 0;
  const int64_t rows = ready ? outputs
                             : std::clamp<int64_t>(kPanelBytes / (2 * width) / 64 * 64, 64, std::max<int64_t>(64, outputs));
  const Tensor panel = ready ? w : queue.scratch.take(Dtype::BF16, {std::min(rows, outputs), width});
  for (int64_t first = 0; first < outputs; first += rows) {
    const int64_t here = std::min(rows, outputs - first);
    if (!ready) unpack_rows(queue, where, w, nullptr, first, here, 1, matrix(panel));
    const Panel product{static_cast<const __nv_bfloat16*>(narrow.data),
                        static_cast<const __nv_bfloat16*>(panel.data),
                        width,
                        panel.stride[0],
                        y.as<float>() + first,
                        y.stride[0],
                        int(tokens),
                        int(here),
                        int(width)};
    if (!multiply_with_cublas(queue, product)) multiply_tiles(queue, product);
  }
}

}  // namespace heed::cuda
