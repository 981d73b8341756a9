#include "kernels/cuda/device.cuh"

namespace heed::cuda {
namespace {

struct Reduction {
  Matrix in, out;
  Segments ins, outs;
  const int64_t *rows, *cols;
  Reduce how;
};

/// A warp's lanes share a cell of out whose cells of in are many (Rows, Blocks); else a thread has one of its own
/// (Columns, Diagonals), so that neighbours read neighbours. Sums are f64: they may have 10⁵ terms, and memory is the limit.
__global__ void reduce_kernel(const __grid_constant__ Reduction a) {
  using To = Reduce::To;
  const int s = blockIdx.y;
  const int64_t rows = a.rows[s], cols = a.cols[s];
  const bool shared = a.how.to == To::Rows || a.how.to == To::Blocks;
  const int lanes = shared ? 32 : 1, lane = threadIdx.x % lanes, cells = blockDim.x / lanes;
  const int64_t cols_out = a.how.to == To::Blocks ? (cols + a.how.col_block - 1) / a.how.col_block
                           : a.how.to == To::Rows ? 1
                                                  : cols;
  const int64_t count_out = a.how.to == To::Blocks ? (rows + a.how.row_block - 1) / a.how.row_block * cols_out
                            : a.how.to == To::Rows ? rows
                                                   : cols;
  const int64_t in = a.ins.begin(s);
  for (int64_t e = int64_t(blockIdx.x) * cells + threadIdx.x / lanes; e < count_out; e += int64_t(gridDim.x) * cells) {
    double sum = 0;
    float top = -kInfinity;
    int64_t count = 0;
    auto take = [&](int64_t i, int64_t j) {
      const float x = a.in.get(in + i * cols + j);
      if (x == -kInfinity) return;
      sum += double(x);
      top = fmaxf(top, x);
      ++count;
    };
    if (a.how.to == To::Columns) {
#pragma unroll 4
      for (int64_t i = 0; i < rows; ++i) take(i, e);
    } else if (a.how.to == To::Diagonals) {
#pragma unroll 4
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t j = cols - rows + i - e;
        if (j >= 0 && j < cols) take(i, j);
      }
    } else {
      const bool blocks = a.how.to == To::Blocks;
      const int64_t first_row = blocks ? e / cols_out * a.how.row_block : e,
                    first_col = blocks ? e % cols_out * a.how.col_block : 0;
      const int64_t last_row = blocks ? min(rows, first_row + a.how.row_block) : e + 1,
                    last_col = blocks ? min(cols, first_col + a.how.col_block) : cols;
      const int wide = int(last_col - first_col), high = int(last_row - first_row);
      if (wide >= 32 || high == 1) {
        for (int r = 0; r < high; ++r)
          for (int c = lane; c < wide; c += 32) take(first_row + r, first_col + c);
      } else {
        for (int at = lane; at < high * wide; at += 32) take(first_row + at / wide, first_col + at % wide);
      }
      sum = warp_sum(sum);
      top = warp_max(top);
      count = warp_sum(count);
    }
    if (lane != 0) continue;
    float result = top;
    if (count > 0 && a.how.kind != ReduceKind::Max)
      result = float(a.how.kind == ReduceKind::Sum ? sum : sum / double(count));
    a.out.set(a.outs.begin(s) + e, 0, result);
  }
}

}  // namespace

void reduce(Queue& queue, const Grids& in, const Reduce& how, Grids out) {
  constexpr const char* where = "reduce";
  require(how.row_block >= 1 && how.col_block >= 1, where, "blocks have at least one row and column");
  require(out.cells.segments() == in.cells.segments(), where, "out has in's segments");
  const unsigned count = unsigned(in.cells.segments());
  const Reduction a{matrix(in.cells.values),
                    matrix(out.cells.values),
                    segments(in.cells),
                    segments(out.cells),
                    in.rows.as<int64_t>(),
                    in.cols.as<int64_t>(),
                    how};
  launch(queue, where, reduce_kernel, dim3(blocks_for(ceil_div(out.cells.values.size[0], 8), count), count), 256, 0, a);
}

}  // namespace heed::cuda
