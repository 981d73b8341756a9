#include "kernels/cpu/cpu.h"

namespace heed::HEED_ISA {

void fill_recurrence(Kernels&) {}

}  // namespace heed::HEED_ISA
