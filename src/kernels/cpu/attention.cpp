#include "kernels/cpu/cpu.h"

namespace heed::HEED_ISA {

void fill_attention(Kernels&) {}

}  // namespace heed::HEED_ISA
