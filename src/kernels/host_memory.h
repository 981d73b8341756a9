#pragma once
#include "base/memory.h"

namespace heed {

/// Memory of the host that a device of this kind fills fastest.
const Memory& host_memory(Device device);

}  // namespace heed
