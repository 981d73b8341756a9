#include "kernels/cpu/cpu.h"

namespace heed::HEED_ISA {

void fill_recurrence(Kernels& t) { t.recur = recur; }

}  // namespace heed::HEED_ISA
