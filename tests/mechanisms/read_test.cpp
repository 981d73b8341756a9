#include "harness.h"

namespace heed::test {
namespace {

class Reads : public Mechanisms {};
HEED_ON_ALL_SETTINGS(Reads);

/// Keys that the last query reads, checked against the output's last row.
std::vector<std::vector<int32_t>> read(const Case& c, const std::string& spec, const std::string& backend) {
  const ApplyOutput out = c.run(spec, backend);
  const auto tokens = lists(out, "read");
  EXPECT_LT(c.error(out,
                    [&](int64_t head, int64_t i, int64_t j) {
                      const auto& list = tokens[size_t(head)];
                      return i + 1 < c.shape.n || std::binary_search(list.begin(), list.end(), int32_t(j));
                    }),
            kExact)
      << spec;
  return tokens;
}

TEST_P(Reads, IdentityReadsAll) {
  for (const Shape s : {shape(1, 200), shape(40, 40), shape(3, 129), shape(1, 1)}) {
    const Case c(s);
    for (const char* spec :
         {"quest(budget=1.0)", "quest(budget=100000)", "tidal-decode(budget=1.0)", "recycled-attention(stride=1)",
          "recycled-attention(budget=1.0)", "omnikv(budget=1.0)", "twilight(p=1)"})
      for (const auto& list : read(c, spec, backend())) EXPECT_EQ(list, all_of(s.m)) << spec;
  }
}

TEST_P(Reads, QuestReadsThePagesOfTheHighestBound) {
  for (const int64_t page : {16, 4, 1, 64}) {
    const Case c(shape(2, 203), 3);
    const int64_t budget = 70, pages = (203 + page - 1) / page, take = (budget + page - 1) / page;
    const auto tokens = read(c, "quest(budget=70,page=" + std::to_string(page) + ")", backend());
    for (int64_t head = 0; head < c.shape.h; ++head) {
      std::vector<double> bound(static_cast<size_t>(pages));
      for (int64_t p = 0; p < pages; ++p) {
        double most = -INFINITY;
        for (int64_t x = 0; x < c.shape.d; ++x) {
          const double q = c.q->at<float>(head, 1, x);
          double best = -INFINITY;
          for (int64_t j = p * page; j < std::min<int64_t>(203, (p + 1) * page); ++j)
            best = std::max(best, q * double(c.k->at<float>(head / c.group(), j, x)));
          bound[size_t(p)] += best;
        }
        for (int64_t j = p * page; j < std::min<int64_t>(203, (p + 1) * page); ++j)
          most = std::max(most, c.dot(head, 1, j));
        EXPECT_LE(most, bound[size_t(p)] + 1e-9);
      }
      bound.back() = INFINITY;
      std::vector<int32_t> expected;
      for (int32_t p : top(bound, take))
        for (int64_t j = p * page; j < std::min<int64_t>(203, (p + 1) * page); ++j) expected.push_back(int32_t(j));
      EXPECT_EQ(tokens[size_t(head)], expected) << "page " << page;
    }
  }
}

TEST_P(Reads, TidalDecodeReadsTheHighestLogits) {
  const Case c(shape(1, 150), 4);
  const auto tokens = read(c, "tidal-decode(budget=33)", backend());
  for (int64_t head = 0; head < c.shape.h; ++head) {
    std::vector<double> logits;
    for (int64_t j = 0; j < 150; ++j) logits.push_back(c.dot(head, 0, j));
    logits.back() = INFINITY;
    EXPECT_EQ(tokens[size_t(head)], top(logits, 33));
  }
}

TEST_P(Reads, RecycledAttentionReadsWhatTheLastRowPaid) {
  for (const int64_t kernel : {1, 5}) {
    const Case c(shape(3, 150), 6);
    const auto tokens = read(c, "recycled-attention(budget=33,kernel=" + std::to_string(kernel) + ")", backend());
    for (int64_t head = 0; head < c.shape.h; ++head) {
      std::vector<double> most(150, 0.0), scores;
      for (int64_t member = head / c.group() * c.group(); member < (head / c.group() + 1) * c.group(); ++member) {
        const auto p = c.causal(member, 2);
        for (size_t j = 0; j < 150; ++j) most[j] = std::max(most[j], p[j]);
      }
      for (int64_t j = 0; j < 150; ++j)
        scores.push_back(*std::max_element(most.begin() + std::max<int64_t>(0, j - kernel / 2),
                                           most.begin() + std::min<int64_t>(150, j + kernel / 2 + 1)));
      EXPECT_EQ(tokens[size_t(head)], top(scores, 33));
    }
  }
}

TEST_P(Reads, OmniKvReadsOneSetInAllHeads) {
  const Case c(shape(1, 150), 6);
  const auto tokens = read(c, "omnikv(budget=33)", backend());
  std::vector<double> most(150, 0.0);
  for (int64_t head = 0; head < c.shape.h; ++head) {
    const auto p = c.causal(head, 0);
    for (size_t j = 0; j < 150; ++j) most[j] = std::max(most[j], p[j]);
  }
  most.back() = INFINITY;  // the new token, besides the 33
  for (const auto& list : tokens) EXPECT_EQ(list, top(most, 34));
}

TEST_P(Reads, TwilightReadsTheSmallestSetOfAMass) {
  const Case c(shape(1, 150), 9, 2.5);
  size_t before = 0;
  for (const double p : {0.3, 0.8, 0.97}) {
    size_t read_now = 0;
    const auto tokens = read(c, "twilight(p=" + std::to_string(p) + ")", backend());
    for (int64_t head = 0; head < c.shape.h; ++head) {
      const auto weights = c.causal(head, 0);
      double held = 0, least = 1;
      for (int32_t j : tokens[size_t(head)]) held += weights[size_t(j)], least = std::min(least, weights[size_t(j)]);
      EXPECT_EQ(tokens[size_t(head)], top(weights, int64_t(tokens[size_t(head)].size())));
      EXPECT_GE(held, p - 1e-5);
      EXPECT_LT(held - least, p + 1e-5) << "one less would have been enough";
      read_now += tokens[size_t(head)].size();
    }
    EXPECT_GT(read_now, before);
    before = read_now;
  }
}

TEST_P(Reads, MoreBudgetReadsMore) {
  const Case c(shape(1, 180), 5);
  for (const char* name : {"quest", "tidal-decode", "recycled-attention", "omnikv"}) {
    std::vector<std::vector<int32_t>> before(static_cast<size_t>(c.shape.h));
    for (int budget : {16, 48, 96, 180}) {
      const auto now = read(c, std::string(name) + "(budget=" + std::to_string(budget) + ")", backend());
      for (size_t head = 0; head < now.size(); ++head)
        EXPECT_TRUE(std::includes(now[head].begin(), now[head].end(), before[head].begin(), before[head].end())) << name;
      before = now;
    }
  }
}

}  // namespace
}  // namespace heed::test
