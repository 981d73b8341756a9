// Descriptions of matrices for Hopper's copy engine.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

namespace heed::sm90 {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

/// The driver's function, asked of the runtime, so that nothing links to libcuda.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled encode = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found) != cudaSuccess ||
        found != cudaDriverEntryPointSuccess)
      f = nullptr;
    return EncodeTiled(f);
  }();
  return encode;
}

/// A map of bf16 rows, read in boxes of 64 columns × `box` rows; what lies outside is read as zeros.
inline bool make_map(CUtensorMap& map, const __nv_bfloat16* data, int64_t rows, int64_t width, int64_t stride, int box) {
  const cuuint64_t sizes[2] = {cuuint64_t(width), cuuint64_t(rows)}, strides[1] = {cuuint64_t(stride * 2)};
  const cuuint32_t boxes[2] = {64, cuuint32_t(box)}, steps[2] = {1, 1};
  return encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<__nv_bfloat16*>(data), sizes, strides,
                        boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace heed::sm90
