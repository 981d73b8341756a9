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

/// Writes a file so that it is either the old one or the whole new one: a temporary file beside it, then a rename.
Result<void> write_file(const std::string& path, std::string_view bytes);

}  // namespace heed
