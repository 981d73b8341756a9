#include <algorithm>

#include "kernels/check.h"
#include "kernels/reference/reference.h"

namespace heed::reference {

void pool(Queue&, const Ragged& x, PoolKind kind, int block, Ragged out) {
  constexpr const char* where = "pool";
  const bool concat = kind == PoolKind::Concat || kind == PoolKind::ConcatReversed;
  const int64_t w = width(x.values), width_out = concat ? block * w : w;
  require(block >= 1 && is_float(x.values.type), where, "x is F32, BF16 or F16, and blocks have at least one row");
  require(out.segments() == x.segments() && width(out.values) == width_out, where,
          "out has x's segments and is " + std::to_string(width_out) + " wide, got " + out.values.shape());
  for (int64_t s = 0; s < x.segments(); ++s)
    for (int64_t b = 0; b * block < x.length(s); ++b) {
      const int64_t first = x.begin(s) + b * block, count = std::min<int64_t>(block, x.end(s) - first);
      for (int64_t c = 0; c < width_out; ++c) {
        double result = 0;
        if (concat) {
          const int64_t place = c / w, r = kind == PoolKind::Concat ? place : block - 1 - place;
          if (r < count) result = number(x.values, first + r, c % w);
        } else {
          double low = infinity, high = -infinity, sum = 0;
          for (int64_t r = first; r < first + count; ++r) {
            const double value = number(x.values, r, c);
            low = std::min(low, value);
            high = std::max(high, value);
            sum += value;
          }
          switch (kind) {
            case PoolKind::Mean: result = sum / double(count); break;
            case PoolKind::Sum: result = sum; break;
            case PoolKind::Min: result = low; break;
            case PoolKind::Max: result = high; break;
            case PoolKind::First: result = number(x.values, first, c); break;
            case PoolKind::Last: result = number(x.values, first + count - 1, c); break;
            case PoolKind::Concat:
            case PoolKind::ConcatReversed: break;
          }
        }
        store(out.values, offset(out.values, out.begin(s) + b, c), result);
      }
    }
}

void smooth(Queue&, const Ragged& x, PoolKind kind, int width, Tensor out) {
  constexpr const char* where = "smooth";
  require(width >= 1 && width % 2 == 1, where, "the window is odd");
  require(kind == PoolKind::Mean || kind == PoolKind::Max, where, "rows are smoothed by Mean or Max");
  check_tensor(where, "out", out, {x.values.size[0]});
  for (int64_t s = 0; s < x.segments(); ++s)
    for (int64_t r = x.begin(s); r < x.end(s); ++r) {
      double sum = 0, top = -infinity;
      for (int64_t j = std::max(x.begin(s), r - width / 2); j <= std::min(x.end(s) - 1, r + width / 2); ++j) {
        sum += number(x.values, j);
        top = std::max(top, number(x.values, j));
      }
      store(out, offset(out, r), kind == PoolKind::Mean ? sum / width : top);
    }
}

}  // namespace heed::reference
