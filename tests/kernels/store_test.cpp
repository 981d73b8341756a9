#include "kernels/checks.h"

namespace heed::test {

std::vector<Check> store_checks() { return {}; }

}  // namespace heed::test
