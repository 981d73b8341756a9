// Parallel loops whose workers need memory of their own.
#pragma once
#include "base/queue.h"
#include "base/threads.h"

namespace heed::HEED_ISA {

/// Calls body(memory, i) for i in [0, count); each worker's memory is `bytes` long, aligned to 64 bytes, and kept from
/// one i to the next. body must not depend on what lies there. A single i runs on the caller, with no region at all.
template <class Body>
void parallel_with(Queue& queue, int64_t bytes, int64_t count, Body&& body, Deal deal = Deal::Cards) {
  if (count <= 0) return;
  const int workers = count == 1 ? 1 : threads();
  bytes = (bytes + 63) / 64 * 64;
  char* memory = queue.scratch.take(Dtype::U8, {bytes * workers}).as<char>();
  parallel_for(count, workers, [&](int worker, int64_t i) { body(memory + bytes * worker, i); }, deal);
}

}  // namespace heed::HEED_ISA
