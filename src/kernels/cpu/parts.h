// Rows split among workers.
#pragma once
#include <algorithm>

#include "base/threads.h"

namespace heed::HEED_ISA {

/// Calls rows(begin, end) for parts of 0 … count: as many parts as workers or a small multiple, so that all end together,
/// unless parts would be of less than 4 KB (a core reads that in half a microsecond, which is what taking one costs) or more
/// than 32 KB. Work that fits one part runs on the caller: a region costs a microsecond. A worker's parts lie one behind the
/// other, so that a core's prefetcher sees one stream (docs/performance.md).
template <class Fn>
void over_parts(int64_t count, int64_t row_bytes, Fn&& rows) {
  const int64_t bytes = count * std::max<int64_t>(1, row_bytes), workers = threads();
  const int64_t rounds = (bytes + workers * (32 << 10) - 1) / (workers * (32 << 10));
  const int64_t most = std::min(rounds * workers, bytes / (4 << 10));
  if (most <= 1) {
    if (count > 0) rows(int64_t(0), count);
    return;
  }
  const int64_t step = (count + most - 1) / most;
  parallel_for((count + step - 1) / step, int(workers),
               [&](int, int64_t i) { rows(i * step, std::min(count, (i + 1) * step)); }, Deal::Stretches);
}

}  // namespace heed::HEED_ISA
