// A parameter that is a list of numbers.
#pragma once
#include <string>
#include <vector>

#include "base/error.h"

namespace heed {

/// Numbers ≥ 0: "[0.1,0.4,2]"; the empty text is an empty list.
struct NumberList {
  std::vector<double> values;
  static Result<NumberList> parse(const std::string& text);
};

/// Likewise of any sign.
struct SignedList {
  std::vector<double> values;
  static Result<SignedList> parse(const std::string& text);
};

}  // namespace heed
