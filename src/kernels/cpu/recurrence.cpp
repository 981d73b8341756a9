#include "kernels/cpu/cpu.h"

namespace heed::HEED_ISA {

void fill_recurrence(Kernels& t) {
  t.recur = recur;
  t.recur_backward = recur_backward;
}

}  // namespace heed::HEED_ISA
