#include "kernels/cpu/cpu.h"

namespace heed::HEED_ISA {

void fill_attention(Kernels& t) {
  t.attend = attend;
  t.attend_store = attend_store;
}

}  // namespace heed::HEED_ISA
