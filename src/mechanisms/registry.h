// The catalogue: an explicit list, no static initialisers.
#pragma once
#include <span>

#include "attention/spec.h"

namespace heed {

/// Every entry of this build, dense first, then by name.
std::span<const Entry> registry();

}  // namespace heed
