// What a build without CUDA says of it.
#include "kernels/kernels.h"

namespace heed {

std::string cuda_state() { return "CUDA: this build has none (nvcc 12.4 or newer was not found)"; }
const Kernels* cuda_kernels() { return nullptr; }

}  // namespace heed
