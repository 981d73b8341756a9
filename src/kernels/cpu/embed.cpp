// Rows of weights in another form: embed, dequantise and interleave.
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
    require(id >= 0 && id < weights.rows, "embed", [&] { return "there is no token " + std::to_string(id); });
  }
  over_parts(tokens, width * 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* out = y.as<float>() + t * y.stride[0];
      unpack(weights, ids.at<int32_t>(t), 1, 0, width, out, width);
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
    unpack(weights, begin, end - begin, 0, weights.width, y.as<float>() + begin * y.stride[0], y.stride[0]);
  });
}

void interleave(Queue&, Tensor w, Tensor to) {
  const DtypeInfo i = info(w.type);
  require(w.rank == 2 && is_block(w.type) && w.contiguous() && !w.interleaved && to.interleaved && to.contiguous() &&
              to.size == w.size && to.type == w.type,
          "interleave", [&] {
            return "a matrix " + w.shape() + " of " + i.name + " as files hold it, and an interleaved one of its sizes";
          });
  const int64_t row_bytes = w.size[1] / i.block * i.bytes, groups = w.size[0] / kSideBySide;
  over_parts(groups, kSideBySide * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t at = g * kSideBySide * row_bytes;
      interleave_rows(w.type, w.as<char>() + at, w.size[1], to.as<char>() + at);
    }
  });
  const int64_t rest = groups * kSideBySide * row_bytes;
  std::memcpy(to.as<char>() + rest, w.as<char>() + rest, size_t(w.bytes() - rest));
}

}  // namespace heed::HEED_ISA
