// Logits of tiny random models of each architecture against llama.cpp's (tests/data/make/tiny_models.py and
// llama_logits.cpp made both).
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>

#include "model/session.h"

namespace heed {
namespace {

constexpr int kTokens = 40;

class GoldenTest : public testing::TestWithParam<const char*> {};

TEST_P(GoldenTest, EqualsLlamaCpp) {
  const std::string base = std::string(HEED_TEST_DATA) + "/tiny/" + GetParam();
  const auto loaded = Model::load(base + ".gguf");
  ASSERT_TRUE(loaded) << loaded.error().text();
  const auto& model = *loaded;
  const int vocabulary = model->info().vocabulary;
  std::vector<float> expected(size_t(kTokens * vocabulary));
  std::ifstream file(base + ".logits", std::ios::binary);
  ASSERT_TRUE(file.read(reinterpret_cast<char*>(expected.data()), std::streamsize(expected.size() * sizeof(float))));
  std::vector<int32_t> ids;
  for (int i = 0; i < kTokens; ++i) ids.push_back((i * 37 + 11) % vocabulary);

  // llama.cpp looks GELU up in a table of half-precision numbers, which alone moves Gemma's logits by 2e-3.
  const double exact = GetParam() == std::string("gemma3") ? 5e-3 : 2e-4;
  std::vector<std::pair<std::string, double>> backends{{"reference", exact}};
  for (const Kernels* table : cpu_kernels()) backends.emplace_back(table->name, table->rounds ? 0.2 : exact + 1e-3);
  for (const auto& [backend, bound] : backends) {
    SessionOptions options;
    options.backend = backend;
    options.k.kind = options.v.kind = PageType::Kind::F32;
    Session session(model, options);
    const Tensor logits = session.prefill(ids, Session::Logits::All);
    double most = 0;
    for (int64_t i = 0; i < logits.numel(); ++i) {
      ASSERT_FALSE(std::isnan(logits.as<float>()[i]));
      most = std::max(most, std::abs(double(logits.as<float>()[i]) - double(expected[size_t(i)])));
    }
    EXPECT_LT(most, bound) << backend;
    // One token at a time, behind half of the text.
    Session stepping(model, options);
    stepping.prefill(std::span(ids).first(kTokens / 2));
    for (int i = kTokens / 2; i < kTokens; ++i) {
      const Tensor y = stepping.decode(ids[size_t(i)]);
      for (int v = 0; v < vocabulary; ++v)
        ASSERT_NEAR(y.at<float>(0, v), expected[size_t(i * vocabulary + v)], bound) << backend << " token " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Architectures, GoldenTest, testing::Values("llama", "qwen2", "qwen3", "gemma3"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace heed
