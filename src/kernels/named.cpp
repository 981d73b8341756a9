#include "kernels/kernels.h"

namespace heed {
namespace {

std::vector<const Kernels*>& added() {
  static std::vector<const Kernels*> tables;
  return tables;
}

}  // namespace

void add_kernels(const Kernels& table) { added().push_back(&table); }

const Kernels& kernels_named(const std::string& name) {
  std::string known = "reference";
  if (name == known) return reference_kernels();
  for (const auto& tables : {cpu_kernels(), added()})
    for (const Kernels* table : tables) {
      if (table->name == name) return *table;
      if (table->name != "reference") known += ", " + table->name;
    }
  if (const Kernels* table = cuda_kernels()) {
    if (name == table->name) return *table;
    known += ", " + table->name;
  } else if (name == "cuda") {
    throw Error(Code::Device, "kernels", cuda_state(), "use --backend cpu");
  }
  throw Error(Code::NotFound, "kernels", "no backend named '" + name + "' on this machine", "there are: " + known);
}

}  // namespace heed
