#include "kernels/check.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/padded_rows.h"

namespace heed::HEED_ISA {
namespace {

constexpr int64_t kAbreast = 4 * kLanes;  // channels that a piece walks down side by side

/// One segment, `width` channels from `first` on. `held` carries the fold, `sum` what Lse needs besides.
void scan_strip(ScanKind kind, const Rows& x, const Rows& a, int64_t begin, int64_t end, int64_t first, int64_t width,
                Tensor out, float* held, float* sum) {
  for (int64_t c = 0; c < width; ++c) held[c] = sum[c] = 0;
  for (int64_t r = begin; r < end; ++r) {
    const float* in = reinterpret_cast<const float*>(x.data + r * x.stride) + first;
    float* to = out.as<float>() + r * out.stride[0] + first;
    switch (kind) {
      case ScanKind::Linear: {
        const float* by = reinterpret_cast<const float*>(a.data + r * a.stride) + first;
        for (int64_t c = 0; c < width; ++c) to[c] = held[c] = by[c] * held[c] + in[c];
        break;
      }
      case ScanKind::Min:
        for (int64_t c = 0; c < width; ++c) to[c] = held[c] = r > begin && held[c] < in[c] ? held[c] : in[c];
        break;
      case ScanKind::Max:
        for (int64_t c = 0; c < width; ++c) to[c] = held[c] = r > begin && held[c] > in[c] ? held[c] : in[c];
        break;
      case ScanKind::Mean:
        for (int64_t c = 0; c < width; ++c) to[c] = (held[c] += in[c]) / float(r - begin + 1);
        break;
      case ScanKind::Lse:
        // held is the largest so far and sum is Σ e^(x − held): no rounding of earlier results enters later ones.
        for (int64_t c = 0; c < width; ++c) {
          const float top = r > begin ? std::max(held[c], in[c]) : in[c];
          if (top == -INFINITY) sum[c] = 0;
          else sum[c] = (r > begin ? sum[c] * std::exp(held[c] - top) : 0.0f) + std::exp(in[c] - top);
          held[c] = top;
          to[c] = top == -INFINITY ? top : top + std::log(sum[c]);
        }
        break;
    }
  }
}

}  // namespace

void scan(Queue& queue, const Ragged& x, Tensor a, ScanKind kind, Tensor out) {
  constexpr const char* where = "scan";
  const int64_t width = width_of(x.values);
  const auto as_x = [&](const Tensor& t) {
    return t.type == Dtype::F32 && t.rank == x.values.rank && t.size[0] == x.values.size[0] && width_of(t) == width;
  };
  require(as_x(x.values), where, "x is F32");
  require(as_x(out), where, "out has x's shape");
  require(kind != ScanKind::Linear || (a && as_x(a)), where, "a linear scan needs a, of x's shape");
  const Rows rows(x.values), factors = a ? Rows(a) : Rows();
  const int64_t strips = (width + kAbreast - 1) / kAbreast;
  for_each(queue, x.segments() * strips, 2 * kAbreast, [&](int64_t i, float* scratch) {
    const int64_t s = i / strips, first = i % strips * kAbreast;
    scan_strip(kind, rows, factors, x.begin(s), x.end(s), first, std::min(kAbreast, width - first), out, scratch,
               scratch + kAbreast);
  });
}

}  // namespace heed::HEED_ISA
