#include "base/random.h"

#include <gtest/gtest.h>

#include <set>
#include <vector>

namespace heed {
namespace {

// SplitMix64's step, from its published definition (Steele, Lea & Flood 2014).
uint64_t splitmix64(uint64_t& x) {
  x += 0x9e3779b97f4a7c15ull;
  uint64_t z = x;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

TEST(Random, IsSplitMix64) {
  uint64_t state = 0;
  EXPECT_EQ(splitmix64(state), 0xe220a8397b1dcdafull);  // the published first output of seed 0
  for (uint64_t seed : {0ull, 1ull, 123456789ull, ~0ull}) {
    Random random(seed);
    uint64_t expected = seed * 0x9e3779b97f4a7c15ull + 0x853c49e6748fea9bull;
    for (int i = 0; i < 10; ++i) ASSERT_EQ(random.next(), splitmix64(expected));
  }
}

TEST(Random, SeedsDiffer) {
  std::set<uint64_t> first;
  for (uint64_t seed = 0; seed < 1000; ++seed) first.insert(Random(seed).next());
  EXPECT_EQ(first.size(), 1000u);
}

TEST(Random, UniformFillsItsRange) {
  Random random(3);
  double sum = 0, low = 1, high = 0;
  for (int i = 0; i < 20000; ++i) {
    const double x = random.uniform();
    ASSERT_GE(x, 0);
    ASSERT_LT(x, 1);
    sum += x;
    low = std::min(low, x);
    high = std::max(high, x);
  }
  EXPECT_NEAR(sum / 20000, 0.5, 0.01);  // five standard errors
  EXPECT_LT(low, 0.001);
  EXPECT_GT(high, 0.999);
}

TEST(Random, BelowIsUniform) {
  Random random(4);
  std::vector<int> counts(7, 0);
  for (int i = 0; i < 70000; ++i) {
    const int64_t x = random.below(7);
    ASSERT_GE(x, 0);
    ASSERT_LT(x, 7);
    ++counts[size_t(x)];
  }
  for (int c : counts) EXPECT_NEAR(c, 10000, 500);  // five standard deviations
  EXPECT_EQ(random.below(1), 0);
}

TEST(Random, NormalHasItsMoments) {
  Random random(5);
  double m1 = 0, m2 = 0, m4 = 0;
  const int n = 40000;
  for (int i = 0; i < n; ++i) {
    const double x = random.normal();
    ASSERT_TRUE(std::isfinite(x));
    m1 += x / n;
    m2 += x * x / n;
    m4 += x * x * x * x / n;
  }
  EXPECT_NEAR(m1, 0, 0.025);  // five standard errors each
  EXPECT_NEAR(m2, 1, 0.036);
  EXPECT_NEAR(m4, 3, 0.25);
}

}  // namespace
}  // namespace heed
