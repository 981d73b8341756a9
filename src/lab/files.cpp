#include "lab/files.h"

#include <iostream>
#include <iterator>

#include "base/mapped_file.h"
#include "base/whole_file.h"

namespace heed {

Result<std::string> read_file(const std::string& path) {
  if (path == "-") return std::string(std::istreambuf_iterator<char>(std::cin), {});
  auto file = MappedFile::open(path);
  if (!file) return tl::unexpected(file.error());
  const auto bytes = file->bytes();
  return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

Result<void> write_file(const std::string& path, std::string_view bytes) { return write_whole(path, {bytes}); }

}  // namespace heed
