// What launches must know of the device, and how a kernel waits for the one before: for files that stand alone, too.
#pragma once
#include <cuda_runtime.h>

namespace heed::cuda {

/// 0 where there is no device.
inline int device_attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) return 0;
  return value;
}
inline int multiprocessors() {
  static const int count = device_attribute(cudaDevAttrMultiProcessorCount);
  return count;
}
/// Bytes of shared memory that a block may ask for.
inline size_t most_shared() {
  static const size_t bytes = size_t(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  return bytes;
}
/// Whether the GPU sets up kernels early (programmatic dependent launch).
inline bool launches_early() {
  static const bool early = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  return early;
}

/// First line of a kernel that launch_early starts: waits until what lies before it in the queue is done, its writes
/// included. The kernel behind is set up meanwhile, and the one behind that: all of them wait here.
__device__ inline void await() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace heed::cuda
