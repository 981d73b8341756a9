// Products for many tokens: w goes through scratch in panels of bf16 that the L2 cache holds.
#include "kernels/cuda/matmul.cuh"

namespace heed::cuda {
namespace {

constexpr int64_t kPanelBytes = 24 << 20;

/// y = bias, or y += bias: what the product is added to.
__global__ void add_bias_kernel(Matrix y, int64_t rows, const float* bias, bool accumulate) {
  each_eight(rows, y.width, [&](int64_t row, int c) {
    float to[8], by[8];
    load8(bias, Dtype::F32, c, y.width - c, by);
    load8(y.data, Dtype::F32, row * y.stride + c, y.width - c, to);
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = by[i] + (accumulate ? to[i] : 0.0f);
    store8(static_cast<float*>(y.data), row * y.stride + c, y.width - c, to);
  });
}

/// y (+)= x · w^T, the rows of x in bf16 already.
void multiply(Queue& queue, const Tensor& w, const Tensor& x, bool add, const Tensor& y) {
  const Scratch scratch(queue.scratch);
  const int64_t outputs = w.size[0], inputs = w.size[1], tokens = x.size[0], width = x.size[1];
  const bool ready = w.type == Dtype::BF16 && width == inputs && w.stride[0] % 8 == 0 &&
                     reinterpret_cast<uint64_t>(w.data) % 16 == 0;
  const int64_t rows = ready ? outputs
                             : std::clamp<int64_t>(kPanelBytes / (2 * width) / 64 * 64, 64, std::max<int64_t>(64, outputs));
  const Tensor panel = ready ? w : queue.scratch.take(Dtype::BF16, {std::min(rows, outputs), width});
  for (int64_t first = 0; first < outputs; first += rows) {
    const int64_t here = std::min(rows, outputs - first);
    if (!ready) unpack_rows(queue, "matmul", w, nullptr, first, here, 1, matrix(panel));
    const Panel product{static_cast<const __nv_bfloat16*>(x.data),
                        static_cast<const __nv_bfloat16*>(panel.data),
                        width,
                        panel.stride[0],
                        y.as<float>() + first,
                        y.stride[0],
                        int(tokens),
                        int(here),
                        int(width),
                        add};
    if (!multiply_with_cublas(queue, product)) multiply_tiles(queue, product);
  }
}

}  // namespace

void matmul_many(Queue& queue, std::span<const Linear> each, const Tensor& x, bool accumulate) {
  constexpr const char* where = "matmul";
  const Scratch scratch(queue.scratch);
  const int64_t tokens = x.size[0], width = ceil_div(x.size[1], 8) * 8;
  const Tensor narrow = queue.scratch.take(Dtype::BF16, {tokens, width});
  round_rows(queue, where, matrix(x), tokens, matrix(narrow));
  for (const Linear& l : each) {
    if (l.bias)
      launch(queue, where, add_bias_kernel, blocks_for_eights(tokens, l.y.size[1]), 256, 0, matrix(l.y), tokens,
             l.bias.as<float>(), accumulate);
    multiply(queue, l.w, narrow, accumulate || l.bias, l.y);
  }
}

}  // namespace heed::cuda
