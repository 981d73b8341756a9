#include "kernels/cuda/device.cuh"

namespace heed::cuda {
namespace {

struct Split {
  const float* x;
  int64_t token_stride, head_stride;
  int64_t tokens;
  int heads, d, sequences;
  const int64_t* first;
  const float* norm;
  float eps;
  RopeView rope;
  const int32_t* positions;
  int64_t position_stride;  // 0: one position a token
  Matrix out;
  Segments to;
};

/// One warp a (token, head).
__global__ void split_heads_kernel(Split a) {
  await();
  const int64_t item = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32, head = int(item % a.heads);
  const int64_t t = item / a.heads;
  if (t >= a.tokens) return;
  const int s = sequence_of(a.first, a.sequences, t);
  if (s < 0) return;
  const float* x = a.x + t * a.token_stride + head * a.head_stride;
  const int64_t row = a.to.begin(s * a.heads + head) + t - a.first[s];
  float factor = 1;
  if (a.norm) {
    float squares = 0;
    for (int c = lane; c < a.d; c += 32) squares += x[c] * x[c];
    factor = 1 / sqrtf(warp_sum(squares) / float(a.d) + a.eps);
  }
  auto value = [&](int c) { return a.norm ? x[c] * factor * a.norm[c] : x[c]; };
  const int turned = a.rope.inv_freq ? a.rope.dims : 0;
  if (turned) {
    const int32_t position = a.positions[a.position_stride ? t * a.position_stride + head : t];
    for (int pair = lane; pair < turned / 2; pair += 32) {
      const int first = a.rope.first(pair), second = a.rope.second(pair);
      float u = value(first), v = value(second);
      turn(u, v, float(position) * a.rope.inv_freq[pair]);
      a.out.set(row, first, u);
      a.out.set(row, second, v);
    }
  }
  for (int c = turned + lane; c < a.d; c += 32) a.out.set(row, c, value(c));
}

}  // namespace

void split_heads(Queue& queue, Tensor x, Tensor first, Tensor norm, float eps, const Rope* rope, Tensor positions,
                 Ragged out) {
  constexpr const char* where = "split_heads";
  require(x.rank == 3, where, "x is [T, heads, d], got " + x.shape());
  const int64_t tokens = x.size[0], heads = x.size[1], d = x.size[2], sequences = first.size[0] - 1;
  check_tensor(where, "x", x, {tokens, heads, d});
  check_tensor(where, "first", first, {sequences + 1}, false, Dtype::I64);
  check_tensor(where, "norm", norm, {d}, true);
  require(out.heads == heads && out.segments() == sequences * heads && out.values.rank == 2 &&
              out.values.size[1] == d && is_float(out.values.type),
          where, "out has x's heads, sequences and width");
  if (rope) {
    require(rope->dims > 0 && rope->dims % 2 == 0 && rope->dims <= d, where,
            "rope turns an even number of channels, at most d");
    check_tensor(where, "inv_freq", rope->inv_freq, {rope->dims / 2});
    if (positions.rank == 2) check_tensor(where, "positions", positions, {tokens, heads}, false, Dtype::I32);
    else check_tensor(where, "positions", positions, {tokens}, false, Dtype::I32);
  }
  const Split a{x.as<float>(),
                x.stride[0],
                x.stride[1],
                tokens,
                int(heads),
                int(d),
                int(sequences),
                first.as<int64_t>(),
                norm.as<float>(),
                eps,
                rope_view(rope),
                positions.as<int32_t>(),
                positions.rank == 2 ? positions.stride[0] : 0,
                matrix(out.values),
                segments(out)};
  launch_early(queue, where, split_heads_kernel, dim3(unsigned(ceil_div(tokens * heads, 8))), 256, 0, a);
}

}  // namespace heed::cuda
