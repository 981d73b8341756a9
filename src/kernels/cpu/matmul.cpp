#include "kernels/check.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/weights.h"

namespace heed::HEED_ISA {

void matmul(Queue& queue, Tensor w, Tensor x, Tensor bias, bool accumulate, Tensor y) {
  if (!Weights::holds(w.type)) return reference_kernels().matmul(queue, w, x, bias, accumulate, y);
  const Product product{Weights(w, "matmul"), x, bias, y, accumulate};
  const int64_t rows = product.w.rows, tokens = product.tokens();
  check_tensor("matmul", "x", x, {tokens, product.w.width});
  check_tensor("matmul", "bias", bias, {rows}, true);
  check_tensor("matmul", "y", y, {tokens, rows});
  if (tokens == 0 || rows == 0) return;
  // From about eight tokens on, unpacking a weight costs less than rounding and summing it for each token.
  if (tokens < 8) multiply_few(queue.scratch, product);
  else multiply_many(queue.scratch, product);
}

}  // namespace heed::HEED_ISA
