// The list of checks: each runs one kernel of one table on random cases. `Against::Reference` compares with the oracle,
// so it runs on every other table; `Against::Property` holds of itself, so it runs on the oracle too.
#pragma once
#include <vector>

#include "base/random.h"
#include "kernels/kernels.h"

namespace heed::test {

struct Check {
  enum class Against { Reference, Property } against;
  const char* name;
  void (*run)(const Kernels&, Random);
};

std::vector<Check> attention_checks();
std::vector<Check> store_checks();
std::vector<Check> observe_checks();
std::vector<Check> planning_checks();
std::vector<Check> count_checks();
std::vector<Check> recurrence_checks();
std::vector<Check> model_checks();

}  // namespace heed::test
