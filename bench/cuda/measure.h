// What the stand-alone checks and benches of the Hopper kernels share.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

static void ok(cudaError_t e, int line) {
  if (e != cudaSuccess) printf("line %d: %s\n", line, cudaGetErrorString(e)), exit(1);
}
#define OK(x) ok(x, __LINE__)

template <class T> T* on_device(const std::vector<T>& x) {
  T* p;
  OK(cudaMalloc(&p, std::max<size_t>(1, x.size()) * sizeof(T)));
  OK(cudaMemcpy(p, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice));
  return p;
}

__global__ void spin() {
  for (const int64_t start = clock64(); clock64() - start < 200'000;) {}
}

/// Median time of the device's work: a kernel that waits goes first, so that the host's part is hidden.
static float median_ms(const std::function<void()>& f, int times = 21) {
  std::vector<float> ms;
  cudaEvent_t a, b;
  OK(cudaEventCreate(&a)), OK(cudaEventCreate(&b));
  for (int i = 0; i < 3; ++i) f();
  for (int i = 0; i < times; ++i) {
    spin<<<1, 1>>>();
    OK(cudaEventRecord(a)), f(), OK(cudaEventRecord(b)), OK(cudaEventSynchronize(b));
    float t;
    OK(cudaEventElapsedTime(&t, a, b));
    ms.push_back(t);
  }
  std::sort(ms.begin(), ms.end());
  return ms[ms.size() / 2];
}
