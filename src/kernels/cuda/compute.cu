#include "kernels/cuda/device.cuh"

namespace heed::cuda {
namespace {

struct Place {
  double index, segment, place, length, channel;
};

__device__ double element(const Numbers::Step& s, double i) {
  if (s.size == 0) return 0;
  const int64_t at = i > 0 ? (i < double(s.size) ? int64_t(i) : s.size - 1) : 0;
  switch (s.type) {
    case Dtype::F32: return double(static_cast<const float*>(s.data)[at]);
    case Dtype::F64: return static_cast<const double*>(s.data)[at];
    case Dtype::BF16: return double(to_float(static_cast<const __nv_bfloat16*>(s.data)[at]));
    case Dtype::F16: return double(to_float(static_cast<const __half*>(s.data)[at]));
    case Dtype::I32: return double(static_cast<const int32_t*>(s.data)[at]);
    case Dtype::I64: return double(static_cast<const int64_t*>(s.data)[at]);
    default: return double(static_cast<const uint8_t*>(s.data)[at]);
  }
}

__device__ double floor_div(double a, double b) { return b == 0 ? 0 : floor(a / b); }

__device__ double evaluate(const Numbers& what, const Place& at) {
  using Op = Numbers::Op;
  double stack[Numbers::depth];
  int top = 0;
  for (int i = 0; i < what.count; ++i) {
    const Numbers::Step& s = what.steps[size_t(i)];
    switch (s.op) {
      case Op::Constant: stack[top++] = s.number; continue;
      case Op::Index: stack[top++] = at.index; continue;
      case Op::Segment: stack[top++] = at.segment; continue;
      case Op::Place: stack[top++] = at.place; continue;
      case Op::Length: stack[top++] = at.length; continue;
      case Op::Channel: stack[top++] = at.channel; continue;
      case Op::Find:
      case Op::Has: {
        top -= 2;
        int64_t low = int64_t(stack[top - 1]), high = int64_t(stack[top]);
        const int64_t end = high;
        const double x = stack[top + 1];
        while (low < high) {
          const int64_t middle = low + (high - low) / 2;
          if (element(s, double(middle)) < x) low = middle + 1;
          else high = middle;
        }
        stack[top - 1] = s.op == Op::Find ? double(low) : double(low < end && element(s, double(low)) == x);
        continue;
      }
      case Op::Matches: {
        top -= 2;
        const double a = stack[top - 1], b = stack[top];
        const int64_t n = int64_t(stack[top + 1]);
        int64_t count = 0;
        for (int64_t i = 0; i < n; ++i) count += element(s, a + double(i)) == element(s, b + double(i));
        stack[top - 1] = double(count);
        continue;
      }
      case Op::Pick:
        top -= 2;
        stack[top - 1] = stack[top - 1] != 0 ? stack[top] : stack[top + 1];
        continue;
      default: break;
    }
    const double x = stack[top - 1];
    double& to = stack[top - 1];
    switch (s.op) {
      case Op::Load: to = element(s, x); continue;
      case Op::Floor: to = floor(x); continue;
      case Op::Round: to = rint(x); continue;
      case Op::Exp: to = exp(x); continue;
      case Op::Log: to = log(x); continue;
      case Op::Log1p: to = log1p(x); continue;
      case Op::Sqrt: to = sqrt(x); continue;
      case Op::Tanh: to = tanh(x); continue;
      case Op::Acos: to = acos(x); continue;
      default: break;
    }
    const double a = stack[--top - 1], b = x;
    double& result = stack[top - 1];
    switch (s.op) {  // each rounded by itself, as on the CPU
      case Op::Add: result = __dadd_rn(a, b); break;
      case Op::Sub: result = __dsub_rn(a, b); break;
      case Op::Mul: result = __dmul_rn(a, b); break;
      case Op::Div: result = a / b; break;
      case Op::FloorDiv: result = floor_div(a, b); break;
      case Op::Mod: result = __dsub_rn(a, __dmul_rn(b, floor_div(a, b))); break;
      case Op::Min: result = b < a ? b : a; break;
      case Op::Max: result = b > a ? b : a; break;
      case Op::Less: result = double(a < b); break;
      case Op::LessEqual: result = double(a <= b); break;
      case Op::Equal: result = double(a == b); break;
      default: break;
    }
  }
  return stack[0];
}

struct Output {
  void* data;
  Dtype type;
  int64_t row_stride, stride, rows;
  int width;
  __device__ void set(int64_t row, int c, double x) const {
    const int64_t at = row * row_stride + c * stride;
    switch (type) {
      case Dtype::F32: static_cast<float*>(data)[at] = float(x); break;
      case Dtype::F64: static_cast<double*>(data)[at] = x; break;
      case Dtype::BF16: static_cast<__nv_bfloat16*>(data)[at] = __float2bfloat16_rn(float(x)); break;
      case Dtype::F16: static_cast<__half*>(data)[at] = __double2half(x); break;
      case Dtype::I32: static_cast<int32_t*>(data)[at] = int32_t(x); break;
      case Dtype::I64: static_cast<int64_t*>(data)[at] = int64_t(x); break;
      default: static_cast<uint8_t*>(data)[at] = uint8_t(int32_t(x));
    }
  }
};

/// A segment is that of a block or, with `short_ones`, of a warp. Grid: those (only x takes more than 65535), numbers
/// (strided); without segments all rows are one.
__global__ void compute_kernel(const __grid_constant__ Numbers what, Segments over, bool short_ones,
                               const __grid_constant__ Output out) {
  await();
  const int team = short_ones ? 32 : int(blockDim.x), rank = int(threadIdx.x) % team,
            s = blockIdx.x * (blockDim.x / team) + threadIdx.x / team;
  if (over.offsets && s >= over.count) return;
  const int64_t begin = over.offsets ? over.begin(s) : 0, length = over.offsets ? over.length(s) : out.rows;
  for (int64_t e = int64_t(blockIdx.y) * team + rank; e < length * out.width; e += int64_t(gridDim.y) * team) {
    const int64_t row = begin + e / out.width;
    const int c = int(e % out.width);
    out.set(row, c,
            evaluate(what, {double(row * out.width + c), double(s), double(row - begin), double(length), double(c)}));
  }
}

/// One warp.
__global__ void offsets_kernel(const void* lengths, bool wide, int64_t stride, int64_t count, int64_t* out,
                               int64_t out_stride) {
  const int lane = threadIdx.x;
  int64_t before = 0;
  for (int64_t first = 0; first < count; first += 32) {
    const int64_t i = first + lane;
    int64_t sum = 0;
    if (i < count)
      sum = wide ? static_cast<const int64_t*>(lengths)[i * stride]
                 : int64_t(static_cast<const int32_t*>(lengths)[i * stride]);
    for (int by = 1; by < 32; by *= 2) {
      const int64_t other = __shfl_up_sync(0xffffffffu, sum, by);
      if (lane >= by) sum += other;
    }
    if (i < count) out[(i + 1) * out_stride] = before + sum;
    before += __shfl_sync(0xffffffffu, sum, 31);
  }
  if (lane == 0) out[0] = 0;
}

}  // namespace

void compute(Queue& queue, const Numbers& what, const Ragged* over, Tensor out) {
  constexpr const char* where = "compute";
  require(what.count >= 1 && what.count <= Numbers::most && (out.rank == 1 || out.rank == 2), where,
          "a program of 1…" + std::to_string(Numbers::most) + " steps into numbers or rows of them");
  auto plain = [](Dtype t) {
    return is_float(t) || t == Dtype::F64 || t == Dtype::I32 || t == Dtype::I64 || t == Dtype::U8;
  };
  bool known = plain(out.type);
  for (int i = 0; i < what.count; ++i)
    if (what.steps[size_t(i)].data) known &= plain(what.steps[size_t(i)].type);
  require(known, where, "numbers are F32, BF16, F16, F64, I32, I64 or U8");
  const Output to{out.data,      out.type,
                  out.stride[0], out.rank > 1 ? out.stride[1] : 1,
                  out.size[0],   out.rank > 1 ? int(out.size[1]) : 1};
  const unsigned count = over ? unsigned(over->segments()) : 1;
  if (out.numel() == 0) return;
  const bool short_ones = over && out.numel() / std::max<int64_t>(1, over->segments()) <= 256;
  const unsigned teams = short_ones ? (count + 3) / 4 : count;
  launch_early(queue, where, compute_kernel, dim3(teams, blocks_for(ceil_div(out.numel(), 128), count)), 128, 0, what,
               over ? segments(*over) : Segments{}, short_ones, to);
}

void offsets(Queue& queue, Tensor lengths, Tensor out) {
  const int64_t count = lengths.size[0];
  require(lengths.rank == 1 && (lengths.type == Dtype::I32 || lengths.type == Dtype::I64) && out.type == Dtype::I64 &&
              out.size[0] == count + 1,
          "offsets", "I32 or I64 [n] lengths give I64 [n + 1] offsets");
  launch(queue, "offsets", offsets_kernel, dim3(1), 32, 0, lengths.data, lengths.type == Dtype::I64, lengths.stride[0],
         count, out.as<int64_t>(), out.stride[0]);
}

}  // namespace heed::cuda
