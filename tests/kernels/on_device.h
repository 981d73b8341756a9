// The tables that tests run: those of the CPU, and the GPU's behind a coat that carries host tensors over and back.
#pragma once
#include <vector>

#include "kernels/kernels.h"

namespace heed::test {

/// cpu_kernels(), and where this machine has a usable GPU a table named "cuda" that takes host tensors: each call uploads
/// what its tensors hold, poison and gaps between rows included, runs the kernel on the device, and copies results back.
/// Around every copy lie guard bytes; a kernel that writes to them fails the test that called it.
std::vector<const Kernels*> tables();

}  // namespace heed::test
