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

/// Seconds of one run: the best of several stretches of at least 50 ms, after one run that does not count.
double time_kernel(const KernelCase& c, const Kernels& kernels);

}  // namespace heed
