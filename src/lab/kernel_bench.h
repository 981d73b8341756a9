// Every kernel of every instruction set that this machine runs, at a few shapes.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace heed {

struct KernelCase {
  std::string kernel, shape;
  bool compute = false;  // limited by arithmetic: work is operations; else bytes that must be read or written
  bool bf16 = false;     // products of bf16 numbers, where the machine has them
  double work = 0;
  std::function<void(Queue&)> run;
};

/// Cases whose kernel's name begins with `prefix`, with their data, for one table (page layouts depend on it).
std::vector<KernelCase> kernel_cases(const Kernels& kernels, const std::string& prefix);

/// Seconds of one run: the best of several stretches of at least 50 ms, after one run that does not count. Where the device
/// records, 20 runs are recorded and replayed together: the host's part in enqueueing them is not in it.
double time_kernel(const KernelCase& c, const Kernels& kernels, bool record = true);

/// What kernels of a device stand against, measured on it as they are.
struct DeviceLimits {
  double copy_gb_s = 0;       // 1 GiB from one place to another, bytes read and written
  double product_gflops = 0;  // matmul of bf16 weights and f32 rows, 8192 × 8192 × 8192
};
DeviceLimits device_limits(const Kernels& kernels);

}  // namespace heed
