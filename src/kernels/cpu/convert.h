// Rows of plain numbers in and out of f32.
#pragma once
#include "base/tensor.h"
#include "kernels/cpu/simd.h"

namespace heed::HEED_ISA {

template <class From, class To>
HEED_INLINE void convert_row(const From* from, int64_t n, To* to) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) store(to + c, load(from + c));
  if (c < n) store_part(to + c, load_part(from + c, int(n - c)), int(n - c));
}

inline const char* row_of(const Tensor& t, int64_t row) {
  return static_cast<const char*>(t.data) + row * t.stride[0] * info(t.type).bytes;
}

/// n numbers at `row` as f32: in `to`, or where they are when they are f32 already.
inline const float* widen_row(const char* row, Dtype type, int64_t n, float* to) {
  if (type == Dtype::BF16) convert_row(reinterpret_cast<const bf16*>(row), n, to);
  else if (type == Dtype::F16) convert_row(reinterpret_cast<const f16*>(row), n, to);
  else return reinterpret_cast<const float*>(row);
  return to;
}

inline void narrow_row(const float* from, int64_t n, Dtype type, char* to) {
  if (type == Dtype::BF16) convert_row(from, n, reinterpret_cast<bf16*>(to));
  else if (type == Dtype::F16) convert_row(from, n, reinterpret_cast<f16*>(to));
  else convert_row(from, n, reinterpret_cast<float*>(to));
}

}  // namespace heed::HEED_ISA
