// How much work a test does: one place to turn it down where every instruction is slow (sanitizers, emulation).
#pragma once
#include <algorithm>
#include <cstdlib>

namespace heed::test {

/// The number of random cases to run where `full` is meant: scaled by the environment variable HEED_CASES (0.1 runs a
/// tenth, 10 runs ten times as many), never less than one.
inline int cases(int full) {
  const char* scale = std::getenv("HEED_CASES");
  return scale ? std::max(1, int(full * std::atof(scale))) : full;
}

}  // namespace heed::test
