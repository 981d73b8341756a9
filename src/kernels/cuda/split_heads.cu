#include "kernels/cuda/heads.cuh"

namespace heed::cuda {
namespace {

constexpr int kMostParts = 3, kSplitWarps = 8;

struct Split {
  struct Part {
    HeadRows from;
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
  for (int i = 0; item >= a.tokens * part->from.heads; ++part) {
    item -= a.tokens * part->from.heads;
    if (++i == a.parts) return;
  }
  const int head = int(item % part->from.heads);
  const int64_t t = item / part->from.heads;
  const int s = sequence_of(a.first, a.sequences, t);
  if (s < 0) return;
  const int64_t row = part->to.begin(s * part->from.heads + head) + t - a.first[s];
  put_row(part->from, t, head, a.eps, [&](int c, float x) { part->out.set(row, c, x); });
}

template <int N> __device__ inline void load_wide(const float* p, float* to) {
  if constexpr (N == 1) {
    *to = *p;
  } else if constexpr (N == 2) {
    const float2 x = *reinterpret_cast<const float2*>(p);
    to[0] = x.x, to[1] = x.y;
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 x = *reinterpret_cast<const float4*>(p + i);
      to[i] = x.x, to[i + 1] = x.y, to[i + 2] = x.z, to[i + 3] = x.w;
    }
  }
}
template <int N> __device__ inline void store_wide(const Matrix& to, int64_t row, int c, const float* x) {
  if (to.type != Dtype::BF16 || N == 1) {
    if (to.type != Dtype::F32 || N == 1) {
#pragma unroll
      for (int i = 0; i < N; ++i) to.set(row, c + i, x[i]);
      return;
    }
    float* p = to.row<float>(row) + c;
    if constexpr (N == 2) *reinterpret_cast<float2*>(p) = {x[0], x[1]};
#pragma unroll
    for (int i = 0; i + 4 <= N; i += 4) *reinterpret_cast<float4*>(p + i) = {x[i], x[i + 1], x[i + 2], x[i + 3]};
    return;
  }
#pragma unroll
  for (int i = 0; i + 2 <= N; i += 2)
    *reinterpret_cast<__nv_bfloat162*>(to.row<__nv_bfloat16>(row) + c + i) = __floats2bfloat162_rn(x[i], x[i + 1]);
}

/// Heads of 64 · kPairs channels, all of them turned or none: a block a token, so that its sines are made once for the heads
/// of a warp. A lane has kPairs pairs of channels.
template <int kPairs>
__global__ void __launch_bounds__(32 * kSplitWarps) split_rows_kernel(const __grid_constant__ Split a) {
  await();
  constexpr int d = 64 * kPairs;
  const int64_t t = blockIdx.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, s = sequence_of(a.first, a.sequences, t);
  if (s < 0) return;
  const int64_t in_sequence = t - a.first[s];
  for (int p = 0; p < a.parts; ++p) {
    const Split::Part& part = a.part[p];
    const HeadRows& from = part.from;
    const bool turned = from.rope.inv_freq, by_head = from.position_stride != 0, side_by_side = turned && !from.rope.neox;
    float sine[kPairs], cosine[kPairs];
    for (int head = warp; head < from.heads; head += kSplitWarps) {
      if (turned && (by_head || head == warp))
#pragma unroll
        for (int i = 0; i < kPairs; ++i)
          sincosf(float(from.position(t, head)) * from.rope.inv_freq[kPairs * lane + i], &sine[i], &cosine[i]);
      const float* x = from.row(t, head);
      // Channels of a lane: 2 · kPairs in a row, or kPairs in each half of the head.
      float u[kPairs], v[kPairs];
      if (side_by_side) {
        float both[2 * kPairs];
        load_wide<2 * kPairs>(x + 2 * kPairs * lane, both);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) u[i] = both[2 * i], v[i] = both[2 * i + 1];
      } else {
        load_wide<kPairs>(x + kPairs * lane, u), load_wide<kPairs>(x + d / 2 + kPairs * lane, v);
      }
      if (from.norm) {
        float squares = 0;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) squares += u[i] * u[i] + v[i] * v[i];
        const float factor = 1 / sqrtf(warp_sum(squares) / float(d) + a.eps);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          const int pair = kPairs * lane + i;
          u[i] *= factor * from.norm[side_by_side ? 2 * pair : pair];
          v[i] *= factor * from.norm[side_by_side ? 2 * pair + 1 : pair + d / 2];
        }
      }
      if (turned)
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          const float x0 = u[i], x1 = v[i];
          u[i] = x0 * cosine[i] - x1 * sine[i], v[i] = x0 * sine[i] + x1 * cosine[i];
        }
      const int64_t row = part.to.begin(s * from.heads + head) + in_sequence;
      if (side_by_side) {
        float both[2 * kPairs];
#pragma unroll
        for (int i = 0; i < kPairs; ++i) both[2 * i] = u[i], both[2 * i + 1] = v[i];
        store_wide<2 * kPairs>(part.out, row, 2 * kPairs * lane, both);
      } else {
        store_wide<kPairs>(part.out, row, kPairs * lane, u);
        store_wide<kPairs>(part.out, row, d / 2 + kPairs * lane, v);
      }
    }
  }
}

