// A Queue is where kernels run: at once on a CPU, in stream order on a GPU.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "base/tensor.h"

namespace heed {

struct Kernels;  // kernels/kernels.h

/// Scratch memory that a step takes piece by piece and gives back all at once. Blocks are kept between steps, so a
/// steady state allocates nothing. Pieces are 256-byte aligned from the start of a block and not initialised.
class Arena {
 public:
  explicit Arena(const Memory& memory = cpu_memory()) : memory_(&memory) {}
  Tensor take(Dtype type, std::initializer_list<int64_t> sizes);
  Tensor take(Dtype type, std::span<const int64_t> sizes);
  /// Where the arena stands; rewind(mark) gives back everything taken since.
  struct Mark {
    size_t block = 0;
    int64_t used = 0;
  };
  Mark mark() const { return at_; }
  void rewind(Mark mark) { at_ = mark; }
  /// Bytes held from the system.
  int64_t bytes() const;

 private:
  const Memory* memory_;
  std::vector<Buffer> blocks_;
  Mark at_;
};

/// Gives back on leaving a scope what was taken inside it.
class Scratch {
 public:
  explicit Scratch(Arena& arena) : arena_(arena), mark_(arena.mark()) {}
  ~Scratch() { arena_.rewind(mark_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

 private:
  Arena& arena_;
  Arena::Mark mark_;
};

/// Work of a queue, kept to happen again and again (Queue::record); empty when there is none.
class Recording {
 public:
  explicit operator bool() const { return work_ != nullptr; }

 private:
  friend struct Queue;
  std::shared_ptr<void> work_;
  std::vector<Buffer> constants_;  // what was uploaded meanwhile
};

/// Owns its stream, or shares that of its parent. Built by queue_on(kernels); a default one is a CPU queue without kernels.
struct Queue {
  Device device = Device::Cpu;
  const Kernels* run = nullptr;
  const Memory* memory = &cpu_memory();
  void* stream = nullptr;
  Arena scratch;
  int64_t host_waits = 0;  // read_back calls, counted so that tests can forbid them inside roles
  int64_t launches = 0;    // kernels started, where the table counts them
  int64_t uploads = 0;     // upload calls
  int64_t uploaded_bytes = 0;

  Queue() = default;
  Queue(const Kernels* run, const Memory& memory);
  /// Scratch and counts of its own on the parent's stream: what the two start happens in the order of the calls.
  explicit Queue(const Queue* parent);
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  /// A contiguous host tensor's copy in scratch, in stream order, without waiting. `host` may be reused at once.
  Tensor upload(const Tensor& host);
  /// Into a contiguous device tensor of the same type and size.
  void upload(const Tensor& host, const Tensor& to);
  template <class T>
  Tensor upload(std::span<const T> host) {
    return upload(Tensor(const_cast<T*>(host.data()), DtypeOf<T>::value, {int64_t(host.size())}));
  }
  template <class T>
  Tensor upload(const std::vector<T>& host) {
    return upload(std::span<const T>(host));
  }
  /// Contiguous device tensors of the same bytes, which do not overlap.
  void move(const Tensor& from, const Tensor& to);
  /// Every byte of a contiguous device tensor.
  void fill(const Tensor& to, int byte);

  /// What `enqueue` puts on this queue, without its happening. Everything that it names, scratch included, must stay
  /// where it is as long as the recording is replayed; what it uploads is taken for constant. Empty where the device
  /// cannot record, and when `enqueue` threw Error, varies() among others: what it did on the host is then the caller's
  /// to undo.
  Recording record(const std::function<void()>& enqueue);
  bool can_record() const { return memory->begin_recording != nullptr; }
  bool recording() const { return recording_ != nullptr; }
  /// All of it once more, in stream order.
  void replay(const Recording& recording) { memory->replay(stream, recording.work_.get()); }
  /// Said before what hangs on something that only the host knows and that is another in every call: ends a recording
  /// (throws Error(Unsupported) through it).
  void varies() const;

  /// Copies a contiguous device tensor to host memory and waits for it: the only host wait there is.
  void read_back(const Tensor& from, void* host);
  Buffer read_back(const Tensor& from);
  /// Where read_back writes fastest.
  const Memory& host_memory() const { return memory->host ? *memory->host : cpu_memory(); }

 private:
  struct Uploads {
    std::vector<std::pair<Buffer, Tensor>> waiting;  // of the host, and where it goes
    std::vector<Buffer> constants;
  };
  std::shared_ptr<void> stream_owner_;
  Uploads* recording_ = nullptr;
};

}  // namespace heed
