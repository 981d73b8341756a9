#include "lab/files.h"

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <iterator>
#include <memory>

#include "base/mapped_file.h"

namespace heed {

Result<std::string> read_file(const std::string& path) {
  if (path == "-") return std::string(std::istreambuf_iterator<char>(std::cin), {});
  auto file = MappedFile::open(path);
  if (!file) return tl::unexpected(file.error());
  const auto bytes = file->bytes();
  return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

Result<void> write_file(const std::string& path, std::string_view bytes) {
  const std::string temporary = path + ".part-" + std::to_string(getpid());
  const auto fail_io = [&] {
    const int error = errno;
    std::remove(temporary.c_str());
    return fail(Code::Io, path, std::string("cannot be written: ") + std::strerror(error),
                "is there space, and may you write here?");
  };
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(temporary.c_str(), "wb"), &std::fclose);
  if (!file) return fail_io();
  if (std::fwrite(bytes.data(), 1, bytes.size(), file.get()) != bytes.size()) return fail_io();
  if (std::fclose(file.release()) != 0) return fail_io();
  if (std::rename(temporary.c_str(), path.c_str()) != 0) return fail_io();
  return {};
}

}  // namespace heed
