// Slots: ranges of address space for the pages of one segment each, with memory behind as much of them as is held. Pages of a
// segment then lie end to end and never move.
#pragma once
#include <cstdint>
#include <mutex>
#include <vector>

#include "base/memory.h"

namespace heed {

struct SlotOptions {
  int64_t group = 0;    // bytes that are mapped at a time (a page group); 0: no slots
  int64_t entries = 0;  // that a segment may ever hold
  int ahead = 1;        // steps whose page groups are mapped beforehand
  int64_t most = 0;     // bytes that may be mapped at once, in all slots of one shape; 0: what there is
};

class SlotPool {
 public:
  /// Slots of `pages` pages of `stride` bytes. Throws Error(Unsupported) where memory cannot be reserved, Error(Invalid)
  /// where groups are no multiple of its grain.
  SlotPool(const Memory& memory, const SlotOptions& options, int64_t pages, int64_t stride);
  ~SlotPool();
  SlotPool(const SlotPool&) = delete;
  SlotPool& operator=(const SlotPool&) = delete;

  /// The slot for a segment of `pages` pages. A slot that is given back keeps what is mapped. Of those, the one with
  /// the least mapped that suffices is taken, else the one with the most; a new one where none is free.
  int take(int64_t pages);
  void give(int slot) noexcept;
  char* base(int slot);
  /// Memory behind the first `pages` pages: ⌈pages · stride / group⌉ groups at least. How many were mapped for it. Takes groups
  /// from free slots when there is no other memory; throws Error(Memory) when there is none at all.
  int64_t map(int slot, int64_t pages);
  /// Gives back the groups that pages from `pages` on have to themselves.
  void trim(int slot, int64_t pages) noexcept;
  bool holds(int slot, int64_t pages);
  /// Bytes mapped, in one slot or in those that are free.
  int64_t mapped(int slot);
  int64_t idle();

 private:
  struct Slot {
    char* base;
    int64_t groups = 0;
    bool free = false;
  };
  int64_t groups_for(int64_t pages) const { return (pages * stride_ + options_.group - 1) / options_.group; }
  void unmap(Slot& slot, int64_t groups) noexcept;
  bool reclaim() noexcept;

  const Memory* memory_;
  SlotOptions options_;
  int64_t pages_, stride_, reserved_;
  std::mutex mutex_;  // groups are mapped ahead beside the thread that uses them
  std::vector<Slot> slots_;
  int64_t total_ = 0;  // groups
};

}  // namespace heed
