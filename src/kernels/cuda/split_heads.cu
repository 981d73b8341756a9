#include "kernels/cuda/device.cuh"

namespace heed::cuda {
namespace {

constexpr int kMostParts = 3;

struct Split {
  struct Part {
    const float* x;
    int64_t token_stride, head_stride;
    int heads, d;
    const float* norm;
    RopeView rope;
    const int32_t* positions;
    int64_t position_stride;  // 0: one position a token
    Matrix out;
    Segments to;
  } part[kMostParts];
  int parts, sequences;
  int64_t tokens;
  const int64_t* first;
  float eps;
};

/// One warp a (part, token, head).
__global__ void split_heads_kernel(const __grid_constant__ Split a) {
  await();
  int64_t item = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  const Split::Part* part = a.part;
  for (int i = 0; item >= a.tokens * part->heads; ++part) {
    item -= a.tokens * part->heads;
    if (++i == a.parts) return;
  }
  const int lane = threadIdx.x % 32, head = int(item % part->heads);
  const int64_t t = item / part->heads;
  const int s = sequence_of(a.first, a.sequences, t);
  if (s < 0) return;
  const float* x = part->x + t * part->token_stride + head * part->head_stride;
  const int64_t row = part->to.begin(s * part->heads + head) + t - a.first[s];
  float factor = 1;
  if (part->norm) {
    float squares = 0;
    for (int c = lane; c < part->d; c += 32) squares += x[c] * x[c];
    factor = 1 / sqrtf(warp_sum(squares) / float(part->d) + a.eps);
  }
  auto value = [&](int c) { return part->norm ? x[c] * factor * part->norm[c] : x[c]; };
  const RopeView& rope = part->rope;
  const int turned = rope.inv_freq ? rope.dims : 0;
  if (turned) {
    const int32_t position = part->positions[part->position_stride ? t * part->position_stride + head : t];
    for (int pair = lane; pair < turned / 2; pair += 32) {
      const int first = rope.first(pair), second = rope.second(pair);
      float u = value(first), v = value(second);
      turn(u, v, float(position) * rope.inv_freq[pair]);
      part->out.set(row, first, u);
      part->out.set(row, second, v);
    }
  }
  for (int c = turned + lane; c < part->d; c += 32) part->out.set(row, c, value(c));
}

void check_heads(const char* where, const Heads& part, const Tensor& first) {
  const auto& [x, norm, rope, positions, out] = part;
  require(x.rank == 3, where, "x is [T, heads, d], got " + x.shape());
  const int64_t tokens = x.size[0], heads = x.size[1], d = x.size[2], sequences = first.size[0] - 1;
  check_tensor(where, "x", x, {tokens, heads, d});
  check_tensor(where, "norm", norm, {d}, true);
  require(out.heads == heads && out.segments() == sequences * heads && out.values.rank == 2 &&
              out.values.size[1] == d && is_float(out.values.type),
          where, "out has x's heads, sequences and width");
  if (!rope) return;
  require(rope->dims > 0 && rope->dims % 2 == 0 && rope->dims <= d, where,
          "rope turns an even number of channels, at most d");
  check_tensor(where, "inv_freq", rope->inv_freq, {rope->dims / 2});
  if (positions.rank == 2) check_tensor(where, "positions", positions, {tokens, heads}, false, Dtype::I32);
  else check_tensor(where, "positions", positions, {tokens}, false, Dtype::I32);
}

}  // namespace

void split_heads(Queue& queue, Tensor first, float eps, std::span<const Heads> each) {
  constexpr const char* where = "split_heads";
  check_tensor(where, "first", first, {first.size[0]}, false, Dtype::I64);
  for (size_t from = 0; from < each.size(); from += kMostParts) {
    Split a{};
    a.tokens = each[from].x.size[0], a.sequences = int(first.size[0] - 1), a.first = first.as<int64_t>(), a.eps = eps;
    int64_t heads = 0;
    for (const Heads& part : each.subspan(from, std::min<size_t>(kMostParts, each.size() - from))) {
      check_heads(where, part, first);
      require(part.x.size[0] == a.tokens, where, "all x have the same tokens");
      a.part[a.parts++] = {part.x.as<float>(),
                           part.x.stride[0],
                           part.x.stride[1],
                           int(part.x.size[1]),
                           int(part.x.size[2]),
                           part.norm.as<float>(),
                           rope_view(part.rope),
                           part.positions.as<int32_t>(),
                           part.positions.rank == 2 ? part.positions.stride[0] : 0,
                           matrix(part.out.values),
                           segments(part.out)};
      heads += part.x.size[1];
    }
    launch_early(queue, where, split_heads_kernel, dim3(unsigned(ceil_div(a.tokens * heads, 8))), 256, 0, a);
  }
}

}  // namespace heed::cuda
