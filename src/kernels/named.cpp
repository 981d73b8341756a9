#include "kernels/kernels.h"

namespace heed {

const Kernels& kernels_named(const std::string& name) {
  std::string known = "reference";
  if (name == known) return reference_kernels();
  for (const Kernels* table : cpu_kernels()) {
    if (table->name == name) return *table;
    if (table->name != "reference") known += ", " + table->name;
  }
  throw Error(Code::NotFound, "kernels", "no backend named '" + name + "' on this machine", "there are: " + known);
}

}  // namespace heed
