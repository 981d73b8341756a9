// What tests of planners share.
#pragma once
#include "harness.h"

namespace heed::test {

/// The blocks that each query block reads, checked: ascending, causal, and that out is exactly attention over them.
inline std::vector<std::vector<int32_t>> planned(const Case& c, const std::string& spec, const std::string& backend,
                                                 int64_t rows, int64_t cols) {
  const ApplyOutput out = c.run(spec, backend);
  EXPECT_EQ(out.find("plan_block")->view().at<int32_t>(0), rows);
  EXPECT_EQ(out.find("plan_block")->view().at<int32_t>(1), cols);
  auto plan = lists(out, "plan");
  const int64_t tiles = (c.shape.n + rows - 1) / rows;
  EXPECT_EQ(int64_t(plan.size()), c.shape.h * tiles);
  double pairs = 0, all = 0;
  for (int64_t head = 0; head < c.shape.h; ++head)
    for (int64_t i = 0; i < c.shape.n; ++i) {
      const auto& list = plan[size_t(head * tiles + i / rows)];
      EXPECT_TRUE(std::is_sorted(list.begin(), list.end()) && std::adjacent_find(list.begin(), list.end()) == list.end());
      const int64_t last = list.empty() ? 0 : list.back() * cols;
      EXPECT_LE(last, c.first() + std::min(c.shape.n, (i / rows + 1) * rows) - 1) << "a block nobody sees";
      for (int64_t j = 0; head == 0 && j <= c.first() + i; ++j)
        pairs += std::binary_search(list.begin(), list.end(), int32_t(j / cols)), ++all;
    }
  EXPECT_LT(c.error(out,
                    [&](int64_t head, int64_t i, int64_t j) {
                      const auto& list = plan[size_t(head * tiles + i / rows)];
                      return std::binary_search(list.begin(), list.end(), int32_t(j / cols));
                    }),
            kExact)
      << spec;
  EXPECT_NEAR(out.find("density")->view().at<float>(0), pairs / all, 1e-5);
  return plan;
}

/// Mean of q · k over query rows q0 … q1 − 1 and keys k0 … k1 − 1.
inline double mean_dot(const Case& c, int64_t head, int64_t q0, int64_t q1, int64_t k0, int64_t k1) {
  double sum = 0;
  for (int64_t i = q0; i < q1; ++i)
    for (int64_t j = k0; j < k1; ++j) sum += c.dot(head, i, j);
  return sum / double((q1 - q0) * (k1 - k0));
}

inline std::vector<double> softmax(std::vector<double> x) {
  const double most = *std::max_element(x.begin(), x.end());
  double total = 0;
  for (double& y : x) total += y = std::exp(y - most);
  for (double& y : x) y /= total;
  return x;
}

/// Indices by falling score; of ties the lower index first.
inline std::vector<int32_t> ranked(const std::vector<double>& scores) {
  std::vector<int32_t> order = all_of(int64_t(scores.size()));
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return scores[size_t(a)] > scores[size_t(b)]; });
  return order;
}

/// How many of the largest it takes to hold p of the sum: with `crossing` those before which less is held, else those with
/// which no more is held.
inline int64_t holding(const std::vector<double>& mass, double p, bool crossing) {
  const double total = std::accumulate(mass.begin(), mass.end(), 0.0);
  double held = 0;
  int64_t count = 0;
  for (int32_t j : ranked(mass)) {
    if (crossing ? held >= p * total : held + mass[size_t(j)] > p * total) break;
    held += mass[size_t(j)], ++count;
  }
  return count;
}

}  // namespace heed::test
