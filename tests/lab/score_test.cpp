#include "lab/score.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/random.h"
#include "base/threads.h"

namespace heed {
namespace {

std::vector<float> random_logits(int64_t count, uint64_t seed, float spread) {
  Random random(seed);
  std::vector<float> out(static_cast<size_t>(count));
  for (float& x : out) x = float(random.normal()) * spread;
  return out;
}

std::vector<double> softmax(const std::vector<float>& x) {
  long double sum = 0;
  for (float v : x) sum += expl(v);
  std::vector<double> out;
  for (float v : x) out.push_back(double(expl(v) / sum));
  return out;
}

TEST(Score, LossIsMinusLogProbability) {
  for (int64_t count : {1, 2, 7, 8192, 8193, 50000}) {
    const auto x = random_logits(count, uint64_t(count), 4);
    const auto p = softmax(x);
    for (int64_t token : {int64_t(0), count / 2, count - 1})
      EXPECT_NEAR(nll(x, int32_t(token)), -std::log(p[size_t(token)]), 1e-5 * (1 + std::abs(std::log(p[size_t(token)]))));
  }
}

TEST(Score, HugeLogitsDoNotOverflow) {
  const std::vector<float> x = {1e6f, 1e6f};
  EXPECT_NEAR(nll(x, 0), std::log(2.0), 1e-6);
  const std::vector<float> y = {-1e30f, 0};
  EXPECT_NEAR(nll(y, 1), 0, 1e-12);
}

TEST(Score, NumberOfThreadsChangesNothing) {
  const auto x = random_logits(100000, 3, 5);
  set_threads(1);
  const double one = log_sum_exp(x);
  set_threads(3);
  EXPECT_EQ(one, log_sum_exp(x));
  set_threads(0);
}

TEST(Score, ArgmaxTakesTheLowerOfEquals) { EXPECT_EQ(argmax(std::vector<float>{1, 5, 5, 2}), 1); }

TEST(Score, DivergenceIsThatOfTheFormula) {
  const int64_t vocabulary = 20000;
  Distributions reference(3, vocabulary);
  for (int64_t row = 0; row < 3; ++row) reference.set(row, random_logits(vocabulary, uint64_t(row), 3));
  for (int64_t row = 0; row < 3; ++row) {
    const auto a = random_logits(vocabulary, uint64_t(row), 3), b = random_logits(vocabulary, uint64_t(row) + 10, 3);
    const auto p = softmax(a), q = softmax(b);
    double kl = 0;
    for (size_t i = 0; i < p.size(); ++i) kl += p[i] * (std::log(p[i]) - std::log(q[i]));
    const auto difference = reference.against(row, b);
    EXPECT_NEAR(difference.kl, kl, 1e-4 * kl);
    EXPECT_EQ(difference.same_top, argmax(a) == argmax(b));
    EXPECT_EQ(reference.against(row, a).kl, 0);
    EXPECT_TRUE(reference.against(row, a).same_top);
  }
}

TEST(Score, ShiftedLogitsAreTheSameDistribution) {
  Distributions reference(1, 1000);
  auto x = random_logits(1000, 1, 2);
  reference.set(0, x);
  for (float& v : x) v += 40;
  EXPECT_LT(reference.against(0, x).kl, 1e-5);
}

TEST(Score, QuantileLiesBetweenNeighbours) {
  EXPECT_EQ(quantile({}, 0.5), 0);
  EXPECT_EQ(quantile({7}, 0.99), 7);
  EXPECT_EQ(quantile({3, 1, 2}, 0.5), 2);
  EXPECT_DOUBLE_EQ(quantile({0, 10}, 0.25), 2.5);
}

}  // namespace
}  // namespace heed
