#include "kernels/cpu/cpu.h"

namespace heed::HEED_ISA {

void fill_model(Kernels&) {}

}  // namespace heed::HEED_ISA
