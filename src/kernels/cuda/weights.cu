// Unpacking of weights: embed, dequantise, and the panels that matmul multiplies.
#include "kernels/cuda/weights.cuh"

namespace heed::cuda {
namespace {

constexpr float kNaN = __builtin_nanf("");

struct Unpacking {
  WeightView w;
  const int32_t* ids;
  int64_t first, rows, w_rows;
  float scale;
  Matrix to;
  __device__ int64_t source(int64_t row) const {
    if (!ids) return first + row;
    const int64_t id = ids[first + row];
    return id >= 0 && id < w_rows ? id : -1;
  }
};

__global__ void unpack_plain_kernel(const __grid_constant__ Unpacking a) {
  const int64_t count = a.rows * a.to.width;
  for (int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; e < count; e += int64_t(gridDim.x) * blockDim.x) {
    const int64_t row = e / a.to.width, source = a.source(row);
    const int c = int(e % a.to.width);
    a.to.set(row, c, source < 0 ? kNaN : c < a.w.width ? a.w.plain.get(source, c) * a.scale : 0.0f);
  }
}

/// A run of 32 as 16 pairs of bf16.
template <Dtype kType>
__device__ inline void round_run(const Run& run, float scale, uint4 (&to)[4]) {
  uint32_t words[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(value_of<kType>(run, 2 * i) * scale,
                                                      value_of<kType>(run, 2 * i + 1) * scale);
    words[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
}

constexpr int kPanelWarps = 8;

/// A panel whose rows lie end to end. A lane's run are four pieces of 16 bytes; they change lanes in shared memory, so that a
/// warp's stores are 512 bytes in a row.
template <Dtype kType>
__global__ void __launch_bounds__(32 * kPanelWarps) unpack_panel_kernel(const __grid_constant__ Unpacking a) {
  __shared__ uint4 pieces[kPanelWarps][4 * 32];
  uint4* const own = pieces[threadIdx.x / 32];
  const unsigned runs = unsigned(a.w.width / 32), count = unsigned(a.rows) * runs, lane = threadIdx.x % 32;
  uint4* const to = static_cast<uint4*>(a.to.data);
  for (unsigned from = blockIdx.x * blockDim.x + threadIdx.x - lane; from < count; from += gridDim.x * blockDim.x) {
    const unsigned e = from + lane;
    if (e < count) {
      uint4 values[4];
      round_run<kType>(run_of<kType>(a.w.blocks + (a.first + e / runs) * a.w.row_bytes, e % runs), a.scale, values);
#pragma unroll
      for (unsigned j = 0; j < 4; ++j) own[4 * lane + (j ^ (lane / 2 % 4))] = values[j];
    }
    __syncwarp();
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned piece = 32 * i + lane, run = piece / 4;
      if (from + run < count) to[int64_t(from) * 4 + piece] = own[4 * run + (piece % 4 ^ (run / 2 % 4))];
    }
    __syncwarp();
  }
}

/// One thread a run of 32.
template <Dtype kType>
__global__ void unpack_blocks_kernel(const __grid_constant__ Unpacking a) {
  const int runs = a.w.width / 32;
  const int64_t count = a.rows * runs;
  for (int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; e < count; e += int64_t(gridDim.x) * blockDim.x) {
    const int64_t row = e / runs, source = a.source(row);
    const int r = int(e % runs);
    if (source < 0) {
      for (int i = 0; i < 32; ++i) a.to.set(row, 32 * r + i, kNaN);
      continue;
    }
    const Run run = run_of<kType>(a.w.blocks + source * a.w.row_bytes, r);
    if (a.to.type == Dtype::BF16) {  // scratch panels: aligned
      uint4 values[4];
      round_run<kType>(run, a.scale, values);
      uint4* out = reinterpret_cast<uint4*>(a.to.row<__nv_bfloat16>(row) + 32 * r);
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] = values[i];
    } else {
#pragma unroll
      for (int i = 0; i < 32; ++i) a.to.set(row, 32 * r + i, value_of<kType>(run, i) * a.scale);
    }
  }
}

}  // namespace

WeightView weight_view(const char* where, const Tensor& w) {
  const DtypeInfo kind = info(w.type);
  require(w.rank == 2 && (w.size[1] <= 1 || w.stride[1] == 1) && w.size[1] % kind.block == 0 &&
              (is_block(w.type) || is_float(w.type)),
          where, "weights are [rows, width] with contiguous rows of whole blocks, got " + w.shape());
  const uint64_t address = reinterpret_cast<uint64_t>(w.data);
  if (is_block(w.type) && address % (kind.bytes % 4 == 0 ? 4 : 2) != 0)
    throw Error(Code::Unsupported, where, "weights that are not aligned to 4 bytes");
  return {matrix(w), static_cast<const uint8_t*>(w.data), w.stride[0] / kind.block * kind.bytes, int(w.size[1])};
}

void unpack_rows(Queue& queue, const char* where, const Tensor& w, const int32_t* ids, int64_t first, int64_t rows,
                 float scale, const Matrix& to) {
  const Unpacking a{weight_view(where, w), ids, first, rows, w.size[0], scale, to};
  if (rows == 0 || to.width == 0) return;
  if (!is_block(w.type)) {
    launch(queue, where, unpack_plain_kernel, blocks_for(ceil_div(rows * to.width, 256), 1), 256, 0, a);
    return;
  }
  const int64_t runs = rows * (w.size[1] / 32);
  const bool panel = !ids && to.type == Dtype::BF16 && to.stride == w.size[1] && to.width == w.size[1] &&
                     runs < int64_t(1) << 31;
  with_block_type(w.type, [&]<Dtype kType>() {
    if (panel)
      launch(queue, where, unpack_panel_kernel<kType>, blocks_for(ceil_div(runs, 32 * kPanelWarps), 1),
             32 * kPanelWarps, 0, a);
    else launch(queue, where, unpack_blocks_kernel<kType>, blocks_for(ceil_div(runs, 128), 1), 128, 0, a);
  });
}

void embed(Queue& queue, Tensor w, Tensor ids, float scale, Tensor y) {
  check_tensor("embed", "ids", ids, {y.size[0]}, false, Dtype::I32);
  check_tensor("embed", "y", y, {ids.size[0], w.size[1]});
  unpack_rows(queue, "embed", w, ids.as<int32_t>(), 0, ids.size[0], scale, matrix(y));
}

void dequantise(Queue& queue, Tensor w, Tensor y) {
  check_tensor("dequantise", "y", y, {w.size[0], w.size[1]});
  unpack_rows(queue, "dequantise", w, nullptr, 0, w.size[0], 1, matrix(y));
}

}  // namespace heed::cuda
