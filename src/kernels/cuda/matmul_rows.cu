// Products of weights that are not quantised with few tokens, in the form that takes any: a warp a row, its lanes numbers of it.
#include "kernels/cuda/matmul.cuh"

namespace heed::cuda {
namespace {

constexpr int kWarps = 4;

struct RowProducts {
  struct Part {
    WeightView w;
    const float* bias;
    Matrix y;
    int outputs;
    bool add;
  } part[kMostAtOnce];  // matrices of one type, whose outputs lie one behind another in the grid
  Matrix x;
  int first, tokens, outputs;  // tokens first … first + tokens; outputs of all parts

  /// The part that an output belongs to, and its number there.
  __device__ const Part& part_of(int& out) const {
    int i = 0;
    while (out >= part[i].outputs) out -= part[i++].outputs;
    return part[i];
  }
};

__device__ inline void finish(const RowProducts& a, const RowProducts::Part& part, int out, int t, float sum) {
  float* y = part.y.row<float>(a.first + t) + out;
  *y = sum + (part.bias ? part.bias[out] : 0.0f) + (part.add ? *y : 0.0f);
}

/// `wide`: rows of w and x are 16-byte aligned, so lanes take eight numbers at once.
template <class T, int kTokens>
__global__ void __launch_bounds__(kWarps * 32) rows_kernel(const __grid_constant__ RowProducts a, bool wide) {
  await();
  int out = blockIdx.x * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (out >= a.outputs) return;
  const RowProducts::Part& part = a.part_of(out);
  const int width = part.w.width;
  const T* row = part.w.plain.row<T>(out);
  float sum[kTokens] = {};
  int from = 0;
  if constexpr (sizeof(T) == 2) {
    if (wide) {
      from = width / 8 * 8;
#pragma unroll 2
      for (int c = 8 * lane; c < from; c += 256) {
        float w[8];
        unpack8<T>(*reinterpret_cast<const uint4*>(row + c), w);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          if (kTokens > 1 && t >= a.tokens) break;
          const float4* x = reinterpret_cast<const float4*>(a.x.row<float>(a.first + t) + c);
          const float4 low = x[0], high = x[1];
          sum[t] += w[0] * low.x + w[1] * low.y + w[2] * low.z + w[3] * low.w + w[4] * high.x + w[5] * high.y +
                    w[6] * high.z + w[7] * high.w;
        }
      }
    }
  }
  for (int c = from + lane; c < width; c += 32) {
    const float w = to_float(row[c]);
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
      if (t < a.tokens) sum[t] += w * a.x.row<float>(a.first + t)[c];
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const float total = warp_sum(sum[t]);
    if (lane == 0 && t < a.tokens) finish(a, part, out, t, total);
  }
}

template <class T>
void multiply_rows(Queue& queue, RowProducts& a, dim3 grid) {
  bool wide = reinterpret_cast<uint64_t>(a.x.data) % 16 == 0 && a.x.stride % 4 == 0;
  for (const RowProducts::Part& part : a.part)
    wide = wide && reinterpret_cast<uint64_t>(part.w.plain.data) % 16 == 0 &&
           part.w.plain.stride * int64_t(sizeof(T)) % 16 == 0;
  if (a.tokens == 1) launch_early(queue, "matmul", rows_kernel<T, 1>, grid, kWarps * 32, 0, a, wide);
  else launch_early(queue, "matmul", rows_kernel<T, 8>, grid, kWarps * 32, 0, a, wide);
}

}  // namespace

void matmul_rows(Queue& queue, std::span<const Linear> each, const Matrix& x, int64_t tokens) {
  const Dtype type = each[0].w.type;
  RowProducts a{};
  a.x = x;
  for (size_t i = 0; i < each.size(); ++i) {
    a.part[i] = {weight_view("matmul", each[i].w), each[i].bias.as<float>(), matrix(each[i].y), int(each[i].w.size[0]),
                 each[i].add};
    a.outputs += a.part[i].outputs;
  }
  const dim3 grid(unsigned(ceil_div(a.outputs, kWarps)));
  for (; a.first < tokens; a.first += 8) {
    a.tokens = int(std::min<int64_t>(8, tokens - a.first));
    if (type == Dtype::F32) multiply_rows<float>(queue, a, grid);
    else if (type == Dtype::BF16) multiply_rows<__nv_bfloat16>(queue, a, grid);
    else multiply_rows<__half>(queue, a, grid);
  }
}

}  // namespace heed::cuda
