#include "kernels/cpu/cpu.h"

#define HEED_QUOTE(x) #x
#define HEED_NAME(x) HEED_QUOTE(x)

namespace heed::HEED_ISA {

const Kernels& table() {
  static const Kernels made = [] {
    Kernels t = reference_kernels();
    t.name = HEED_NAME(HEED_ISA);
    for (char& c : t.name)
      if (c == '_') c = '-';
    fill_attention(t);
    fill_planning(t);
    fill_recurrence(t);
    fill_model(t);
    return t;
  }();
  return made;
}

}  // namespace heed::HEED_ISA
