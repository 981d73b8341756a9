#include <algorithm>

#include "kernels/reference/reference.h"

namespace heed::reference {

void scan(Queue&, const Ragged& x, Tensor a, ScanKind kind, Tensor out) {
  constexpr const char* where = "scan";
  auto as_x = [&](const Tensor& t) { return t.size[0] == x.values.size[0] && width(t) == width(x.values); };
  require(as_x(out), where, "out has x's shape");
  require(kind != ScanKind::Linear || (a && as_x(a)), where, "a linear scan needs a, of x's shape");
  for (int64_t s = 0; s < x.segments(); ++s)
    for (int64_t c = 0; c < width(x.values); ++c) {
      double held = 0;
      for (int64_t t = 0; t < x.length(s); ++t) {
        const int64_t r = x.begin(s) + t;
        const double value = number(x.values, r, c);
        switch (kind) {
          case ScanKind::Linear: held = number(a, r, c) * held + value; break;
          case ScanKind::Lse: held = t == 0 ? value : log_sum_exp({held, value}); break;
          case ScanKind::Min: held = t == 0 ? value : std::min(held, value); break;
          case ScanKind::Max: held = t == 0 ? value : std::max(held, value); break;
          case ScanKind::Mean: held += value; break;
        }
        store(out, offset(out, r, c), kind == ScanKind::Mean ? held / double(t + 1) : held);
      }
    }
}

}  // namespace heed::reference
