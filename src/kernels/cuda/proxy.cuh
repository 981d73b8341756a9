// What proxy.cu, proxy_mma.cu and proxy_reduce.cu share.
#pragma once
#include "kernels/cuda/device.cuh"

namespace heed::cuda {

struct Scored {
  Matrix q, k;
  Segments qs, ks;
  Matrix cells;
  Segments at;
  int h, g;
  float scale, softcap;
  bool softmax, causal;
  int q_tile, k_tile;
  int64_t offset;
  int64_t q_rows, k_rows;  // of all segments

  /// The segment of k that segment s of q meets.
  __device__ int keys_of(int s) const { return s / h * g + s % h * g / h; }
  /// Row i sees column j when some query of its tile sees some key of the block.
  __device__ bool hidden(int i, int j) const {
    return causal && int64_t(j) * k_tile > offset + int64_t(i + 1) * q_tile - 1;
  }
  /// Of `cols` columns those that row i sees: the first so many.
  __device__ int seen(int i, int cols) const {
    if (!causal) return cols;
    const int64_t sees = offset + int64_t(i + 1) * q_tile - 1;
    return sees < 0 ? 0 : int(min(int64_t(cols), sees / k_tile + 1));
  }
  /// Calls body(first row, first column, rows, columns, whether no row of it sees a column) for the block's tiles of
  /// segment s.
  template <int Rows, int Columns, class Body>
  __device__ void each_tile(int s, Body body) const {
    const int rows = qs.length(s), cols = ks.length(keys_of(s)), across = (cols + Columns - 1) / Columns;
    const int64_t tiles = int64_t((rows + Rows - 1) / Rows) * across;
    for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
      const int i0 = int(t / across) * Rows, j0 = int(t % across) * Columns;
      body(i0, j0, rows, cols, hidden(min(rows, i0 + Rows) - 1, j0));
    }
  }
  /// A tile that nobody sees. The softmax does not look at it.
  template <int Rows, int Columns>
  __device__ void hide_tile(int64_t first, int i0, int j0, int rows, int cols) const {
    if (softmax) return;
    for (int e = threadIdx.x; e < Rows * Columns; e += blockDim.x) {
      const int i = i0 + e / Columns, j = j0 + e % Columns;
      if (i < rows && j < cols) cells.set(first + int64_t(i) * cols + j, 0, -kInfinity);
    }
  }
  /// Blocks for each_tile: a few for each multiprocessor. Bounds are loose (rows may be a few of many), so there is no
  /// block for every tile that there might be.
  dim3 tiles(int rows, int columns) const {
    const int64_t sequences = std::max<int64_t>(1, qs.count / h);
    const int64_t most = ceil_div(ceil_div(q_rows, h), rows) * (ceil_div(ceil_div(k_rows, columns), sequences * g) + 1);
    return {unsigned(std::clamp<int64_t>(most, 1, std::max(1, 8 * multiprocessors() / std::max(1, qs.count)))),
            unsigned(qs.count)};
  }
  __device__ float score(float dot) const {
    const float x = scale * dot;
    return softcap > 0 ? softcap * tanhf(x / softcap) : x;
  }
};

/// Checks the arguments (Error(Invalid)).
Scored scored(const char* where, const Ragged& q, const Ragged& k, const Proxy& how, const Grids& out);

/// Fills the cells by products on the tensor cores, of f32 numbers as two of bf16 each (some 2^-17 of a product is lost); false,
/// having done nothing, for what it does not take.
bool proxy_mma(Queue&, const Scored&);

}  // namespace heed::cuda
