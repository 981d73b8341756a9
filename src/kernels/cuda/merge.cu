#include "kernels/cuda/device.cuh"

namespace heed::cuda {
namespace {

struct Parts {
  const float* outs;
  int64_t part_stride, row_stride;
  const float* weights;
  int64_t weight_stride, weight_row;
  int parts;
};

/// One block a row.
__global__ void merge_kernel(Parts a, Matrix out, float* lse, int64_t lse_stride) {
  const int64_t row = blockIdx.x;
  float top = -kInfinity, sum = 0;
  for (int p = 0; p < a.parts; ++p) top = fmaxf(top, a.weights[p * a.weight_stride + row * a.weight_row]);
  if (top > -kInfinity)
    for (int p = 0; p < a.parts; ++p) sum += expf(a.weights[p * a.weight_stride + row * a.weight_row] - top);
  for (int c = threadIdx.x; c < out.width; c += blockDim.x) {
    float x = 0;
    for (int p = 0; p < a.parts; ++p) {
      const float weight = a.weights[p * a.weight_stride + row * a.weight_row];
      if (weight == -kInfinity) continue;  // its out may hold anything
      x += expf(weight - top) / sum * a.outs[p * a.part_stride + row * a.row_stride + c];
    }
    out.set(row, c, x);
  }
  if (lse && threadIdx.x == 0) lse[row * lse_stride] = sum > 0 ? top + logf(sum) : -kInfinity;
}

}  // namespace

void merge(Queue& queue, Tensor outs, Tensor weights, Tensor out, Tensor lse) {
  require(outs.rank == 3, "merge", "outs is [parts, rows, d_v], got " + outs.shape());
  const int64_t parts = outs.size[0], rows = outs.size[1], d_v = outs.size[2];
  check_tensor("merge", "outs", outs, {parts, rows, d_v});
  check_tensor("merge", "weights", weights, {parts, rows});
  check_tensor("merge", "out", out, {rows, d_v});
  check_tensor("merge", "lse", lse, {rows}, true);
  const Parts a{outs.as<float>(),  outs.stride[0],    outs.stride[1], weights.as<float>(),
                weights.stride[0], weights.stride[1], int(parts)};
  launch(queue, "merge", merge_kernel, dim3(unsigned(rows)), d_v > 64 ? 128 : 64, 0, a, matrix(out), lse.as<float>(),
         lse ? lse.stride[0] : 0);
}

}  // namespace heed::cuda