/// Whether a lane may load and store its numbers of every row together.
bool wide_rows(const Split::Part& part) {
  const auto whole = [](const void* p, int64_t stride, int64_t bytes) {
    return reinterpret_cast<uint64_t>(p) % 16 == 0 && stride * bytes % 16 == 0;
  };
  const HeadRows& from = part.from;
  return whole(from.x, from.token_stride, 4) && from.head_stride % 4 == 0 &&
         whole(part.out.data, part.out.stride, part.out.type == Dtype::F32 ? 4 : 2) &&
         (!from.rope.inv_freq || from.rope.dims == from.d);
}

}  // namespace

HeadRows head_rows(const char* where, const Heads& part, int64_t tokens) {
  const Tensor &x = part.x, &positions = part.positions;
  require(x.rank == 3, where, "x is [T, heads, d], got " + x.shape());
  const int64_t heads = x.size[1], d = x.size[2];
  check_tensor(where, "x", x, {tokens, heads, d});
  check_tensor(where, "norm", part.norm, {d}, true);
  if (const Rope* rope = part.rope) {
    require(rope->dims > 0 && rope->dims % 2 == 0 && rope->dims <= d, where,
            "rope turns an even number of channels, at most d");
    check_tensor(where, "inv_freq", rope->inv_freq, {rope->dims / 2});
    if (positions.rank == 2) check_tensor(where, "positions", positions, {tokens, heads}, false, Dtype::I32);
    else check_tensor(where, "positions", positions, {tokens}, false, Dtype::I32);
  }
  return {x.as<float>(),
          x.stride[0],
          x.stride[1],
          int(heads),
          int(d),
          part.norm.as<float>(),
          rope_view(part.rope),
          positions.as<int32_t>(),
          positions.rank == 2 ? positions.stride[0] : 0};
}

void split_heads(Queue& queue, Tensor first, float eps, std::span<const Heads> each) {
  constexpr const char* where = "split_heads";
  check_tensor(where, "first", first, {first.size[0]}, false, Dtype::I64);
  for (size_t from = 0; from < each.size(); from += kMostParts) {
    Split a{};
    a.tokens = each[from].x.size[0], a.sequences = int(first.size[0] - 1), a.first = first.as<int64_t>(), a.eps = eps;
    int64_t heads = 0;
    bool wide = a.tokens >= 64;  // of fewer, a warp a head fills the device better
    int d = 0;
    for (const Heads& part : each.subspan(from, std::min<size_t>(kMostParts, each.size() - from))) {
      Split::Part& to = a.part[a.parts++] = {head_rows(where, part, a.tokens), matrix(part.out.values), segments(part.out)};
      require(part.out.heads == to.from.heads && part.out.segments() == a.sequences * to.from.heads &&
                  part.out.values.rank == 2 && part.out.values.size[1] == to.from.d && is_float(part.out.values.type),
              where, "out has x's heads, sequences and width");
      wide = wide && wide_rows(to) && (d == 0 || d == to.from.d);
      d = to.from.d, heads += to.from.heads;
    }
    const dim3 grid = dim3(unsigned(a.tokens));
    if (wide && d == 64) launch_early(queue, where, split_rows_kernel<1>, grid, 32 * kSplitWarps, 0, a);
    else if (wide && d == 128) launch_early(queue, where, split_rows_kernel<2>, grid, 32 * kSplitWarps, 0, a);
    else if (wide && d == 256) launch_early(queue, where, split_rows_kernel<4>, grid, 32 * kSplitWarps, 0, a);
    else launch_early(queue, where, split_heads_kernel, dim3(unsigned(ceil_div(a.tokens * heads, 8))), 256, 0, a);
  }
}

}  // namespace heed::cuda
