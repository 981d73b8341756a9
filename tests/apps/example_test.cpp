// The public header as a program uses it.
#include <heed/heed.h>

#include <cmath>
#include <filesystem>

#include "apps/program.h"
#include "apps/tiny_model.h"

namespace {

using Example = heed::ProgramTest;

TEST_F(Example, GenerateText) {
  heed::TinyModel().write(path("model.gguf"));

  auto model = heed::value_or_throw(heed::Model::load(path("model.gguf")));
  heed::Session session(model, {.attention = "streaming-llm(sinks=4,window=28)"});
  const std::vector<int32_t> prompt = model->tokenizer()->encode("Once upon a time there was a harbour");
  heed::Tensor logits = session.prefill(prompt);
  heed::Sampler sampler({.temperature = 0.8f, .top_k = 40, .seed = 1});
  std::vector<int32_t> text;
  for (int i = 0; i < 8; ++i) {
    text.push_back(sampler(logits.select(0, 0).span<const float>()));
    logits = session.decode(text.back());
  }

  EXPECT_EQ(session.tokens().size(), prompt.size() + text.size());
  EXPECT_LE(session.store().layer(0).length(0), 32 + 8);
}

TEST_F(Example, FailuresAreValues) {
  auto model = heed::Model::load(path("nothing.gguf"));
  ASSERT_FALSE(model);
  EXPECT_EQ(model.error().code, heed::Code::NotFound);
}

TEST_F(Example, AttentionOnArrays) {
  const int64_t h = 4, g = 2, n = 5, m = 9, d = 8;
  heed::Random random(1);
  const auto normal = [&](std::initializer_list<int64_t> sizes) {
    heed::Buffer x(heed::Dtype::F32, sizes);
    for (float& value : x->span<float>()) value = float(random.normal());
    return x;
  };
  const heed::Buffer q = normal({h, n, d}), k = normal({g, m, d}), v = normal({g, m, d});

  auto [out, lse] = heed::attend(q, k, v, heed::Plan(), {.causal = true});

  for (int64_t head = 0; head < h; ++head)
    for (int64_t i = 0; i < n; ++i) {
      const int64_t kv = head / (h / g), seen = m - n + i + 1;
      double total = 0;
      std::vector<double> expected(size_t(d), 0.0);
      for (int64_t j = 0; j < seen; ++j) {
        double dot = 0;
        for (int64_t c = 0; c < d; ++c) dot += double(q->at<float>(head, i, c)) * k->at<float>(kv, j, c);
        const double weight = std::exp(dot / std::sqrt(double(d)));
        total += weight;
        for (int64_t c = 0; c < d; ++c) expected[size_t(c)] += weight * v->at<float>(kv, j, c);
      }
      EXPECT_NEAR(lse->at<float>(head, i), std::log(total), 1e-4);
      for (int64_t c = 0; c < d; ++c) EXPECT_NEAR(out->at<float>(head, i, c), expected[size_t(c)] / total, 1e-4);
    }

  EXPECT_THROW(heed::attend(q, k, normal({g, m + 1, d})), heed::Error);
  EXPECT_THROW(heed::attend(q, normal({3, m, d}), normal({3, m, d})), heed::Error);
  EXPECT_THROW(heed::attend(q, k, v, heed::Plan(), {.causal = true, .backend = "abacus"}), heed::Error);
}

}  // namespace
