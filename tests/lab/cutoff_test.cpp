#include "lab/cutoff.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "base/hash.h"
#include "base/random.h"
#include "lab/files.h"
#include "mechanisms/registry.h"

namespace heed {
namespace {

// Where the regression ends, no weight can be changed for the better: both classes weigh one half, columns are standardised.
TEST(Cutoff, TheRegressionEndsWhereItsSlopeIsNothing) {
  Random random(3);
  std::vector<std::vector<double>> x;
  std::vector<int> labels;
  for (int r = 0; r < 60; ++r) {
    const double a = random.normal(), b = 5 + 0.01 * random.normal();
    x.push_back({a, b, 7.0});
    labels.push_back(a + 40 * (b - 5) + 0.8 * random.normal() > 0.6);
  }
  const double ridge = 0.05;
  const Logistic fit = fit_logistic(x, labels, ridge, 20000);
  ASSERT_EQ(fit.weights.size(), 3u);
  EXPECT_EQ(fit.weights[2], 0) << "a column that does not vary says nothing";
  double ones = 0;
  for (int y : labels) ones += y;
  ASSERT_GT(ones, 5);
  ASSERT_LT(ones, 55);
  double bias_slope = 0;
  for (size_t c = 0; c < 2; ++c) {
    double mean = 0, variance = 0, slope = 0;
    for (const auto& row : x) mean += row[c] / 60;
    for (const auto& row : x) variance += (row[c] - mean) * (row[c] - mean) / 60;
    const double deviation = std::sqrt(variance);
    for (size_t r = 0; r < x.size(); ++r) {
      const double z = fit.weights[0] * x[r][0] + fit.weights[1] * x[r][1] + fit.bias;
      EXPECT_NEAR(fit.probability(x[r]), 1 / (1 + std::exp(-z)), 1e-12);
      const double off = (fit.probability(x[r]) - labels[r]) * (labels[r] ? 0.5 / ones : 0.5 / (60 - ones));
      slope += off * (x[r][c] - mean) / deviation;
      if (c == 0) bias_slope += off;
    }
    EXPECT_NEAR(slope + ridge * fit.weights[c] * deviation, 0, 1e-6) << "column " << c;
    EXPECT_GT(fit.weights[c], 0);
  }
  EXPECT_NEAR(bias_slope, 0, 1e-6);
}

TEST(Cutoff, F1IsOfTheOnes) {
  EXPECT_DOUBLE_EQ(f1(std::vector<int>{1, 1, 0, 0}, std::vector<int>{1, 0, 1, 0}), 0.5);
  EXPECT_DOUBLE_EQ(f1(std::vector<int>{1, 1, 1, 1}, std::vector<int>{1, 0, 0, 0}), 0.4);
  EXPECT_DOUBLE_EQ(f1(std::vector<int>{0, 0}, std::vector<int>{1, 0}), 0);
  EXPECT_DOUBLE_EQ(f1(std::vector<int>{1, 0}, std::vector<int>{1, 0}), 1);
}

TEST(Cutoff, AProfileIsASpecForItsModel) {
  ModelInfo m;
  m.architecture = "llama", m.layers = 3, m.h = 4, m.g = 2, m.d = m.d_v = 2, m.hash = 0xabcdefull;
  const CutoffProbe learnt{.heads = {1, 10}, .probe = {{0.5, -1.25e-7, 3, -20000.5}, -0.75}, .f1 = 0.9, .f1_always = 0.6};
  const Spec spec = value_or_throw(parse_spec("context-cutoff(piece=0.2)"))[0];
  const auto profile = cutoff_profile(spec, m, learnt);
  EXPECT_EQ(profile["attention"],
            "context-cutoff(piece=0.2,probes=[1,10],weights=[0.5,-1.25e-07,3,-20000.5],bias=-0.75)");
  EXPECT_EQ(profile["model"], hexadecimal(m.hash));
  const std::string path = testing::TempDir() + "/heed_cutoff.json";
  value_or_throw(write_file(path, profile.dump()));
  const Composition read = value_or_throw(Composition::parse("@" + path, m, registry()));
  EXPECT_NO_THROW(read.parts()[0].mechanism->open(m));
  m.d_v = 4;
  EXPECT_THROW(read.parts()[0].mechanism->open(m), Error) << "too few weights";
  for (const char* text : {"context-cutoff(probes=3)", "context-cutoff(bias=1)", "context-cutoff(weights=[1])"})
    EXPECT_THROW(cutoff_profile(value_or_throw(parse_spec(text))[0], m, learnt), Error) << text;
}

// On prompts it has not seen, a probe of a real model is better than one who always has enough.
TEST(Cutoff, AProbeKnowsWhenTheSentenceHasBeenRead) {
  const std::string folder = HEED_MODELS, path = folder + "/smollm2-135m.gguf";
  if (!std::filesystem::exists(path)) GTEST_SKIP() << "models/smollm2-135m.gguf is not there";
  const auto model = value_or_throw(Model::load(path));
  std::ifstream file(folder + "/text.txt");
  std::string text(40000, ' ');
  file.read(text.data(), std::ssize(text));
  const auto tokens = model->tokenizer()->encode(text);
  CutoffOptions options;
  options.length = 256, options.prompts = 8;
  const CutoffProbe probe = learn_cutoff(model, tokens, options);
  EXPECT_EQ(probe.heads.size(), 5u);
  EXPECT_EQ(int64_t(probe.probe.weights.size()), 5 * model->info().d_v);
  EXPECT_GT(probe.f1, probe.f1_always);
  EXPECT_GT(probe.f1_always, 0.4);
  options.prompts = 7;
  EXPECT_THROW(learn_cutoff(model, tokens, options), Error);
}

}  // namespace
}  // namespace heed
