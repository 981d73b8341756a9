#include "base/whole_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace heed {
namespace {

tl::unexpected<Failure> refused(const std::string& path, int error) {
  const bool wrong = error == ENOENT || error == ENOTDIR || error == EISDIR;
  return fail(wrong ? Code::Invalid : Code::Io, path, std::string("cannot be written: ") + std::strerror(error),
              wrong ? "give a file in a folder that exists" : "is there space, and may you write here?");
}

struct Target {
  bool regular = true;  // or not there yet
  std::string path;     // what links lead to
};
Result<Target> target_of(const std::string& path) {
  struct stat about{};
  if (::stat(path.c_str(), &about) != 0) return Target{true, path};
  if (S_ISDIR(about.st_mode)) return refused(path, EISDIR);
  if (!S_ISREG(about.st_mode)) return Target{false, path};
  const std::unique_ptr<char, void (*)(void*)> real(::realpath(path.c_str(), nullptr), &std::free);
  return Target{true, real ? real.get() : path};
}

std::string beside(const std::string& path) {
  static std::atomic<int> serial;
  return path + ".new-" + std::to_string(::getpid()) + "-" + std::to_string(serial++);
}

/// 0, or why not.
int write_all(int file, std::initializer_list<std::span<const char>> parts) {
  for (std::span<const char> rest : parts)
    while (!rest.empty()) {
      const ssize_t written = ::write(file, rest.data(), rest.size());
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) return errno;
      rest = rest.subspan(size_t(written));
    }
  return 0;
}

}  // namespace

Result<void> write_whole(const std::string& path, std::initializer_list<std::span<const char>> parts) {
  const auto target = target_of(path);
  if (!target) return tl::unexpected(target.error());
  const std::string to = target->regular ? beside(target->path) : target->path;
  const int file = ::open(to.c_str(), O_WRONLY | O_CLOEXEC | (target->regular ? O_CREAT | O_TRUNC : 0), 0666);
  if (file < 0) return refused(path, errno);
  int error = write_all(file, parts);
  if (::close(file) != 0 && error == 0) error = errno;
  if (!target->regular) return error ? Result<void>(refused(path, error)) : Result<void>();
  if (error == 0 && ::rename(to.c_str(), target->path.c_str()) != 0) error = errno;
  if (error == 0) return {};
  ::unlink(to.c_str());
  return refused(path, error);
}

Result<void> can_be_written(const std::string& path) {
  const auto target = target_of(path);
  if (!target) return tl::unexpected(target.error());
  if (!target->regular) return ::access(path.c_str(), W_OK) == 0 ? Result<void>() : Result<void>(refused(path, errno));
  const std::string trial = beside(target->path);
  const int file = ::open(trial.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (file < 0) return refused(path, errno);
  ::close(file);
  ::unlink(trial.c_str());
  return {};
}

Result<std::string> regular_target(const std::string& path) {
  auto target = target_of(path);
  if (!target) return tl::unexpected(target.error());
  if (!target->regular) return fail(Code::Invalid, path, "is not a regular file", "give the path of a file");
  return std::move(target->path);
}

}  // namespace heed
