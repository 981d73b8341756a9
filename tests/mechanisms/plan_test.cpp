#include "plan_case.h"

namespace heed::test {
namespace {

class Plans : public Mechanisms {};
HEED_ON_ALL_SETTINGS(Plans);

TEST_P(Plans, IdentityIsDense) {
  for (const Shape s : {shape(100, 100), shape(33, 97), shape(1, 1)}) {
    const Case c(s);
    for (const char* spec :
         {"xattention(threshold=1,block=16)", "moba(topk=1000000,block=16)", "flexprefill(gamma=1,block=16)", "dense",
          "xattention(threshold=1)+snapkv(budget=1.0)+quest(budget=1.0)"})
      EXPECT_LT(c.dense_error(c.run(spec, backend())), kExact) << spec;
  }
}

TEST_P(Plans, MobaIsItsNaiveMask) {
  for (const auto& [s, block, k] : {std::tuple{shape(90, 90), 16, 3}, {shape(40, 101), 8, 4}, {shape(64, 64), 13, 1}}) {
    const Case c(s, 4);
    const auto plan = planned(c, "moba(block=" + std::to_string(block) + ",topk=" + std::to_string(k) + ")", backend(),
                              1, 1);  // tiles with masks are listed key by key
    for (int64_t head = 0; head < s.h; ++head)
      for (int64_t i = 0; i < s.n; ++i) {
        const int64_t own = (c.first() + i) / block;
        std::vector<double> gate;
        for (int64_t b = 0; b <= own; ++b) {
          double sum = 0;
          const int64_t end = std::min<int64_t>(s.m, (b + 1) * block);
          for (int64_t j = b * block; j < end; ++j) sum += c.dot(head, i, j);
          gate.push_back(sum / double(end - b * block));
        }
        gate.back() = INFINITY;
        std::vector<int32_t> keys;
        for (int32_t b : top(gate, k))
          for (int64_t j = b * block; j < (b + 1) * block && j <= c.first() + i; ++j) keys.push_back(int32_t(j));
        EXPECT_EQ(plan[size_t(head * s.n + i)], keys) << "head " << head << " row " << i;
      }
  }
}

/// Block masses of XAttention's estimate: softmax over groups of antidiagonal sums.
Rows antidiagonal_mass(const Case& c, int64_t head, int64_t stride, int64_t block) {
  const Shape& s = c.shape;
  const int64_t rows = (s.n + stride - 1) / stride, cols = (s.m + stride - 1) / stride;
  Rows mass(size_t((s.n + block - 1) / block), std::vector<double>(size_t((s.m + block - 1) / block), 0.0));
  for (int64_t a = 0; a < rows; ++a) {
    std::vector<double> score;
    for (int64_t g = 0; g < cols; ++g) {
      if (g * stride > c.first() + (a + 1) * stride - 1) break;
      double sum = 0;
      for (int64_t u = 0; u < stride; ++u) {
        const int64_t i = a * stride + stride - 1 - u, j = g * stride + u;
        if (i < s.n && j < s.m) sum += c.dot(head, i, j);
      }
      score.push_back(sum / std::sqrt(double(s.d)) / double(stride));
    }
    const double most = *std::max_element(score.begin(), score.end());
    double total = 0;
    for (double& x : score) total += x = std::exp(x - most);
    for (size_t g = 0; g < score.size(); ++g)
      mass[size_t(a * stride / block)][g * size_t(stride) / size_t(block)] += score[g] / total;
  }
  return mass;
}

TEST_P(Plans, XAttentionHoldsItsShareOfTheEstimate) {
  for (const auto& [s, stride, block, threshold] : {std::tuple{shape(160, 160), 8, 16, 0.7},
                                                    {shape(101, 101), 4, 16, 0.5},
                                                    {shape(48, 112), 8, 16, 0.8},
                                                    {shape(90, 90), 1, 8, 0.6},
                                                    {shape(40, 73), 4, 8, 0.6}}) {
    const Case c(s, 6, 2.5);
    const auto plan = planned(c,
                              "xattention(stride=" + std::to_string(stride) + ",block=" + std::to_string(block) +
                                  ",threshold=" + std::to_string(threshold) + ")",
                              backend(), block, block);
    const int64_t tiles = (s.n + block - 1) / block;
    for (int64_t head = 0; head < s.h; ++head) {
      const Rows mass = antidiagonal_mass(c, head, stride, block);
      for (int64_t t = 0; t < tiles; ++t) {
        const auto& row = mass[size_t(t)];
        const int64_t first = (c.first() + t * block) / block,
                      last = (c.first() + std::min((t + 1) * block, s.n) - 1) / block;
        std::set<int32_t> expected{0};
        for (int64_t j = first; j <= last; ++j) expected.insert(int32_t(j));
        const double total = std::accumulate(row.begin(), row.begin() + last + 1, 0.0);
        double held = 0;
        for (int32_t j : expected) held += row[size_t(j)];
        std::vector<int32_t> order = all_of(last + 1);
        std::stable_sort(order.begin(), order.end(),
                         [&](int32_t a, int32_t b) { return row[size_t(a)] > row[size_t(b)]; });
        for (int32_t j : order) {
          if (expected.contains(j)) continue;
          if (held >= double(float(threshold)) * total) break;
          expected.insert(j);
          held += row[size_t(j)];
        }
        EXPECT_EQ(plan[size_t(head * tiles + t)], std::vector<int32_t>(expected.begin(), expected.end()))
            << "head " << head << " block " << t;
      }
    }
  }
}

// The released code's first chunk, from its own cumulative list: 0, 0, diagonal, diagonal + s_1, …; what is left out is
// written as block 0.
TEST_P(Plans, XAttentionAsReleased) {
  const Case c(shape(112, 112), 6, 2.5);
  const auto plan = planned(c, "xattention(stride=4,block=16,threshold=0.6,as_released=true)", backend(), 16, 16);
  for (int64_t head = 0; head < c.shape.h; ++head) {
    const Rows mass = antidiagonal_mass(c, head, 4, 16);
    for (int64_t t = 0; t < 7; ++t) {
      const auto& row = mass[size_t(t)];
      std::vector<int32_t> order = all_of(t);
      std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return row[size_t(a)] > row[size_t(b)]; });
      const double total = std::accumulate(row.begin(), row.begin() + t + 1, 0.0);
      std::vector<double> before{0, row[size_t(t)]};
      for (size_t i = 0; i + 2 < order.size(); ++i) before.push_back(before.back() + row[size_t(order[i])]);
      std::set<int32_t> expected{0, int32_t(t)};
      for (size_t i = 0; i < order.size() && before[i] < double(0.6f) * total; ++i) expected.insert(order[i]);
      EXPECT_EQ(plan[size_t(head * 7 + t)], std::vector<int32_t>(expected.begin(), expected.end()))
          << "head " << head << " block " << t;
    }
  }
}

