#include <algorithm>

#include "kernels/check.h"
#include "kernels/reference/reference.h"

namespace heed::reference {

void select(Queue&, const Ragged& scores, const Select& how, int64_t capacity, Tensor index, Tensor count) {
  constexpr const char* where = "select";
  const int64_t segments = scores.segments();
  require(scores.values.type == Dtype::F32 && width(scores.values) == 1, where, "scores are F32 [rows]");
  check_tensor(where, "index", index, {segments * capacity}, false, Dtype::I32);
  check_tensor(where, "count", count, {segments}, false, Dtype::I32);
  check_tensor(where, "k of each segment", how.count, {segments}, true, Dtype::I32);
  check_tensor(where, "weight held already", how.held, {segments}, true, Dtype::F32);
  for (int64_t s = 0; s < segments; ++s) {
    auto score = [&](int32_t i) { return number(scores.values, scores.begin(s) + i); };
    std::vector<int32_t> order;
    double total = 0;
    for (int32_t i = 0; i < scores.length(s); ++i) {
      if (std::isnan(score(i)) || score(i) == -infinity) continue;
      order.push_back(i);
      if (score(i) != infinity) total += score(i);
    }
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return score(a) > score(b); });

    int64_t taken = 0;
    const int64_t there = int64_t(order.size());
    switch (how.by) {
      case Select::By::TopK: taken = how.count ? how.count.at<int32_t>(s) : how.k; break;
      case Select::By::Threshold:
        while (taken < there && score(order[size_t(taken)]) >= double(how.p)) ++taken;
        taken = std::max(taken, how.at_least);
        break;
      case Select::By::TopP: {
        const double held = how.held ? double(how.held.at<float>(s)) : 0;
        double before = held;
        total += held;
        for (; taken < there; ++taken) {
          const double x = score(order[size_t(taken)]);
          if (x == infinity) continue;
          if (how.crossing ? before >= double(how.p) * total : before + x > double(how.p) * total) break;
          before += x;
        }
        taken = std::max(taken, how.at_least);
        break;
      }
    }
    taken = std::clamp<int64_t>(taken, 0, std::min(there, capacity));
    order.resize(size_t(taken));
    std::sort(order.begin(), order.end());
    for (int64_t i = 0; i < taken; ++i) index.at<int32_t>(s * capacity + i) = order[size_t(i)];
    count.at<int32_t>(s) = int32_t(taken);
  }
}

}  // namespace heed::reference
