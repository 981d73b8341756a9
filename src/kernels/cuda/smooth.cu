#include "kernels/cuda/device.cuh"

namespace heed::cuda {
namespace {

__global__ void smooth_kernel(Matrix x, Segments xs, bool mean, int width, Matrix out) {
  const int s = blockIdx.x;
  const int64_t begin = xs.begin(s), end = xs.end(s);
  for (int64_t r = begin + int64_t(blockIdx.y) * blockDim.x + threadIdx.x; r < end; r += int64_t(gridDim.y) * blockDim.x) {
    float sum = 0, top = -kInfinity;
    for (int64_t j = max(begin, r - width / 2); j <= min(end - 1, r + width / 2); ++j) {
      const float value = x.get(j);
      sum += value;
      top = fmaxf(top, value);
    }
    out.set(r, 0, mean ? sum / float(width) : top);
  }
}

}  // namespace

void smooth(Queue& queue, const Ragged& x, PoolKind kind, int width, Tensor out) {
  constexpr const char* where = "smooth";
  require(width >= 1 && width % 2 == 1, where, "the window is odd");
  require(kind == PoolKind::Mean || kind == PoolKind::Max, where, "rows are smoothed by Mean or Max");
  check_tensor(where, "out", out, {x.values.size[0]});
  const unsigned count = unsigned(x.segments());
  launch(queue, where, smooth_kernel, dim3(count, blocks_for(ceil_div(x.values.size[0], 256), count)), 256, 0,
         matrix(x.values), segments(x), kind == PoolKind::Mean, width, matrix(out));
}

}  // namespace heed::cuda