// Groups of one key are the keys themselves: the estimate is the exact mass, so rows keep at least the threshold of it.
TEST_P(Plans, XAttentionOfStrideOneIsExact) {
  const Case c(shape(96, 96), 7, 2.0);
  const auto plan = planned(c, "xattention(stride=1,block=16,threshold=0.9)", backend(), 16, 16);
  for (int64_t head = 0; head < c.shape.h; ++head)
    for (int64_t t = 0; t < 6; ++t) {
      double kept = 0;
      for (int64_t i = t * 16; i < (t + 1) * 16; ++i) {
        const auto p = c.causal(head, i);
        for (int32_t b : plan[size_t(head * 6 + t)])
          kept += std::accumulate(p.begin() + b * 16, p.begin() + (b + 1) * 16, 0.0);
      }
      EXPECT_GE(kept / 16, 0.9 - 1e-5);
    }
}

TEST_P(Plans, XAttentionWithoutCausality) {
  const Case c(shape(64, 64), 8, 2.0);
  ApplyInput in = c.input(backend());
  in.causal = false;
  const ApplyOutput out = Case::run("xattention(stride=4,block=16,threshold=0.5)", in),
                    all = Case::run("xattention(threshold=1,block=16)", in);
  const auto plan = lists(out, "plan");
  bool later = false;
  double worst = 0;
  for (int64_t head = 0; head < c.shape.h; ++head)
    for (int64_t i = 0; i < 64; ++i) {
      const auto& list = plan[size_t(head * 4 + i / 16)];
      later |= list.back() > i / 16;
      const auto some = c.output(head, c.weights(head, i, [&](int64_t j) {
        return std::binary_search(list.begin(), list.end(), int32_t(j / 16));
      }));
      const auto dense = c.output(head, c.weights(head, i, [](int64_t) { return true; }));
      for (int64_t x = 0; x < c.shape.d_v; ++x) {
        worst = std::max(worst, std::abs(some[size_t(x)] - double(out.find("out")->view().at<float>(head, i, x))));
        worst = std::max(worst, std::abs(dense[size_t(x)] - double(all.find("out")->view().at<float>(head, i, x))));
      }
    }
  EXPECT_LT(worst, kExact);
  EXPECT_TRUE(later) << "no later block was chosen";
}

