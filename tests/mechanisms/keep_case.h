// What keep policies are held against: kept sets, sums of explicit softmax weights, SnapKV's scores.
#pragma once
#include "harness.h"

namespace heed::test {

/// What a policy keeps, as a set for each KV head, and that the output of the prompt stays dense.
inline std::vector<std::vector<int32_t>> kept(const Case& c, const std::string& spec, const std::string& backend) {
  const ApplyOutput out = c.run(spec, backend);
  EXPECT_LT(c.dense_error(out), kExact) << spec;
  return lists(out, "kept");
}

/// The last query over the kept entries, against the explicit softmax over them.
inline double kept_error(const Case& c, const ApplyOutput& out) {
  const auto held = lists(out, "kept");
  double worst = 0;
  for (int64_t head = 0; head < c.shape.h; ++head) {
    const auto& list = held[size_t(head / c.group())];
    const auto expected = c.output(head, c.weights(head, c.shape.n - 1, [&](int64_t j) {
      return std::binary_search(list.begin(), list.end(), int32_t(j));
    }));
    for (int64_t x = 0; x < c.shape.d_v; ++x)
      worst = std::max(worst, std::abs(double(out.find("kept_out")->view().at<float>(head, x)) - expected[size_t(x)]));
  }
  return worst;
}

/// Mean over the group (or maximum) of votes[head][j].
inline std::vector<double> grouped(const Case& c, int64_t kv, const Rows& votes, bool max = false) {
  std::vector<double> out(size_t(c.shape.m), max ? -INFINITY : 0.0);
  for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head)
    for (int64_t j = 0; j < c.shape.m; ++j) {
      double& x = out[size_t(j)];
      x = max ? std::max(x, votes[size_t(head)][size_t(j)]) : x + votes[size_t(head)][size_t(j)] / double(c.group());
    }
  return out;
}

/// Column sums of the last `rows` rows of every query head.
inline Rows column_sums(const Case& c, int64_t rows) {
  Rows out;
  for (int64_t head = 0; head < c.shape.h; ++head) {
    auto& sum = out.emplace_back(size_t(c.shape.m), 0.0);
    for (int64_t i = std::max<int64_t>(0, c.shape.n - rows); i < c.shape.n; ++i) {
      const auto p = c.causal(head, i);
      for (int64_t j = 0; j < c.shape.m; ++j) sum[size_t(j)] += p[size_t(j)];
    }
  }
  return out;
}

/// SnapKV's scores of all keys of a KV head, +∞ for the window.
inline std::vector<double> snapkv_scores(const Case& c, int64_t kv, int64_t window, int64_t kernel,
                                         bool max_pool = false, bool max_group = false) {
  const auto votes = grouped(c, kv, column_sums(c, window), max_group);
  const int64_t prefix = std::max<int64_t>(0, c.shape.m - window);
  std::vector<double> out(size_t(c.shape.m), INFINITY);
  for (int64_t j = 0; j < prefix; ++j) {
    double sum = 0, most = -INFINITY;
    for (int64_t x = j - kernel / 2; x <= j + kernel / 2; ++x) {
      if (x < 0 || x >= prefix) continue;
      sum += votes[size_t(x)], most = std::max(most, votes[size_t(x)]);
    }
    out[size_t(j)] = max_pool ? most : sum / double(kernel);
  }
  return out;
}

/// Sets of equal size may differ among scores that lie within rounding of the last one taken.
inline void expect_top(const std::vector<int32_t>& held, const std::vector<double>& scores, int64_t count,
                       const std::string& what) {
  const std::vector<int32_t> best = top(scores, count);
  ASSERT_EQ(held.size(), best.size()) << what;
  double last = INFINITY, largest = 0;
  for (int32_t j : best) last = std::min(last, scores[size_t(j)]);
  for (double x : scores)
    if (std::isfinite(x)) largest = std::max(largest, std::abs(x));
  std::vector<int32_t> odd;
  std::set_symmetric_difference(held.begin(), held.end(), best.begin(), best.end(), std::back_inserter(odd));
  for (int32_t j : odd) EXPECT_NEAR(scores[size_t(j)], last, 2e-5 * largest) << what << ": entry " << j;
  EXPECT_LE(odd.size(), 4u) << what;
}

}  // namespace heed::test
