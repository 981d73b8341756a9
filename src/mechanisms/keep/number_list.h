#pragma once
#include <string>
#include <vector>

#include "attention/params.h"

namespace heed::mechanisms {

/// A parameter of numbers ≥ 0, for heads or layers: "[0.1,0.4,…]"; empty text is an empty list.
struct NumberList {
  std::vector<double> values;
  static Result<NumberList> parse(const std::string& text);
};

}  // namespace heed::mechanisms