TEST_P(Plans, AHigherThresholdReadsMore) {
  const Case c(shape(160, 160), 9, 2.0);
  std::vector<std::vector<int32_t>> before;
  for (double threshold : {0.1, 0.5, 0.8, 0.95}) {
    const auto now = planned(c, "xattention(block=16,threshold=" + std::to_string(threshold) + ")", backend(), 16, 16);
    for (size_t r = 0; r < before.size(); ++r)
      EXPECT_TRUE(std::includes(now[r].begin(), now[r].end(), before[r].begin(), before[r].end()));
    before = now;
  }
}

/// FlexPrefill's plan of one head, from the catalogue's steps.
std::vector<std::set<int32_t>> flexprefill(const Case& c, int64_t head, int64_t b, double gamma, double tau,
                                           int64_t min_budget, bool* query_aware) {
  const Shape& s = c.shape;
  const int64_t n = s.n, m = s.m, nb = (m + b - 1) / b;
  const double scale = 1 / std::sqrt(double(s.d));
  std::vector<double> columns(size_t(m), 0.0), offsets(size_t(m), 0.0);
  for (int64_t i = n - b; i < n; ++i) {
    const auto p = c.causal(head, i);
    for (int64_t j = 0; j <= c.first() + i; ++j)
      columns[size_t(j)] += p[size_t(j)] / double(b), offsets[size_t(c.first() + i - j)] += p[size_t(j)] / double(b);
  }
  auto mean_dot = [&](int64_t q0, int64_t q1, int64_t k0, int64_t k1) {
    double sum = 0;
    for (int64_t i = q0; i < q1; ++i)
      for (int64_t j = k0; j < k1; ++j) sum += c.dot(head, i, j);
    return sum / double((q1 - q0) * (k1 - k0)) * scale;
  };
  auto softmax = [](std::vector<double> x) {
    const double most = *std::max_element(x.begin(), x.end());
    double total = 0;
    for (double& y : x) total += y = std::exp(y - most);
    for (double& y : x) y /= total;
    return x;
  };
  std::vector<double> guess, truth(size_t(nb), 0.0);
  for (int64_t k = 0; k < nb; ++k) guess.push_back(mean_dot(n - b, n, k * b, std::min(m, (k + 1) * b)));
  guess = softmax(guess);
  for (int64_t j = 0; j < m; ++j) truth[size_t(j / b)] += columns[size_t(j)];
  double divergence = 0;
  for (int64_t k = 0; k < nb; ++k) {
    const double x = guess[size_t(k)], y = truth[size_t(k)], z = (x + y) / 2;
    divergence += (x * std::log(x / z) + y * std::log(y / z)) / 2;
  }
  *query_aware = std::sqrt(divergence) < tau;
  auto blocks_for = [&](std::vector<double> mass) {
    std::sort(mass.begin(), mass.end(), std::greater<>());
    double sum = 0;
    int64_t count = 0;
    for (double x : mass) count += (sum += x) <= gamma;
    return (count + 1) / 128 + 1;
  };
  const int64_t fewest = std::max<int64_t>(1, (min_budget + b - 1) / b);
  const int64_t nv = std::min(nb, std::max(fewest, *query_aware ? fewest : blocks_for(columns)));
  const int64_t ns = std::min(nb, std::max(fewest, *query_aware ? fewest : blocks_for(offsets)));
  std::vector<double> groups(size_t(nb), 0.0);
  for (int64_t t = 0; t < m; ++t) groups[size_t(t / b)] += offsets[size_t(m - 1 - t)];
  truth[0] = INFINITY, groups[size_t(nb - 1)] = INFINITY;
  const int64_t tiles = (n + b - 1) / b;
  std::vector<std::set<int32_t>> plan(static_cast<size_t>(tiles));
  for (int64_t row = 0; row < tiles; ++row) {
    for (int32_t j : top(truth, nv))
      if (j <= row) plan[size_t(row)].insert(j);
    for (int32_t group : top(groups, ns))
      if (row - (nb - 1 - group) >= 0) plan[size_t(row)].insert(int32_t(row - (nb - 1 - group)));
  }
  if (*query_aware) {
    std::vector<std::pair<double, int64_t>> flat;
    for (int64_t row = 0; row < tiles; ++row) {
      std::vector<double> x;
      for (int64_t k = 0; k <= row; ++k)
        x.push_back(mean_dot(row * b, std::min(n, (row + 1) * b), k * b, std::min(m, (k + 1) * b)));
      x = softmax(x);
      for (int64_t k = 0; k <= row; ++k) flat.emplace_back(x[size_t(k)], row * nb + k);
    }
    std::stable_sort(flat.begin(), flat.end(), [](const auto& x, const auto& y) { return x.first > y.first; });
    double sum = 0;
    for (const auto& [x, cell] : flat) {
      if ((sum += x) > gamma * double(tiles)) break;
      plan[size_t(cell / nb)].insert(int32_t(cell % nb));
    }
  }
  return plan;
}

