#include "kernels/cpu/cpu.h"

namespace heed::HEED_ISA {

void fill_planning(Kernels& t) {
  t.attend_backward = attend_backward;
  t.pool = pool;
  t.smooth = smooth;
  t.proxy = proxy;
  t.reduce = reduce;
  t.select = select;
  t.scan = scan;
  t.combine = combine;
  t.spread = spread;
}

}  // namespace heed::HEED_ISA
