// What a layer does to rows of activations between its products: rms_norm, glu, add.
#include "kernels/cpu/rows.h"
#include "kernels/check.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/parts.h"

namespace heed::HEED_ISA {
namespace {

/// Calls row(t) for each row of a [rows, width] tensor.
template <class Fn>
void over_rows(const Tensor& x, Fn&& row) {
  over_parts(x.size[0], x.size[1] * 8, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) row(t);
  });
}

float* float_row(const Tensor& x, int64_t t) { return x.as<float>() + t * x.stride[0]; }

}  // namespace

void rms_norm(Queue&, Tensor x, Tensor weight, float eps, Tensor y) {
  const int64_t width = x.size[1];
  check_tensor("rms_norm", "x", x, {x.size[0], width});
  check_tensor("rms_norm", "y", y, {x.size[0], width});
  check_tensor("rms_norm", "weight", weight, {width}, true);
  over_rows(x, [&](int64_t t) {
    const float *in = float_row(x, t), *w = weight.as<float>();
    float* out = float_row(y, t);
    const F factor = set(rms_factor(in, width, eps));
    if (w)
      over_lanes(width, [&](int64_t i, auto part) { part.put(out + i, part.get(in + i) * factor * part.get(w + i)); });
    else over_lanes(width, [&](int64_t i, auto part) { part.put(out + i, part.get(in + i) * factor); });
  });
}

void glu(Queue&, Tensor gate, Tensor up, Activation activation, Tensor y) {
  const int64_t rows = gate.size[0], width = gate.size[1];
  check_tensor("glu", "gate", gate, {rows, width});
  check_tensor("glu", "up", up, {rows, width});
  check_tensor("glu", "y", y, {rows, width});
  over_rows(gate, [&](int64_t t) { glu_row(float_row(gate, t), float_row(up, t), width, activation, float_row(y, t)); });
}

void add(Queue&, Tensor x, Tensor y) {
  const int64_t rows = x.size[0], width = x.size[1];
  check_tensor("add", "x", x, {rows, width});
  check_tensor("add", "y", y, {rows, width});
  over_rows(x, [&](int64_t t) {
    const float* in = float_row(x, t);
    float* out = float_row(y, t);
    over_lanes(width, [&](int64_t i, auto part) { part.put(out + i, part.get(out + i) + part.get(in + i)); });
  });
}

}  // namespace heed::HEED_ISA
