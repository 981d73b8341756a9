#include "lab/metrics.h"

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

namespace heed {
namespace {

// tests/data/make/metrics.py wrote these, with other implementations.
TEST(Metrics, AreThoseOfOtherImplementations) {
  std::ifstream file(HEED_TEST_DATA "/metrics/golden.json");
  const auto golden = nlohmann::json::parse(file);
  const auto classes = golden["classes"].get<std::vector<std::string>>();
  ASSERT_GT(golden["cases"].size(), 200u);
  std::map<std::string, int> between;  // cases that are neither 0 nor 1
  for (const auto& c : golden["cases"]) {
    const std::string answer = c["answer"], expected = c["expected"];
    for (const Metric& metric : longbench_metrics()) {
      const double right = c[metric.name];
      EXPECT_NEAR(metric.score(answer, expected, classes), right, 1e-9)
          << metric.name << ": '" << answer << "' for '" << expected << "'";
      between[metric.name] += right > 0 && right < 1;
    }
  }
  for (const Metric& metric : longbench_metrics()) EXPECT_GT(between[metric.name], 0) << metric.name;
}

TEST(Metrics, StringMatchCountsWhatTheAnswerHolds) {
  const std::vector<std::string> expected = {"Alpha", "beta", "42"};
  EXPECT_NEAR(string_match_all("ALPHA and 421", expected), 2.0 / 3, 1e-12);
  EXPECT_EQ(string_match_all("", expected), 0);
  EXPECT_EQ(string_match_all("beta 42 alpha", expected), 1);
  EXPECT_EQ(string_match_part("xbetax", expected), 1);
  EXPECT_EQ(string_match_part("gamma", expected), 0);
  EXPECT_EQ(string_match_all("anything", {}), 0);
}

TEST(Metrics, TakeAnyBytes) {
  const std::string bytes = "\xff\xfe the \xc3 cat\xe2\x82";
  const std::vector<std::string> classes = {"cat"};
  for (const Metric& metric : longbench_metrics())
    for (const auto& [a, b] : {std::pair<std::string, std::string>{bytes, "cat"}, {"cat", bytes}, {bytes, bytes}}) {
      const double score = metric.score(a, b, classes);
      EXPECT_GE(score, 0) << metric.name;
      EXPECT_LE(score, 1) << metric.name;
    }
  EXPECT_EQ(longbench_metric("bleu"), nullptr);
}

}  // namespace
}  // namespace heed
