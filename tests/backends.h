// The backend that tests of mechanisms and models run on: HEED_BACKEND (`./run test --backend NAME`), else the test's own.
#pragma once
#include <cstdlib>
#include <string>

#include "guarded.h"

namespace heed::test {

inline std::string backend_or(const std::string& own) {
  guarded_kernels();  // known by its name from here on
  const char* chosen = std::getenv("HEED_BACKEND");
  return chosen && *chosen ? chosen : own;
}

/// The same for tests that read a session's tensors where they lie: a device's memory is not theirs to read.
inline std::string host_backend_or(const std::string& own) {
  const std::string chosen = backend_or(own);
  return chosen == "cuda" ? own : chosen;
}

}  // namespace heed::test
