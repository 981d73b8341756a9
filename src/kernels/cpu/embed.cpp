// Rows of weights as f32: embed and dequantise.
#include "kernels/check.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/parts.h"
#include "kernels/cpu/weights.h"

namespace heed::HEED_ISA {

void embed(Queue& queue, Tensor w, Tensor ids, float scale, Tensor y) {
  if (!Weights::holds(w.type)) return reference_kernels().embed(queue, w, ids, scale, y);
  const Weights weights(w, "embed");
  const int64_t tokens = y.size[0], width = weights.width;
  check_tensor("embed", "ids", ids, {tokens}, false, Dtype::I32);
  check_tensor("embed", "y", y, {tokens, width});
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t id = ids.at<int32_t>(t);
    require(id >= 0 && id < weights.rows, "embed", "there is no token " + std::to_string(id));
  }
  over_parts(tokens, width * 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* out = y.as<float>() + t * y.stride[0];
      unpack(weights, ids.at<int32_t>(t), 0, width, out);
      if (scale != 1)
        for (int64_t c = 0; c < width; ++c) out[c] *= scale;
    }
  });
}

void dequantise(Queue& queue, Tensor w, Tensor y) {
  if (!Weights::holds(w.type)) return reference_kernels().dequantise(queue, w, y);
  const Weights weights(w, "dequantise");
  check_tensor("dequantise", "y", y, {weights.rows, weights.width});
  over_parts(weights.rows, weights.width * 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) unpack(weights, r, 0, weights.width, y.as<float>() + r * y.stride[0]);
  });
}

}  // namespace heed::HEED_ISA
