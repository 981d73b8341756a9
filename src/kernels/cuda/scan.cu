#include "kernels/cuda/device.cuh"

namespace heed::cuda {
namespace {

__device__ inline float log_add(float a, float b) {
  const float top = fmaxf(a, b);
  return top == -kInfinity ? -kInfinity : top + log1pf(expf(fminf(a, b) - top));
}

/// A step of the fold: what `held` becomes. Linear needs a.
__device__ inline float step(ScanKind kind, float held, float a, float x, bool first) {
  switch (kind) {
    case ScanKind::Linear: return first ? x : a * held + x;
    case ScanKind::Lse: return first ? x : log_add(held, x);
    case ScanKind::Min: return first ? x : fminf(held, x);
    case ScanKind::Max: return first ? x : fmaxf(held, x);
    default: return first ? x : held + x;
  }
}

/// Many channels: a thread walks one, neighbours read neighbours. Grid: segments, channels.
__global__ void scan_wide_kernel(Matrix x, Segments xs, Matrix a, ScanKind kind, Matrix out) {
  const int s = blockIdx.x, c = blockIdx.y * blockDim.x + threadIdx.x, n = xs.length(s);
  if (c >= x.width) return;
  float held = 0;
  for (int t = 0; t < n; ++t) {
    const int64_t r = xs.begin(s) + t;
    held = step(kind, held, kind == ScanKind::Linear ? a.get(r, c) : 0.0f, x.get(r, c), t == 0);
    out.set(r, c, kind == ScanKind::Mean ? held / float(t + 1) : held);
  }
}

/// Few channels: a warp takes 32 rows of one at a time (Hillis & Steele 1986). Grid: segments, channels.
__global__ void scan_narrow_kernel(Matrix x, Segments xs, Matrix a, ScanKind kind, Matrix out) {
  const int s = blockIdx.x, c = blockIdx.y, lane = threadIdx.x, n = xs.length(s);
  float held = 0;
  for (int t0 = 0; t0 < n; t0 += 32) {
    const int64_t r = xs.begin(s) + t0 + lane;
    const bool in = t0 + lane < n;
    float value = in ? x.get(r, c) : 0, factor = in && kind == ScanKind::Linear ? a.get(r, c) : 0;
    for (int by = 1; by < 32; by *= 2) {
      const float before = __shfl_up_sync(0xffffffffu, value, by), before_factor = __shfl_up_sync(0xffffffffu, factor, by);
      if (lane < by) continue;
      value = step(kind, before, factor, value, false);
      factor *= before_factor;
    }
    if (t0 > 0) value = step(kind, held, factor, value, false);
    if (in) out.set(r, c, kind == ScanKind::Mean ? value / float(t0 + lane + 1) : value);
    held = __shfl_sync(0xffffffffu, value, 31);
  }
}

}  // namespace

void scan(Queue& queue, const Ragged& x, Tensor a, ScanKind kind, Tensor out) {
  constexpr const char* where = "scan";
  const int64_t width = x.values.rank > 1 ? x.values.size[1] : 1;
  auto as_x = [&](const Tensor& t) { return t.size[0] == x.values.size[0] && (t.rank > 1 ? t.size[1] : 1) == width; };
  require(as_x(out), where, "out has x's shape");
  require(kind != ScanKind::Linear || (a && as_x(a)), where, "a linear scan needs a, of x's shape");
  const unsigned count = unsigned(x.segments());
  if (width >= 32)
    launch(queue, where, scan_wide_kernel, dim3(count, unsigned(ceil_div(width, 32))), 32, 0, matrix(x.values),
           segments(x), matrix(a), kind, matrix(out));
  else
    launch(queue, where, scan_narrow_kernel, dim3(count, unsigned(width)), 32, 0, matrix(x.values), segments(x),
           matrix(a), kind, matrix(out));
}

}  // namespace heed::cuda