TEST_P(Plans, FlexPrefillFollowsItsSteps) {
  int aware = 0, slashed = 0;
  for (const auto& [n, sharpness, tau] : {std::tuple{160, 1.5, 0.1}, {149, 3.0, 0.25}, {160, 0.3, 0.6}, {133, 2.0, 0.0}}) {
    const Case c(shape(n, n), 11, sharpness);
    const auto plan = planned(c, "flexprefill(block=16,gamma=0.6,min_budget=32,tau=" + std::to_string(tau) + ")",
                              backend(), 16, 16);
    const int64_t tiles = (n + 15) / 16;
    for (int64_t head = 0; head < c.shape.h; ++head) {
      bool query_aware = false;
      const auto expected = flexprefill(c, head, 16, double(0.6f), tau, 32, &query_aware);
      (query_aware ? aware : slashed) += 1;
      for (int64_t t = 0; t < tiles; ++t)
        EXPECT_EQ(plan[size_t(head * tiles + t)], std::vector<int32_t>(expected[size_t(t)].begin(), expected[size_t(t)].end()))
            << "head " << head << " block " << t << " aware " << query_aware;
    }
  }
  EXPECT_GT(aware, 0);
  EXPECT_GT(slashed, 0);
}

TEST_P(Plans, HeadsOutsideStayDense) {
  const Case c(shape(96, 96), 3);
  const auto plan = planned(c, "moba(block=16,topk=1,heads=1-)", backend(), 1, 1);
  for (int64_t i = 0; i < 96; ++i) {
    const std::vector<int32_t> seen = all_of(i + 1);
    EXPECT_EQ(plan[size_t(i)], seen);
    EXPECT_EQ(plan[size_t(96 + i)], std::vector<int32_t>(seen.begin() + i / 16 * 16, seen.end()));
  }
}

TEST(PlanErrors, AreSaid) {
  const Case c({2, 2, 64, 64, 16, 16});
  ApplyInput in = c.input("reference");
  in.causal = false;
  EXPECT_FALSE(apply("moba(block=16)", in).has_value());
  EXPECT_FALSE(apply("flexprefill(block=16,min_budget=0)", in).has_value());
  EXPECT_NE(apply("xattention(stride=7)", c.input("reference")).error().text().find("stride"), std::string::npos);
}

}  // namespace
}  // namespace heed::test
