#include <algorithm>

#include "base/threads.h"
#include "kernels/check.h"
#include "kernels/quant.h"
#include "kernels/reference/reference.h"

namespace heed::reference {
namespace {

/// Row r of a [rows, width] tensor of any type.
std::vector<float> weights(const Tensor& w, int64_t r) {
  std::vector<float> out(static_cast<size_t>(w.size[1]));
  if (is_block(w.type)) {
    dequantise_row(w.type, w.slice(0, r, r + 1).data, w.size[1], out.data());
  } else {
    for (int64_t c = 0; c < w.size[1]; ++c) out[size_t(c)] = float(number(w, r, c));
  }
  return out;
}

void check_weights(const char* where, const Tensor& w) {
  require(w.rank == 2 && (w.size[1] <= 1 || w.stride[1] == 1) && w.size[1] % info(w.type).block == 0, where,
          [&] { return "weights are [rows, width] with contiguous rows of whole blocks, got " + w.shape(); });
  require(!w.interleaved, where, "the reference reads rows as files hold them");
}

/// x as the products of matmul_each read it, in scratch where there is a norm.
Tensor normed(Queue& queue, Tensor x, const Norm* norm) {
  if (!norm) return x;
  const Tensor out = queue.scratch.take(Dtype::F32, {x.size[0], x.size[1]});
  rms_norm(queue, x, norm->weight, norm->eps, out);
  return out;
}

}  // namespace

void matmul(Queue&, Tensor w, Tensor x, Tensor bias, bool accumulate, Tensor y) {
  constexpr const char* where = "matmul";
  check_weights(where, w);
  const int64_t outputs = w.size[0], inputs = w.size[1], tokens = x.size[0];
  check_tensor(where, "x", x, {tokens, inputs}, false, row_type(x));
  check_tensor(where, "bias", bias, {outputs}, true);
  check_tensor(where, "y", y, {tokens, outputs});
  parallel_for(outputs, [&](int64_t o) {
    const std::vector<float> weight = weights(w, o);
    for (int64_t t = 0; t < tokens; ++t) {
      double sum = bias ? number(bias, o) : 0;
      for (int64_t i = 0; i < inputs; ++i) sum += number(x, t, i) * double(weight[size_t(i)]);
      if (accumulate) sum += number(y, t, o);
      store(y, offset(y, t, o), sum);
    }
  });
}

void matmul_each(Queue& queue, std::span<const Linear> each, Tensor x, const Norm* norm) {
  const Scratch scratch(queue.scratch);
  x = normed(queue, x, norm);
  for (const Linear& linear : each) matmul(queue, linear.w, x, linear.bias, linear.add, linear.y);
}

void matmul_glu(Queue& queue, Tensor gate, Tensor up, Tensor x, const Norm* norm, Activation activation, Tensor y) {
  const Scratch scratch(queue.scratch);
  x = normed(queue, x, norm);
  const Tensor one = queue.scratch.take(Dtype::F32, {y.size[0], y.size[1]}),
               other = queue.scratch.take(Dtype::F32, {y.size[0], y.size[1]});
  matmul(queue, gate, x, {}, false, one);
  matmul(queue, up, x, {}, false, other);
  glu(queue, one, other, activation, one);
  check_tensor("matmul_glu", "y", y, {one.size[0], one.size[1]}, false, row_type(y));
  for (int64_t t = 0; t < y.size[0]; ++t) set_row(y, t, row(one, t));
}

void embed(Queue&, Tensor w, Tensor ids, float scale, Tensor y) {
  check_weights("embed", w);
  check_tensor("embed", "ids", ids, {y.size[0]}, false, Dtype::I32);
  check_tensor("embed", "y", y, {ids.size[0], w.size[1]});
  for (int64_t t = 0; t < ids.size[0]; ++t) {
    const int64_t id = ids.at<int32_t>(t);
    require(id >= 0 && id < w.size[0], "embed", [&] { return "there is no token " + std::to_string(id); });
    const std::vector<float> x = weights(w, id);
    for (size_t c = 0; c < x.size(); ++c) store(y, offset(y, t, int64_t(c)), double(x[c]) * double(scale));
  }
}

void dequantise(Queue&, Tensor w, Tensor y) {
  check_weights("dequantise", w);
  check_tensor("dequantise", "y", y, {w.size[0], w.size[1]});
  for (int64_t r = 0; r < w.size[0]; ++r) {
    const std::vector<float> x = weights(w, r);
    for (size_t c = 0; c < x.size(); ++c) store(y, offset(y, r, int64_t(c)), double(x[c]));
  }
}

void rms_norm(Queue&, Tensor x, Tensor weight, float eps, Tensor y) {
  check_tensor("rms_norm", "x", x, {x.size[0], x.size[1]});
  check_tensor("rms_norm", "y", y, {x.size[0], x.size[1]});
  check_tensor("rms_norm", "weight", weight, {x.size[1]}, true);
  for (int64_t t = 0; t < x.size[0]; ++t) {
    std::vector<double> values = row(x, t);
    double squares = 0;
    for (double value : values) squares += value * value;
    const double factor = 1 / std::sqrt(squares / double(values.size()) + double(eps));
    for (size_t c = 0; c < values.size(); ++c) values[c] *= factor * (weight ? number(weight, int64_t(c)) : 1);
    set_row(y, t, values);
  }
}

void glu(Queue&, Tensor gate, Tensor up, Activation activation, Tensor y) {
  check_tensor("glu", "up", up, {gate.size[0], gate.size[1]});
  check_tensor("glu", "y", y, {gate.size[0], gate.size[1]});
  for (int64_t t = 0; t < gate.size[0]; ++t)
    for (int64_t c = 0; c < gate.size[1]; ++c) {
      const double x = number(gate, t, c);
      const double active = activation == Activation::Silu
                                ? x / (1 + std::exp(-x))
                                : 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));  // √(2/π)
      store(y, offset(y, t, c), active * number(up, t, c));
    }
}

void add(Queue&, Tensor x, Tensor y) {
  check_tensor("add", "y", y, {x.size[0], x.size[1]});
  for (int64_t t = 0; t < x.size[0]; ++t)
    for (int64_t c = 0; c < x.size[1]; ++c) store(y, offset(y, t, c), number(y, t, c) + number(x, t, c));
}

}  // namespace heed::reference
