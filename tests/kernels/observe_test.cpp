#include "kernels/checks.h"

namespace heed::test {

std::vector<Check> observe_checks() { return {}; }

}  // namespace heed::test
