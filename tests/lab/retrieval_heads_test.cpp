#include "lab/retrieval_heads.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace heed {
namespace {

const RetrievalPrompt kCopied{{9, 9, 5, 6, 7, 6, 9, 1}, 2, 6};  // needle 5 6 7 6

TEST(RetrievalHeads, AHeadThatLooksAtWhatIsSaidScoresOne) {
  EXPECT_EQ(copy_score(kCopied, std::vector<int32_t>{2, 3, 4, 5}, std::vector<int32_t>{5, 6, 7, 6}, false), 1);
  EXPECT_EQ(copy_score(kCopied, std::vector<int32_t>{2, 3, 4, 5}, std::vector<int32_t>{5, 6, 7, 6}, true), 1);
  EXPECT_EQ(copy_score(kCopied, std::vector<int32_t>{0, 0, 0, 0}, std::vector<int32_t>{5, 6, 7, 6}, false), 0)
      << "a head on the sink";
  EXPECT_EQ(copy_score(kCopied, std::vector<int32_t>{3, 2, 3, 4}, std::vector<int32_t>{5, 6, 7, 6}, false), 0)
      << "a token it did not say";
  EXPECT_NEAR(copy_score(kCopied, std::vector<int32_t>{3, 5, 3}, std::vector<int32_t>{6, 6, 6}, false), 1.0 / 3, 1e-12);
  EXPECT_NEAR(copy_score(kCopied, std::vector<int32_t>{3, 5, 3}, std::vector<int32_t>{6, 6, 6}, true), 3.0 / 4, 1e-12);
  EXPECT_EQ(copy_score(kCopied, std::vector<int32_t>{-1, 6}, std::vector<int32_t>{9, 9}, false), 0)
      << "outside the needle";
}

TEST(RetrievalHeads, RecallCountsEachTokenAsOftenAsItStands) {
  EXPECT_EQ(recall(kCopied, std::vector<int32_t>{5, 6, 7, 6}), 1);
  EXPECT_EQ(recall(kCopied, std::vector<int32_t>{6, 6, 6, 6}), 0.5);
  EXPECT_EQ(recall(kCopied, std::vector<int32_t>{}), 0);
}

TEST(RetrievalHeads, FindsTheFirstWindowThatHoldsTheNeedle) {
  const std::vector<int32_t> needle{5, 6, 7, 6};
  EXPECT_EQ(find_needle(kCopied.tokens, needle), (std::pair<int64_t, int64_t>{1, 5}));  // three distinct tokens lie in it already
  EXPECT_EQ(find_needle(needle, needle), (std::pair<int64_t, int64_t>{0, 4}));
  EXPECT_EQ(find_needle(std::vector<int32_t>{5, 6, 5, 6}, needle), (std::pair<int64_t, int64_t>{-1, -1}));
  EXPECT_EQ(find_needle(kCopied.tokens, {}), (std::pair<int64_t, int64_t>{-1, -1}));
  EXPECT_EQ(find_needle({}, needle), (std::pair<int64_t, int64_t>{-1, -1}));
}

// The heads' own weights, read another way, say which of them score.
TEST(RetrievalHeads, ScoresTheHeadsThatLookAtTheNeedle) {
  ModelInfo shape;
  shape.layers = 2, shape.h = 6, shape.g = 2, shape.d = shape.d_v = 16, shape.hidden = 32, shape.vocabulary = 5;
  const auto model = Model::random(shape, 48, Dtype::F32, 3);
  RetrievalPrompt p{{}, 0, 40};
  for (int32_t i = 0; i < 41; ++i) p.tokens.push_back((i * 7 + i / 5) % 5);
  RetrievalOptions options;
  options.limit = 30, options.backend = "reference", options.repeats = true, options.least_recall = -1;

  SessionOptions how;
  how.backend = options.backend;
  Session session(model, how);
  std::vector<std::vector<int32_t>> looked(12);
  session.tap([&](LayerView& at) {
    if (!at.decoding()) return;
    Observe each;
    each.rows = Observe::Rows::Last, each.heads = Observe::Heads::Each;
    const Ragged columns = at.observe(at.q, each);
    for (int64_t head = 0; head < 6; ++head) {
      const float* x = columns.values.as<float>();
      int64_t best = columns.begin(head / 3);
      for (int64_t j = best; j < columns.end(head / 3); ++j)
        if (x[j * 3 + head % 3] > x[best * 3 + head % 3]) best = j;
      looked[size_t(at.layer * 6 + head)].push_back(int32_t(best - columns.begin(head / 3)));
    }
  });
  session.prefill(std::span(p.tokens).first(40), Session::Logits::None);
  std::vector<int32_t> said;
  int32_t next = p.tokens.back();
  for (int i = 0; i < 30; ++i) {
    const Tensor logits = session.decode(next);
    next = int32_t(std::max_element(logits.as<float>(), logits.as<float>() + 5) - logits.as<float>());
    said.push_back(next);
  }
  const RetrievalScores scores = retrieval_heads(model, std::span(&p, 1), options);
  EXPECT_EQ(scores.counted, 1);
  double most = 0;
  for (int layer = 0; layer < 2; ++layer)
    for (int head = 0; head < 6; ++head) {
      EXPECT_EQ(scores.at(layer, head), copy_score(p, looked[size_t(layer * 6 + head)], said, true)) << layer << " " << head;
      most = std::max(most, scores.at(layer, head));
    }
  EXPECT_GT(most, 0);
  options.least_recall = 1;
  EXPECT_EQ(retrieval_heads(model, std::span(&p, 1), options).counted, 0);
  EXPECT_THROW(retrieval_heads(model, std::vector<RetrievalPrompt>{{{1, 2, 3}, 1, 5}}, options), Error);
}

}  // namespace
}  // namespace heed
