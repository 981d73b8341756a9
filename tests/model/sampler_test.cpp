// Samplers against the formulas written out on a few logits.
#include "model/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "base/error.h"

namespace heed {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<double> softmax(const std::vector<float>& logits, double temperature) {
  std::vector<double> out;
  double total = 0;
  for (const float x : logits) total += out.emplace_back(std::exp(double(x) / temperature));
  for (double& p : out) p /= total;
  return out;
}

std::vector<int32_t> ids(const Sampler& sampler, const std::vector<float>& logits) {
  std::vector<int32_t> out;
  double total = 0;
  for (const auto& c : sampler.candidates(logits)) {
    out.push_back(c.id);
    total += c.probability;
  }
  EXPECT_NEAR(total, 1, 1e-12);
  return out;
}

// Probabilities 0.4, 0.3, 0.2, 0.1 under ids 2, 0, 3, 1.
const std::vector<float> four = {std::log(0.3f), std::log(0.1f), std::log(0.4f), std::log(0.2f)};

TEST(Sampler, GreedyTakesTheFirstOfTheLargest) {
  Sampler greedy;
  EXPECT_EQ(greedy(four), 2);
  EXPECT_EQ(greedy(std::vector<float>{1, 3, 3, 2}), 1);
  EXPECT_EQ(greedy(std::vector<float>{kNan, -kInfinity, -7}), 2);
  EXPECT_EQ(greedy(std::vector<float>{1, kInfinity}), 1);
  EXPECT_EQ(ids(greedy, four), std::vector<int32_t>{2});
  EXPECT_THROW(greedy(std::vector<float>{}), Error);
  EXPECT_THROW(greedy(std::vector<float>{kNan, -kInfinity}), Error);
}

TEST(Sampler, FiltersKeepWhatTheirFormulasSay) {
  using Ids = std::vector<int32_t>;
  EXPECT_EQ(ids(Sampler({.temperature = 1}), four), (Ids{2, 0, 3, 1}));
  EXPECT_EQ(ids(Sampler({.temperature = 1, .top_k = 2}), four), (Ids{2, 0}));
  EXPECT_EQ(ids(Sampler({.temperature = 1, .top_k = 9}), four), (Ids{2, 0, 3, 1}));
  // The token that crosses top_p stays.
  EXPECT_EQ(ids(Sampler({.temperature = 1, .top_p = 0.39f}), four), (Ids{2}));
  EXPECT_EQ(ids(Sampler({.temperature = 1, .top_p = 0.41f}), four), (Ids{2, 0}));
  EXPECT_EQ(ids(Sampler({.temperature = 1, .top_p = 0.95f}), four), (Ids{2, 0, 3, 1}));
  EXPECT_EQ(ids(Sampler({.temperature = 1, .min_p = 0.6f}), four), (Ids{2, 0}));
  EXPECT_EQ(ids(Sampler({.temperature = 1, .min_p = 1}), four), (Ids{2}));
  // top_p is a share of what top_k left: 0.4 / 0.7 reaches 0.55.
  EXPECT_EQ(ids(Sampler({.temperature = 1, .top_k = 2, .top_p = 0.55f}), four), (Ids{2}));
  // Filters look at temperature 1.
  EXPECT_EQ(ids(Sampler({.temperature = 50, .top_p = 0.39f}), four), (Ids{2}));
  EXPECT_EQ(ids(Sampler({.temperature = 1, .top_k = 2}), {1, 1, 1, 1}), (Ids{0, 1}));
  EXPECT_EQ(ids(Sampler({.temperature = 1}), {0, kNan, -kInfinity, 1}), (Ids{3, 0}));
}

TEST(Sampler, DrawsFollowTheDistribution) {
  const std::vector<float> logits = {0.3f, -1, 2, 0, 1.5f, -kInfinity, 0.9f};
  for (const float temperature : {0.5f, 1.0f, 2.0f}) {
    const std::vector<double> want = softmax(logits, temperature);
    Sampler sampler({.temperature = temperature, .seed = 11});
    constexpr int kDraws = 40000;
    std::vector<int> count(logits.size());
    for (int i = 0; i < kDraws; ++i) ++count[size_t(sampler(logits))];
    for (size_t i = 0; i < logits.size(); ++i) {
      // Five standard deviations of a binomial count.
      const double bound = 5 * std::sqrt(want[i] * (1 - want[i]) * kDraws);
      EXPECT_NEAR(count[i], want[i] * kDraws, bound) << "temperature " << temperature << ", token " << i;
    }
    for (const auto& c : sampler.candidates(logits)) EXPECT_NEAR(c.probability, want[size_t(c.id)], 1e-12);
  }
}

TEST(Sampler, FilteredDrawsStayInsideAndKeepProportions) {
  Sampler sampler({.temperature = 1, .top_k = 3, .top_p = 0.7f, .seed = 5});
  int first = 0;
  constexpr int kDraws = 20000;
  for (int i = 0; i < kDraws; ++i) {
    const int32_t id = sampler(four);
    ASSERT_TRUE(id == 2 || id == 0);
    first += id == 2;
  }
  EXPECT_NEAR(first, kDraws * 4 / 7.0, 5 * std::sqrt(kDraws * 12 / 49.0));
}

TEST(Sampler, SeedsDecide) {
  const auto draw = [](uint64_t seed) {
    Sampler sampler({.temperature = 1, .seed = seed});
    std::vector<int32_t> out;
    for (int i = 0; i < 50; ++i) out.push_back(sampler(four));
    return out;
  };
  EXPECT_EQ(draw(1), draw(1));
  EXPECT_NE(draw(1), draw(2));
}

TEST(Sampler, LargeVocabulariesKeepTheOrder) {
  Random random(9);
  std::vector<float> logits(50001);
  for (float& x : logits) x = float(random.below(500)) / 50;
  std::vector<int32_t> order(logits.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = int32_t(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return logits[size_t(a)] > logits[size_t(b)]; });
  for (const Sampling& sampling : {Sampling{.temperature = 1, .top_k = 700}, Sampling{.temperature = 1, .top_p = 0.3f},
                                   Sampling{.temperature = 1, .min_p = 0.5f}, Sampling{.temperature = 1}}) {
    const std::vector<int32_t> kept = ids(Sampler(sampling), logits);
    ASSERT_GT(kept.size(), 0u);
    EXPECT_TRUE(std::equal(kept.begin(), kept.end(), order.begin()));
  }
}

TEST(Sampler, RefusesNumbersOutOfRange) {
  for (const Sampling& bad : {Sampling{.temperature = -1}, Sampling{.temperature = kNan}, Sampling{.temperature = kInfinity},
                              Sampling{.top_k = -1}, Sampling{.top_p = 0}, Sampling{.top_p = 1.5f},
                              Sampling{.top_p = kNan}, Sampling{.min_p = -0.1f}, Sampling{.min_p = 2}}) {
    EXPECT_THROW(Sampler{bad}, Error);
  }
}

}  // namespace
}  // namespace heed
