#include "kernels/cuda/device.cuh"

namespace heed::cuda {
namespace {

/// Head dims that are multiples of eight.
__global__ void merge_eights_kernel(Matrix in, Segments from, const int64_t* first, int sequences, Matrix y, int64_t tokens) {
  await();
  each_eight(tokens, y.width, [&](int64_t t, int c) {
    const int s = sequence_of(first, sequences, t), head = c / in.width;
    if (s < 0) return;
    float x[8];
    load8(in.data, in.type, (from.begin(s * from.heads + head) + t - first[s]) * in.stride + c - head * in.width, 8, x);
    store8(y, t, c, x);
  });
}

__global__ void merge_heads_kernel(Matrix in, Segments from, const int64_t* first, int sequences, Matrix y, int64_t count) {
  await();
  for (int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; e < count; e += int64_t(gridDim.x) * blockDim.x) {
    const int64_t t = e / y.width;
    const int column = int(e % y.width), s = sequence_of(first, sequences, t);
    if (s < 0) continue;
    const int64_t row = from.begin(s * from.heads + column / in.width) + t - first[s];
    y.set(t, column, in.get(row, column % in.width));
  }
}

}  // namespace

void merge_heads(Queue& queue, const Ragged& in, Tensor first, Tensor y) {
  constexpr const char* where = "merge_heads";
  const int64_t sequences = first.size[0] - 1, heads = in.heads, d_v = in.values.size[1];
  check_tensor(where, "first", first, {sequences + 1}, false, Dtype::I64);
  check_tensor(where, "y", y, {y.size[0], heads * d_v}, false, row_type(y));
  require(in.segments() == sequences * heads, where, "in has a segment for each sequence and head");
  const int64_t count = y.numel();
  if (count == 0) return;
  if (d_v % 8 == 0) {
    launch_early(queue, where, merge_eights_kernel, blocks_for_eights(y.size[0], y.size[1]), 256, 0, matrix(in.values),
                 segments(in), first.as<int64_t>(), int(sequences), matrix(y), y.size[0]);
    return;
  }
  launch_early(queue, where, merge_heads_kernel, blocks_for(ceil_div(count, 256), 1), 256, 0, matrix(in.values),
               segments(in), first.as<int64_t>(), int(sequences), matrix(y), count);
}

}  // namespace heed::cuda
