// Whole files read and written.
#pragma once
#include <cstddef>
#include <span>
#include <string>
#include <string_view>

#include "base/error.h"

namespace heed {

/// The bytes of a file; "-" reads standard input. NotFound, Invalid (a folder) or Io.
Result<std::string> read_file(const std::string& path);

/// write_whole() of some text.
Result<void> write_file(const std::string& path, std::string_view bytes);

}  // namespace heed
