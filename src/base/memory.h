// The memory of one kind of device: where buffers live, and how bytes reach them.
#pragma once
#include <cstdint>

namespace heed {

enum class Device : uint8_t { Cpu, Cuda };

/// Every kernel table names one (Kernels::memory). What lies in device memory the host may not touch: it passes through
/// upload and download. Streams order work; on the CPU everything happens at once and streams are null.
/// Functions throw Error(Memory), with how much was asked and how much there is, or Error(Device).
struct Memory {
  Device device = Device::Cpu;
  void* (*allocate)(int64_t bytes) = nullptr;  // at least 64-byte aligned (CUDA: 256), not initialised
  void (*release)(void*) noexcept = nullptr;
  void* (*open_stream)() = nullptr;
  void (*close_stream)(void* stream) noexcept = nullptr;
  /// `host` may be reused when it returns. Does not wait for earlier work.
  void (*upload)(void* stream, const void* host, void* to, int64_t bytes) = nullptr;
  /// Waits for the stream. Only Queue::read_back calls it.
  void (*download)(void* stream, const void* from, void* host, int64_t bytes) = nullptr;
  /// Device to device, in stream order; the ranges do not overlap.
  void (*move)(void* stream, const void* from, void* to, int64_t bytes) = nullptr;
  void (*fill)(void* stream, void* to, int byte, int64_t bytes) = nullptr;
  /// Waits until the stream is done; errors of its kernels surface here.
  void (*finish)(void* stream) = nullptr;
  /// Null where work cannot be recorded. From begin_recording to end_recording, what is put on the stream does not
  /// happen but is kept: end_recording gives it, or null when something came between that cannot be kept. Tables keep
  /// launches, moves and fills; uploads and downloads are not allowed meanwhile. The caller drops the recording.
  void (*begin_recording)(void* stream) = nullptr;
  void* (*end_recording)(void* stream) = nullptr;
  void (*replay)(void* stream, void* recording) = nullptr;
  void (*drop_recording)(void* recording) noexcept = nullptr;
  /// Address space, and memory behind parts of it that comes and goes without moving anything. Addresses and sizes are
  /// multiples of `grain`; 0, and no functions, where a device cannot. commit: memory behind a part that has none; not
  /// initialised. decommit: takes it away; nothing that was put on a stream may need it any more.
  int64_t grain = 0;
  void* (*reserve)(int64_t bytes) = nullptr;
  void (*unreserve)(void* at, int64_t bytes) noexcept = nullptr;
  void (*commit)(void* at, int64_t bytes) = nullptr;
  void (*decommit)(void* at, int64_t bytes) noexcept = nullptr;
  const Memory* host = nullptr;  // of the host, which `download` fills fastest; null where any is as good
};

const Memory& cpu_memory();

/// Bytes of the host's memory that can be had without swapping, as the system estimates it; 0 where it does not say.
int64_t free_memory();

}  // namespace heed
