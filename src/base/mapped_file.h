// A file seen as memory.
#pragma once
#include <cstddef>
#include <span>
#include <string>

#include "base/error.h"

namespace heed {

/// A whole regular file mapped read-only; unmapped when destroyed. Pages are read as they are touched and shared with
/// other processes. The file must not be cut short while it is mapped.
class MappedFile {
 public:
  MappedFile() = default;
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  /// NotFound when there is no such file, Io for what the system refuses, Invalid for a folder or a pipe.
  /// An empty file gives an empty span.
  static Result<MappedFile> open(const std::string& path);

  std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(data_), size_}; }
  /// Memory that whole pages of this part take may be put to other uses; they are read again when they are touched.
  void let_go(std::span<const std::byte> part) const;

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace heed
