// A Queue is where kernels run: at once on a CPU, in stream order on a GPU.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/tensor.h"

namespace heed {

struct Kernels;  // kernels/kernels.h

/// Scratch memory that a step takes piece by piece and gives back all at once. Blocks are kept between steps, so a
/// steady state allocates nothing. Pieces are 64-byte aligned and not initialised.
class Arena {
 public:
  Tensor take(Dtype type, std::initializer_list<int64_t> sizes);
  Tensor take(Dtype type, std::span<const int64_t> sizes);
  /// Where the arena stands; rewind(mark) gives back everything taken since.
  struct Mark { size_t block = 0; int64_t used = 0; };
  Mark mark() const { return at_; }
  void rewind(Mark mark) { at_ = mark; }
  /// Bytes held from the system.
  int64_t bytes() const;

 private:
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

struct Queue {
  Device device = Device::Cpu;
  const Kernels* run = nullptr;
  Arena scratch;
  int64_t host_waits = 0;  // read_back calls, counted so that tests can forbid them inside roles

  /// Copies a contiguous device tensor to host memory and waits for it: the only host wait there is.
  void read_back(const Tensor& from, void* host);
};

}  // namespace heed
