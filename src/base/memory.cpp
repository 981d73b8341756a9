#include "base/memory.h"

#include <cstdlib>
#include <cstring>
#include <string>

#include "base/error.h"

namespace heed {
namespace {

void* allocate(int64_t bytes) {
  const size_t padded = (size_t(bytes) + 63) / 64 * 64;
  void* memory = std::aligned_alloc(64, padded ? padded : 64);
  if (!memory) throw Error(Code::Memory, "memory", std::to_string(padded) + " bytes asked for, not available");
  return memory;
}

void copy_bytes(void*, const void* from, void* to, int64_t bytes) {
  if (bytes > 0) std::memcpy(to, from, size_t(bytes));
}

}  // namespace

const Memory& cpu_memory() {
  static const Memory memory = [] {
    Memory m;
    m.device = Device::Cpu;
    m.allocate = allocate;
    m.release = [](void* p) noexcept { std::free(p); };
    m.open_stream = [] { return static_cast<void*>(nullptr); };
    m.close_stream = [](void*) noexcept {};
    m.upload = m.download = m.move = copy_bytes;
    m.fill = [](void*, void* to, int byte, int64_t bytes) {
      if (bytes > 0) std::memset(to, byte, size_t(bytes));
    };
    m.finish = [](void*) {};
    return m;
  }();
  return memory;
}

}  // namespace heed
