// Files that are either the old one or the whole new one.
#pragma once
#include <initializer_list>
#include <span>
#include <string>

#include "base/error.h"

namespace heed {

/// Writes the parts one after another to a file beside `path` and renames it. A link is followed; a device or a pipe is
/// written to as it is. Invalid when `path` is a folder or lies in none, Io for what the system refuses.
Result<void> write_whole(const std::string& path, std::initializer_list<std::span<const char>> parts);

/// What write_whole would say of `path` now, and leaves nothing there: for work that takes long before it has something to
/// write.
Result<void> can_be_written(const std::string& path);

/// Where a writer of its own (libzip) may write beside and rename: `path`, or the file that it links to. Invalid when it is
/// no regular file.
Result<std::string> regular_target(const std::string& path);

}  // namespace heed
