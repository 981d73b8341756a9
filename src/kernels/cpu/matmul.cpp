#include <vector>

#include "kernels/check.h"
#include "kernels/cpu/convert.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/product_tile.h"
#include "kernels/cpu/weights.h"

namespace heed::HEED_ISA {
namespace {

// From about eight tokens on, unpacking a weight costs less than rounding and summing it for each token.
bool few(const Tensor& x) { return x.size[0] < 8; }

/// x as products read it: F32, normed before where `norm` is not null; else where it is, or in scratch.
Tensor rows_of(Queue& queue, Tensor x, const Norm* norm) {
  if (!norm && x.type == Dtype::F32) return x;
  const Tensor out = queue.scratch.take(Dtype::F32, {x.size[0], x.size[1]});
  if (x.type == Dtype::BF16)
    for (int64_t t = 0; t < x.size[0]; ++t)
      convert_row(reinterpret_cast<const bf16*>(row_of(x, t)), x.size[1], out.as<float>() + t * x.size[1]);
  if (norm) rms_norm(queue, x.type == Dtype::BF16 ? out : x, norm->weight, norm->eps, out);
  return out;
}

Product product_of(const char* where, Tensor w, Tensor x, Tensor bias, Tensor y, bool accumulate) {
  const Product product{Weights(w, where), x, bias, y, accumulate};
  check_tensor(where, "x", x, {x.size[0], product.w.width});
  check_tensor(where, "bias", bias, {product.w.rows}, true);
  check_tensor(where, "y", y, {x.size[0], product.w.rows});
  return product;
}

template <Products P>
void multiply(Queue& queue, Tensor w, Tensor x, Tensor bias, bool accumulate, Tensor y) {
  if (!Weights::holds(w.type)) return reference_kernels().matmul(queue, w, x, bias, accumulate, y);
  const Scratch scratch(queue.scratch);
  x = rows_of(queue, x, nullptr);
  const Product product = product_of("matmul", w, x, bias, y, accumulate);
  if (product.tokens() == 0 || product.w.rows == 0) return;
  if (few(x)) multiply_few(queue.scratch, std::span(&product, 1));
  else multiply_many(P, queue.scratch, std::span(&product, 1));
}

template <Products P>
void multiply_each(Queue& queue, std::span<const Linear> each, Tensor x, const Norm* norm) {
  const Scratch scratch(queue.scratch);
  x = rows_of(queue, x, norm);
  std::vector<Product> products;
  for (const Linear& linear : each)
    if (Weights::holds(linear.w.type))
      products.push_back(product_of("matmul_each", linear.w, x, linear.bias, linear.y, linear.add));
  if (products.size() == each.size() && !each.empty()) {
    if (x.size[0] == 0) return;
    if (few(x)) return multiply_few(queue.scratch, products);
    if (multiply_many(P, queue.scratch, products)) return;
  }
  for (const Linear& linear : each) multiply<P>(queue, linear.w, x, linear.bias, linear.add, linear.y);
}

template <Products P>
void multiply_glu(Queue& queue, Tensor gate, Tensor up, Tensor x, const Norm* norm, Activation activation, Tensor y) {
  constexpr const char* where = "matmul_glu";
  require(gate.size == up.size, where, "gate and up are of one shape");
  const Scratch scratch(queue.scratch);
  x = rows_of(queue, x, norm);
  if (y.type == Dtype::BF16) {
    const Tensor wide = queue.scratch.take(Dtype::F32, {y.size[0], y.size[1]});
    multiply_glu<P>(queue, gate, up, x, nullptr, activation, wide);
    for (int64_t t = 0; t < y.size[0]; ++t)
      convert_row(wide.as<float>() + t * y.size[1], y.size[1], y.as<bf16>() + t * y.stride[0]);
    return;
  }
  const Tensor other = queue.scratch.take(Dtype::F32, {y.size[0], y.size[1]});
  if (Weights::holds(gate.type) && Weights::holds(up.type)) {
    const Product both[] = {product_of(where, gate, x, {}, y, false), product_of(where, up, x, {}, other, false)};
    if (both[0].tokens() == 0) return;
    if (few(x)) return multiply_few(queue.scratch, both[0], both[1], activation);
    if (multiply_many(P, queue.scratch, both, &activation)) return;
  }
  multiply<P>(queue, gate, x, {}, false, y);
  multiply<P>(queue, up, x, {}, false, other);
  glu(queue, y, other, activation, y);
}

template <Products P>
void fill(Kernels& t) {
  t.matmul = multiply<P>;
  t.matmul_each = multiply_each<P>;
  t.matmul_glu = multiply_glu<P>;
  t.rounds = P == Products::Rounded && kProductsRound;
}

}  // namespace

void fill_products(Kernels& t, Products kind) {
  if (kind == Products::Exact) fill<Products::Exact>(t);
  else fill<Products::Rounded>(t);
}

}  // namespace heed::HEED_ISA
