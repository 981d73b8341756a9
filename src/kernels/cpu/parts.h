// Rows split among workers.
#pragma once
#include <algorithm>

#include "base/threads.h"

namespace heed::HEED_ISA {

/// Calls rows(begin, end) for parts of 0 … count, each of about 32 KB (enough to outweigh what a part costs to hand out,
/// small enough to even out the workers). Work that fits one part runs on the caller: a region costs a microsecond.
template <class Fn>
void over_parts(int64_t count, int64_t row_bytes, Fn&& rows) {
  const int64_t step = std::max<int64_t>(1, (32 << 10) / std::max<int64_t>(1, row_bytes)), parts = (count + step - 1) / step;
  const auto part = [&](int64_t i) { rows(i * step, std::min(count, (i + 1) * step)); };
  if (parts > 1) parallel_for(parts, part);
  else if (parts == 1) part(0);
}

}  // namespace heed::HEED_ISA
