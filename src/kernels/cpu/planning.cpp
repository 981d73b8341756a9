#include "kernels/cpu/cpu.h"

namespace heed::HEED_ISA {

void fill_planning(Kernels&) {}

}  // namespace heed::HEED_ISA
