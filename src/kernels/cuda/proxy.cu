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

/// Grid: row tiles, column tiles (strided), segments of q (z).
__global__ void __launch_bounds__(kTileThreads) proxy_kernel(const __grid_constant__ Scored a) {
  __shared__ TileMemory memory;
  const int s = blockIdx.z, kv = a.keys_of(s), rows = a.qs.length(s), cols = a.ks.length(kv);
  for (int i0 = blockIdx.x * kRows; i0 < rows; i0 += gridDim.x * kRows)
    for (int j0 = blockIdx.y * kKeys; j0 < cols; j0 += gridDim.y * kKeys) {
      const int last = min(rows, i0 + kRows) - 1;
      if (a.hidden(last, j0)) {
        for (int e = threadIdx.x; e < kRows * kKeys; e += kTileThreads) {
          const int i = i0 + e / kKeys, j = j0 + e % kKeys;
          if (i < rows && j < cols) a.cells.set(a.at.begin(s) + int64_t(i) * cols + j, 0, -kInfinity);
        }
        continue;
      }
      tile_dots(memory, a.q.width,
                numbers_of(a.q, [&](int r) { return i0 + r < rows ? a.qs.begin(s) + i0 + r : int64_t(-1); }),
                numbers_of(a.k, [&](int j) { return j0 + j < cols ? a.ks.begin(kv) + j0 + j : int64_t(-1); }));
      for (int e = threadIdx.x; e < kRows * kKeys; e += kTileThreads) {
        const int i = i0 + e / kKeys, j = j0 + e % kKeys;
        if (i >= rows || j >= cols) continue;
        a.cells.set(a.at.begin(s) + int64_t(i) * cols + j, 0,
                    a.hidden(i, j) ? -kInfinity : a.score(memory.scores[e / kKeys][e % kKeys]));
      }
      __syncthreads();
    }
}

/// One block a row of a grid.
__global__ void softmax_rows_kernel(const __grid_constant__ Scored a) {
  const int s = blockIdx.y, kv = a.keys_of(s), rows = a.qs.length(s), cols = a.ks.length(kv);
  __shared__ float tops[32];
  for (int i = blockIdx.x; i < rows; i += gridDim.x) {
    const int64_t first = a.at.begin(s) + int64_t(i) * cols;
    float top = -kInfinity, sum = 0;
    for (int j = threadIdx.x; j < cols; j += blockDim.x) top = fmaxf(top, a.cells.get(first + j));
    top = warp_max(top);
    __syncthreads();
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
    __syncthreads();
    for (unsigned w = 0; w < blockDim.x / 32; ++w) top = fmaxf(top, tops[w]);
    if (top > -kInfinity)
      for (int j = threadIdx.x; j < cols; j += blockDim.x) sum += expf(a.cells.get(first + j) - top);
    sum = block_sum(sum);
    for (int j = threadIdx.x; j < cols; j += blockDim.x) {
      const float x = a.cells.get(first + j);
      a.cells.set(first + j, 0, x == -kInfinity ? 0.0f : expf(x - top) / sum);
    }
  }
}

}  // namespace

void proxy(Queue& queue, const Ragged& q, const Ragged& k, const Proxy& how, Grids out) {
  constexpr const char* where = "proxy";
  const int64_t h = q.heads, g = k.heads, w = q.values.size[1];
  require(q.values.rank == 2 && k.values.rank == 2 && is_float(q.values.type) && is_float(k.values.type) &&
              k.values.size[1] == w,
          where, "q and k are F32, BF16 or F16 of one width");
  require(h % g == 0 && q.sequences() == k.sequences() && out.cells.segments() == q.segments(), where,
          "q's heads are a multiple of k's, and out has q's segments");
  check_tensor(where, "rows", out.rows, {q.segments()}, false, Dtype::I64);
  check_tensor(where, "cols", out.cols, {q.segments()}, false, Dtype::I64);
  Scratch scratch(queue.scratch);
  Scored a{matrix(q.values),
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
  if (how.int8) {
    auto rounded = [&](const Ragged& x) {
      const Matrix to = matrix(queue.scratch.take(Dtype::F32, {std::max<int64_t>(1, x.values.size[0]), w}));
      const unsigned count = unsigned(x.segments());
      launch(queue, where, round_rows_kernel, dim3(blocks_for(x.values.size[0], count), count), 32, 0, matrix(x.values),
             segments(x), to);
      return to;
    };
    a.q = rounded(q);
    a.k = rounded(k);
  }
  const unsigned count = unsigned(q.segments());
  const int64_t sequences = std::max<int64_t>(1, q.sequences());
  const int64_t row_tiles = ceil_div(q.values.size[0] / h, kRows), column_tiles = ceil_div(k.values.size[0], kKeys);
  if (!proxy_mma(queue, a))
    launch(queue, where, proxy_kernel,
           dim3(unsigned(std::clamp<int64_t>(row_tiles, 1, 1024)),
                unsigned(std::clamp<int64_t>(ceil_div(column_tiles, sequences * g), 1, 64)), count),
           kTileThreads, 0, a);
  if (how.softmax)
    launch(queue, where, softmax_rows_kernel, dim3(blocks_for(q.values.size[0] / h, count), count), 256, 0, a);
}

}  // namespace heed::cuda
