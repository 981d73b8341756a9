#include "kernels/cuda/proxy.cuh"
#include "kernels/cuda/tile.cuh"

namespace heed::cuda {
namespace {

/// Rows rounded to 8 bits with one scale, as f32 numbers in scratch. Grid: rows. One block a row.
__global__ void round_rows_kernel(Matrix x, Segments xs, Matrix to) {
  const int s = blockIdx.y;
  for (int64_t r = xs.begin(s) + blockIdx.x; r < xs.end(s); r += gridDim.x) {
    float top = 0;
    for (int c = threadIdx.x; c < x.width; c += 32) top = fmaxf(top, fabsf(x.get(r, c)));
    const float scale = __fdiv_rn(warp_max(top), 127.0f);
    for (int c = threadIdx.x; c < x.width; c += 32)
      to.set(r, c, scale > 0 ? rintf(__fdiv_rn(x.get(r, c), scale)) * scale : 0.0f);
  }
}

/// Grid: tiles (strided), segments of q.
__global__ void __launch_bounds__(kTileThreads) proxy_kernel(const __grid_constant__ Scored a) {
  __shared__ TileMemory memory;
  const int s = blockIdx.y;
  const int64_t kv = a.keys_of(s), out = a.at.begin(s);
  a.each_tile<kRows, kKeys>(s, [&](int i0, int j0, int rows, int cols, bool hidden) {
    if (hidden) return a.hide_tile<kRows, kKeys>(out, i0, j0, rows, cols);
    tile_dots(memory, a.q.width,
              numbers_of(a.q, [&](int r) { return i0 + r < rows ? a.qs.begin(s) + i0 + r : int64_t(-1); }),
              numbers_of(a.k, [&](int j) { return j0 + j < cols ? a.ks.begin(kv) + j0 + j : int64_t(-1); }));
    for (int e = threadIdx.x; e < kRows * kKeys; e += kTileThreads) {
      const int i = i0 + e / kKeys, j = j0 + e % kKeys;
      if (i >= rows || j >= cols) continue;
      a.cells.set(out + int64_t(i) * cols + j, 0,
                  a.hidden(i, j) ? -kInfinity : a.score(memory.scores[e / kKeys][e % kKeys]));
    }
    __syncthreads();
  });
}

/// The largest of a block's numbers, for every thread.
__device__ inline float block_max(float x) {
  __shared__ float tops[32];
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = x;
  __syncthreads();
  for (unsigned w = 0; w < blockDim.x / 32; ++w) x = fmaxf(x, tops[w]);
  return x;
}

constexpr int kRowThreads = 512;

/// Softmax of a row's first `seen` cells, up to 4 · kRowThreads · Quads of them, which stay in registers; the others become 0.
template <int Quads>
__device__ inline void softmax_row(float* row, int seen, int cols) {
  float4 x[Quads];
  float top = -kInfinity, sum = 0;
#pragma unroll
  for (int quad = 0; quad < Quads; ++quad) {
    const int j = 4 * (quad * kRowThreads + int(threadIdx.x));
    float4& own = x[quad];
    own = j < seen ? *reinterpret_cast<const float4*>(row + j) : make_float4(-kInfinity, -kInfinity, -kInfinity, -kInfinity);
    if (j + 1 >= seen) own.y = -kInfinity;
    if (j + 2 >= seen) own.z = -kInfinity;
    if (j + 3 >= seen) own.w = -kInfinity;
    top = fmaxf(fmaxf(fmaxf(top, own.x), fmaxf(own.y, own.z)), own.w);
  }
  top = block_max(top);
  const float base = top == -kInfinity ? 0 : top;
#pragma unroll
  for (int quad = 0; quad < Quads; ++quad) {
    float4& own = x[quad];
    own = make_float4(expf(own.x - base), expf(own.y - base), expf(own.z - base), expf(own.w - base));
    sum += (own.x + own.y) + (own.z + own.w);
  }
  sum = block_sum(sum);
  const float by = sum > 0 ? 1 / sum : 0;
#pragma unroll
  for (int quad = 0; quad < Quads; ++quad) {
    const int j = 4 * (quad * kRowThreads + int(threadIdx.x));
    const float4& own = x[quad];
    if (j < cols) *reinterpret_cast<float4*>(row + j) = make_float4(own.x * by, own.y * by, own.z * by, own.w * by);
  }
  for (int j = 4 * (Quads * kRowThreads + int(threadIdx.x)); j < cols; j += 4 * kRowThreads)
    *reinterpret_cast<float4*>(row + j) = make_float4(0, 0, 0, 0);
}

/// Softmax of the cells of each row of a grid that the row sees; the others become 0. One block a row. Grid: rows (strided),
/// segments of q.
__global__ void __launch_bounds__(kRowThreads) softmax_rows_kernel(const __grid_constant__ Scored a) {
  const int s = blockIdx.y, rows = a.qs.length(s), cols = a.ks.length(a.keys_of(s));
  float* const cells = a.cells.row<float>(a.at.begin(s));
  for (int i = blockIdx.x; i < rows; i += gridDim.x) {
    const int seen = a.seen(i, cols);
    float* const row = cells + int64_t(i) * cols;
    if (cols % 4 == 0 && reinterpret_cast<uint64_t>(row) % 16 == 0 && seen <= 64 * kRowThreads) {
      if (seen <= 8 * kRowThreads) softmax_row<2>(row, seen, cols);
      else softmax_row<16>(row, seen, cols);
      continue;
    }
    float top = -kInfinity, sum = 0;
    for (int j = threadIdx.x; j < seen; j += kRowThreads) top = fmaxf(top, row[j]);
    top = block_max(top);
    if (top > -kInfinity)
      for (int j = threadIdx.x; j < seen; j += kRowThreads) sum += expf(row[j] - top);
    sum = block_sum(sum);
    for (int j = threadIdx.x; j < cols; j += kRowThreads)
      row[j] = j < seen && sum > 0 ? expf(row[j] - top) / sum : 0.0f;
  }
}

}  // namespace

Scored scored(const char* where, const Ragged& q, const Ragged& k, const Proxy& how, const Grids& out) {
  const int64_t h = q.heads, g = k.heads, w = q.values.size[1];
  require(q.values.rank == 2 && k.values.rank == 2 && is_float(q.values.type) && is_float(k.values.type) &&
              k.values.size[1] == w,
          where, "q and k are F32, BF16 or F16 of one width");
  require(h % g == 0 && q.sequences() == k.sequences() && out.cells.segments() == q.segments(), where,
          "q's heads are a multiple of k's, and out has q's segments");
  check_tensor(where, "rows", out.rows, {q.segments()}, false, Dtype::I64);
  check_tensor(where, "cols", out.cols, {q.segments()}, false, Dtype::I64);
  require(out.cells.values.type == Dtype::F32 && out.cells.values.stride[0] == 1, where, "cells are F32 and contiguous");
  return {matrix(q.values),
          matrix(k.values),
          segments(q),
          segments(k),
          matrix(out.cells.values),
          segments(out.cells),
          int(h),
          int(g),
          how.scale != 0 ? how.scale : 1 / std::sqrt(float(w)),
          how.softcap,
          how.softmax,
          how.causal,
          how.q_tile,
          how.k_tile,
          how.offset,
          q.values.size[0],
          k.values.size[0]};
}

void proxy(Queue& queue, const Ragged& q, const Ragged& k, const Proxy& how, Grids out) {
  constexpr const char* where = "proxy";
  Scratch scratch(queue.scratch);
  Scored a = scored(where, q, k, how, out);
  if (how.int8) {
    auto rounded = [&](const Ragged& x) {
      const Matrix to = matrix(queue.scratch.take(Dtype::F32, {std::max<int64_t>(1, x.values.size[0]), int64_t(a.q.width)}));
      const unsigned count = unsigned(x.segments());
      launch(queue, where, round_rows_kernel, dim3(blocks_for(x.values.size[0], count), count), 32, 0, matrix(x.values),
             segments(x), to);
      return to;
    };
    a.q = rounded(q);
    a.k = rounded(k);
  }
  const unsigned count = unsigned(q.segments());
  if (!proxy_mma(queue, a)) launch(queue, where, proxy_kernel, a.tiles(kRows, kKeys), kTileThreads, 0, a);
  if (how.softmax)
    launch(queue, where, softmax_rows_kernel, dim3(blocks_for(a.q_rows / a.h, count), count), kRowThreads, 0, a);
}

}  // namespace heed::cuda
