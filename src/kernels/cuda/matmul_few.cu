// Products for a few tokens. Bound by reading the weights: a warp takes a row of w, its lanes runs of it. Quantised
// weights meet activations of 8 bits with a scale for each 32, four products an instruction.
#include "kernels/cuda/matmul.cuh"

namespace heed::cuda {
namespace {

constexpr int kWarps = 4;

constexpr int kMostParts = 3;

struct Few {
  struct Part {
    WeightView w;
    const float* bias;
    Matrix y;
    int outputs;
    bool add;
  } part[kMostParts];  // matrices of one type, whose outputs lie one behind another in the grid
  Matrix x;
  const int8_t* codes;         // [tokens, inputs]
  const float* scales;         // [tokens, inputs / 32]
  const float* sums;           // [tokens, inputs / 16]: Σ scale · code
  int first, tokens, outputs;  // tokens first … first + tokens; outputs of all parts

  /// The part that an output belongs to, and its number there.
  __device__ const Part& part_of(int& out) const {
    int i = 0;
    while (out >= part[i].outputs) out -= part[i++].outputs;
    return part[i];
  }
};

/// One warp a run of 32 activations. Sums are of the rounded activations, as the products of codes are: an error of rounding
/// then meets the weight, small and of either sign, and not its code from 0 to 15. Decoding SmolLM2 (Q4_1), logits were 0.23 to
/// 0.42 (rms) from a CPU's with sums of x and are 0.12 to 0.20 with these, as two kinds of CPU are from each other.
__global__ void quantise_kernel(Matrix x, int64_t runs, int per_row, int8_t* codes, float* scales, float* sums) {
  await();
  const int64_t run = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (run >= runs) return;
  const int lane = threadIdx.x % 32;
  const float value = x.row<float>(run / per_row)[run % per_row * 32 + lane];
  const float scale = warp_max(fabsf(value)) / 127;
  const int code = scale > 0 ? int(rintf(value / scale)) : 0;
  codes[run * 32 + lane] = int8_t(code);
  const float sum = scale * float(warp_sum(code, 16));
  if (lane == 0) scales[run] = scale;
  if (lane % 16 == 0) sums[run * 2 + lane / 16] = sum;
}

__device__ inline void finish(const Few& a, const Few::Part& part, int out, int t, float sum) {
  float* y = part.y.row<float>(a.first + t) + out;
  *y = sum + (part.bias ? part.bias[out] : 0.0f) + (part.add ? *y : 0.0f);
}

template <Dtype kType, int kTokens>
__global__ void __launch_bounds__(kWarps * 32) few_blocks_kernel(const __grid_constant__ Few a) {
  await();
  int out = blockIdx.x * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (out >= a.outputs) return;
  const Few::Part& part = a.part_of(out);
  const uint8_t* row = part.w.blocks + out * part.w.row_bytes;
  const int runs = part.w.width / 32;
  float sum[kTokens] = {};
  // Several runs in flight: one token leaves registers for them.
#pragma unroll(kTokens == 1 ? 4 : 2)
  for (int r = lane; r < runs; r += 32) {
    const Run run = run_of<kType>(row, r);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (kTokens > 1 && t >= a.tokens) break;
      const int64_t at = int64_t(a.first + t) * runs + r;
      const int4* codes = reinterpret_cast<const int4*>(a.codes) + 2 * at;
      const int4 low = codes[0], high = codes[1];
      const float2 halves = reinterpret_cast<const float2*>(a.sums)[at];
      if constexpr (kHalves<kType>) sum[t] += dot<kType>(run, low, high, a.scales[at], {halves.x, halves.y});
      else sum[t] += dot<kType>(run, low, high, a.scales[at], {halves.x + halves.y});
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const float total = warp_sum(sum[t]);
    if (lane == 0 && t < a.tokens) finish(a, part, out, t, total);
  }
}

/// Plain weights. `wide`: rows of w and x are 16-byte aligned, so lanes take eight numbers at once.
template <class T, int kTokens>
__global__ void __launch_bounds__(kWarps * 32) few_plain_kernel(const __grid_constant__ Few a, bool wide) {
  await();
  int out = blockIdx.x * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (out >= a.outputs) return;
  const Few::Part& part = a.part_of(out);
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
void few_plain(Queue& queue, Few& a, dim3 grid) {
  bool wide = reinterpret_cast<uint64_t>(a.x.data) % 16 == 0 && a.x.stride % 4 == 0;
  for (const Few::Part& part : a.part)
    wide = wide && reinterpret_cast<uint64_t>(part.w.plain.data) % 16 == 0 &&
           part.w.plain.stride * int64_t(sizeof(T)) % 16 == 0;
  if (a.tokens == 1) launch_early(queue, "matmul", few_plain_kernel<T, 1>, grid, kWarps * 32, 0, a, wide);
  else launch_early(queue, "matmul", few_plain_kernel<T, 8>, grid, kWarps * 32, 0, a, wide);
}

/// Matrices of one type.
void few(Queue& queue, Few a, std::span<const Linear> each, int64_t tokens) {
  const Dtype type = each[0].w.type;
  for (size_t i = 0; i < each.size(); ++i) {
    a.part[i] = {weight_view("matmul", each[i].w), each[i].bias.as<float>(), matrix(each[i].y), int(each[i].w.size[0]),
                 each[i].add};
    a.outputs += a.part[i].outputs;
  }
  const dim3 grid(unsigned(ceil_div(a.outputs, kWarps)));
  for (; a.first < tokens; a.first += 8) {
    a.tokens = int(std::min<int64_t>(8, tokens - a.first));
    if (type == Dtype::F32) few_plain<float>(queue, a, grid);
    else if (type == Dtype::BF16) few_plain<__nv_bfloat16>(queue, a, grid);
    else if (type == Dtype::F16) few_plain<__half>(queue, a, grid);
    else
      with_block_type(type, [&]<Dtype kType>() {
        if (a.tokens == 1) launch_early(queue, "matmul", few_blocks_kernel<kType, 1>, grid, kWarps * 32, 0, a);
        else launch_early(queue, "matmul", few_blocks_kernel<kType, 8>, grid, kWarps * 32, 0, a);
      });
  }
}

}  // namespace

void matmul_few(Queue& queue, std::span<const Linear> each, const Tensor& x, const How& how) {
  Scratch scratch(queue.scratch);
  const int64_t inputs = x.size[1], tokens = x.size[0];
  Few a{};
  const auto norm = [&] {
    if (a.x) return;
    a.x = matrix(x);
    if (!how.norm) return;
    const Tensor normed = queue.scratch.take(Dtype::F32, {tokens, inputs});
    norm_rows(queue, "matmul", x, how.norm->weight, how.norm->eps, a.x = matrix(normed));
  };
  const auto round = [&] {
    const int64_t runs = tokens * inputs / 32;
    int8_t* codes = queue.scratch.take(Dtype::I8, {tokens * inputs}).as<int8_t>();
    float *scales = queue.scratch.take(Dtype::F32, {runs}).as<float>(),
          *sums = queue.scratch.take(Dtype::F32, {2 * runs}).as<float>();
    launch_early(queue, "matmul", quantise_kernel, dim3(unsigned(ceil_div(runs, 4))), 128, 0, a.x, runs,
                 int(inputs / 32), codes, scales, sums);
    a.codes = codes;
    a.scales = scales;
    a.sums = sums;
  };
  for (size_t i = 0, end; i < each.size(); i = end) {
    const Dtype type = each[i].w.type;
    for (end = i + 1; end < each.size() && end - i < kMostParts && each[end].w.type == type;) ++end;
    const auto same = each.subspan(i, end - i);
    if (tokens == 1 && matmul_one(queue, same, x, how)) continue;
    norm();
    if (is_block(type) && !a.codes) round();
    few(queue, a, same, tokens);
  }
}

}  // namespace heed::cuda
