#include "kernels/kernels.h"

namespace heed {

const Kernels& reference_kernels() {
  static const Kernels table = [] {
    Kernels t{};
    t.name = "reference";
    return t;
  }();
  return table;
}

}  // namespace heed
