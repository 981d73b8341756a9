#include "kernels/cuda/device.cuh"

namespace heed::cuda {
namespace {

/// Thread by number of out. Grid: segments, numbers (strided).
__global__ void pool_kernel(Matrix x, Segments xs, PoolKind kind, int block, Matrix out, Segments to) {
  const int s = blockIdx.x, length = xs.length(s);
  const int64_t blocks = (int64_t(length) + block - 1) / block, count = blocks * out.width;
  for (int64_t e = int64_t(blockIdx.y) * blockDim.x + threadIdx.x; e < count; e += int64_t(gridDim.y) * blockDim.x) {
    const int64_t b = e / out.width, first = xs.begin(s) + b * block;
    const int c = int(e % out.width), rows = int(min(int64_t(block), xs.end(s) - first));
    float result = 0;
    if (kind == PoolKind::Concat || kind == PoolKind::ConcatReversed) {
      const int place = c / x.width, r = kind == PoolKind::Concat ? place : block - 1 - place;
      if (r < rows) result = x.get(first + r, c % x.width);
    } else if (kind == PoolKind::First || kind == PoolKind::Last) {
      result = x.get(kind == PoolKind::First ? first : first + rows - 1, c);
    } else {
      float low = kInfinity, high = -kInfinity, sum = 0;
      for (int r = 0; r < rows; ++r) {
        const float value = x.get(first + r, c);
        low = fminf(low, value);
        high = fmaxf(high, value);
        sum += value;
      }
      result = kind == PoolKind::Mean  ? sum / float(rows)
               : kind == PoolKind::Sum ? sum
               : kind == PoolKind::Min ? low
                                       : high;
    }
    out.set(to.begin(s) + b, c, result);
  }
}

}  // namespace

void pool(Queue& queue, const Ragged& x, PoolKind kind, int block, Ragged out) {
  constexpr const char* where = "pool";
  const bool concat = kind == PoolKind::Concat || kind == PoolKind::ConcatReversed;
  const int64_t w = x.values.rank > 1 ? x.values.size[1] : 1, width_out = concat ? block * w : w;
  require(block >= 1 && is_float(x.values.type), where, "x is F32, BF16 or F16, and blocks have at least one row");
  require(out.segments() == x.segments() && (out.values.rank > 1 ? out.values.size[1] : 1) == width_out, where,
          "out has x's segments and is " + std::to_string(width_out) + " wide, got " + out.values.shape());
  const unsigned count = unsigned(x.segments());
  launch(queue, where, pool_kernel,
         dim3(count, blocks_for(ceil_div(ceil_div(x.values.size[0], block) * width_out, 256), count)), 256, 0,
         matrix(x.values), segments(x), kind, block, matrix(out.values), segments(out));
}

}  // namespace heed::cuda
