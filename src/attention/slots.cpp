#include "attention/slots.h"

#include <algorithm>
#include <string>

#include "base/error.h"

namespace heed {

SlotPool::SlotPool(const Memory& memory, const SlotOptions& options, int64_t pages, int64_t stride)
    : memory_(&memory), options_(options), pages_(pages), stride_(stride), reserved_(groups_for(pages) * options.group) {
  if (memory.grain == 0)
    throw Error(Code::Unsupported, "slots", "address space cannot be reserved on this device",
                "use --backend cpu, or leave pages where the store finds room for them");
  require(options.group % memory.grain == 0, "slots",
          "page groups of " + std::to_string(options.group) + " bytes are no multiple of the " +
              std::to_string(memory.grain) + " that this memory is mapped in");
}

SlotPool::~SlotPool() {
  for (Slot& slot : slots_) {
    unmap(slot, 0);
    memory_->unreserve(slot.base, reserved_);
  }
}

int SlotPool::take(int64_t pages) {
  const std::lock_guard lock(mutex_);
  const int64_t needed = groups_for(pages);
  int best = -1;
  for (int i = 0; i < int(slots_.size()); ++i) {
    if (!slots_[size_t(i)].free) continue;
    if (best < 0) {
      best = i;
      continue;
    }
    const int64_t has = slots_[size_t(i)].groups, had = slots_[size_t(best)].groups;
    if (had < needed ? has > had : has >= needed && has < had) best = i;
  }
  if (best < 0) {
    best = int(slots_.size());
    slots_.push_back({static_cast<char*>(memory_->reserve(reserved_))});
  }
  slots_[size_t(best)].free = false;
  return best;
}

void SlotPool::give(int slot) noexcept {
  const std::lock_guard lock(mutex_);
  slots_[size_t(slot)].free = true;
}

char* SlotPool::base(int slot) {
  const std::lock_guard lock(mutex_);
  return slots_[size_t(slot)].base;
}

void SlotPool::unmap(Slot& slot, int64_t groups) noexcept {
  if (slot.groups <= groups) return;
  memory_->decommit(slot.base + groups * options_.group, (slot.groups - groups) * options_.group);
  total_ -= slot.groups - groups;
  slot.groups = groups;
}

/// A group of some free slot.
bool SlotPool::reclaim() noexcept {
  for (Slot& slot : slots_)
    if (slot.free && slot.groups > 0) return unmap(slot, slot.groups - 1), true;
  return false;
}

int64_t SlotPool::map(int slot, int64_t pages) {
  const std::lock_guard lock(mutex_);
  require(pages <= pages_, "slots",
          std::to_string(pages) + " pages for one KV head, and address space for " + std::to_string(pages_),
          "reserve more: vattention(context=…)");
  const int64_t group = options_.group, groups = groups_for(pages), before = slots_[size_t(slot)].groups;
  while (slots_[size_t(slot)].groups < groups) {
    Slot& here = slots_[size_t(slot)];
    int64_t more = groups - here.groups;
    if (options_.most > 0) more = std::min(more, options_.most / group - total_);
    if (more <= 0 && reclaim()) continue;
    if (more <= 0)
      throw Error(Code::Memory, "slots",
                  "all " + std::to_string(options_.most / group) + " page groups of " + std::to_string(group) +
                      " bytes are in use",
                  "give vattention a larger pool=, or none");
    try {
      memory_->commit(here.base + here.groups * group, more * group);
    } catch (const Error&) {
      if (!reclaim()) throw;
      continue;
    }
    here.groups += more, total_ += more;
  }
  return slots_[size_t(slot)].groups - before;
}

void SlotPool::trim(int slot, int64_t pages) noexcept {
  const std::lock_guard lock(mutex_);
  unmap(slots_[size_t(slot)], groups_for(pages));
}

bool SlotPool::holds(int slot, int64_t pages) {
  const std::lock_guard lock(mutex_);
  return slots_[size_t(slot)].groups >= groups_for(pages);
}

int64_t SlotPool::mapped(int slot) {
  const std::lock_guard lock(mutex_);
  return slots_[size_t(slot)].groups * options_.group;
}

int64_t SlotPool::idle() {
  const std::lock_guard lock(mutex_);
  int64_t groups = 0;
  for (const Slot& slot : slots_) groups += slot.free ? slot.groups : 0;
  return groups * options_.group;
}

}  // namespace heed
