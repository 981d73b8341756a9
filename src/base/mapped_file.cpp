#include "base/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <utility>

namespace heed {

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(data_, size_);
}

void MappedFile::let_go(std::span<const std::byte> part) const {
  const auto page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (uintptr_t(part.data()) + page - 1) / page * page,
                  last = uintptr_t(part.data() + part.size()) / page * page;
  if (first < last) ::madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

Result<MappedFile> MappedFile::open(const std::string& path) {
  // Not blocking: opening a pipe that nobody writes to would wait for ever.
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) {
    const Code code = errno == ENOENT || errno == ENOTDIR ? Code::NotFound : Code::Io;
    return fail(code, path.empty() ? "''" : path, std::strerror(errno), "check the path and its permissions");
  }
  struct stat about{};
  MappedFile mapped;
  Result<MappedFile> result;
  if (::fstat(file, &about) != 0) {
    result = fail(Code::Io, path, std::strerror(errno));
  } else if (!S_ISREG(about.st_mode)) {
    result = fail(Code::Invalid, path, "is not a regular file", "give the path of a file");
  } else if (about.st_size > 0) {
    void* data = ::mmap(nullptr, size_t(about.st_size), PROT_READ, MAP_PRIVATE, file, 0);
    if (data == MAP_FAILED) {
      result = fail(Code::Io, path, std::string("cannot be mapped: ") + std::strerror(errno));
    } else {
      mapped.data_ = data;
      mapped.size_ = size_t(about.st_size);
      result = std::move(mapped);
    }
  }
  ::close(file);
  return result;
}

}  // namespace heed
