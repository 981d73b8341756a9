// Products for many tokens: w goes through scratch in panels of bf16.
#include "kernels/cuda/matmul.cuh"

namespace heed::cuda {
namespace {

constexpr int64_t kPanelBytes = 128 << 20;

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

bool ready(const Tensor& w, int64_t width) {
  return w.type == Dtype::BF16 && width == w.size[1] && w.stride[0] % 8 == 0 && reinterpret_cast<uint64_t>(w.data) % 16 == 0;
}

/// One panel's product, whose outputs are columns of y from `first` on.
void multiply_panel(Queue& queue, const Tensor& panel, const Tensor& x, bool add, const Tensor& y, int64_t first) {
  Matrix to = matrix(y);
  to.width = int(panel.size[0]);
  to.data = static_cast<char*>(to.data) + first * info(y.type).bytes;
  const Panel product{static_cast<const __nv_bfloat16*>(x.data),
                      static_cast<const __nv_bfloat16*>(panel.data),
                      x.stride[0],
                      panel.stride[0],
                      to,
                      int(x.size[0]),
                      int(panel.size[0]),
                      int(x.size[1]),
                      add};
  if (!multiply_with_cublas(queue, product)) multiply_tiles(queue, product);
}

/// y (+)= x · w^T of matrices whose outputs stand side by side, the rows of x in bf16 already.
void multiply(Queue& queue, std::span<const Linear> each, const Tensor& x, bool add) {
  const Scratch scratch(queue.scratch);
  const int64_t width = x.size[1], most = std::max<int64_t>(64, kPanelBytes / (2 * width) / 64 * 64);
  const Tensor& y = each[0].y;
  if (ready(each[0].w, width)) return multiply_panel(queue, each[0].w, x, add, y, 0);
  int64_t outputs = 0;
  for (const Linear& l : each) outputs += l.w.size[0];
  const Tensor panel = queue.scratch.take(Dtype::BF16, {std::min(most, outputs), width});
  int64_t done = 0, held = 0;  // outputs in y, and behind them in the panel
  for (const Linear& l : each)
    for (int64_t first = 0; first < l.w.size[0];) {
      const int64_t here = std::min(l.w.size[0] - first, panel.size[0] - held);
      unpack_rows(queue, "matmul", l.w, nullptr, first, here, 1, matrix(panel.slice(0, held, held + here)));
      first += here, held += here;
      if (held < panel.size[0] && done + held < outputs) continue;
      multiply_panel(queue, panel.slice(0, 0, held), x, add, y, done);
      done += held, held = 0;
    }
}

/// Whether the outputs of `b` stand right of those of `a`, and both come by way of panels.
bool side_by_side(const Linear& a, const Linear& b, int64_t width) {
  return !a.bias && !b.bias && a.add == b.add && a.y.type == b.y.type && a.y.stride[0] == b.y.stride[0] &&
         static_cast<char*>(a.y.data) + a.w.size[0] * info(a.y.type).bytes == b.y.data && !ready(a.w, width) &&
         !ready(b.w, width);
}

/// x as products read it: where it is, or in scratch.
Tensor bf16_rows(Queue& queue, const Tensor& x, const Norm* norm) {
  constexpr const char* where = "matmul";
  if (!norm && x.type == Dtype::BF16 && x.size[1] % 8 == 0 && x.stride[0] % 8 == 0 &&
      reinterpret_cast<uint64_t>(x.data) % 16 == 0)
    return x;
  const Tensor narrow = queue.scratch.take(Dtype::BF16, {x.size[0], ceil_div(x.size[1], 8) * 8});
  if (norm) norm_rows(queue, where, x, norm->weight, norm->eps, matrix(narrow));
  else round_rows(queue, where, matrix(x), x.size[0], matrix(narrow));
  return narrow;
}

}  // namespace

void matmul_many(Queue& queue, std::span<const Linear> each, const Tensor& x, const Norm* norm) {
  const Scratch scratch(queue.scratch);
  const int64_t tokens = x.size[0];
  const Tensor narrow = bf16_rows(queue, x, norm);
  for (size_t i = 0, end; i < each.size(); i = end) {
    const Linear& l = each[i];
    for (end = i + 1; end < each.size() && side_by_side(each[end - 1], each[end], narrow.size[1]);) ++end;
    if (l.bias)
      launch(queue, "matmul", add_bias_kernel, blocks_for_eights(tokens, l.y.size[1]), 256, 0, matrix(l.y), tokens,
             l.bias.as<float>(), l.add);
    multiply(queue, each.subspan(i, end - i), narrow, l.add || l.bias);
  }
}

}  // namespace heed::cuda
