// Parallel loops whose workers need memory of their own.
#pragma once
#include <atomic>

#include "base/queue.h"
#include "base/threads.h"

namespace heed::HEED_ISA {

/// Calls body(memory, i) for i in [0, count); each worker's memory is `bytes` long, aligned to 64 bytes, and kept from
/// one i to the next. body must not depend on what lies there. A single i runs on the caller, with no region at all.
template <class Body>
void parallel_with(Queue& queue, int64_t bytes, int64_t count, Body&& body) {
  if (count <= 0) return;
  const int workers = count == 1 ? 1 : threads();
  bytes = (bytes + 63) / 64 * 64;
  char* memory = queue.scratch.take(Dtype::U8, {bytes * workers}).as<char>();
  std::atomic<int64_t> next{0};
  auto work = [&](int worker) {
    if (worker >= workers) return;  // the pool may have grown since it was asked
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(memory + bytes * worker, i);
  };
  if (count == 1) work(0);
  else parallel(work);
}

}  // namespace heed::HEED_ISA
