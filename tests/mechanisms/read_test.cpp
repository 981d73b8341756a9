#include <numbers>

#include "keep_case.h"

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
    for (const char* spec : {"quest(budget=1.0)",
                             "quest(budget=100000)",
                             "tidal-decode(budget=1.0)",
                             "recycled-attention(stride=1)",
                             "recycled-attention(budget=1.0)",
                             "omnikv(budget=1.0)",
                             "twilight(p=1)",
                             "kinetics(budget=1.0)",
                             "shadowkv(budget=1.0)",
                             "shadowkv(latest=1000)",
                             "double-sparsity(budget=1.0)",
                             "hylra(budget=1.0)",
                             "lychee-decode(budget=1.0)",
                             "lychee-decode(retrieval=0-)",
                             "clusterkv(budget=1.0)",
                             "clusterkv(tokens=1000000,budget=1000)",
                             "rocketkv(budget=1.0)",
                             "pqcache(topk=1)",
                             "pqcache(recent=1)",
                             "long-heads(chunk=7,chunks=100)",
                             "token-select(budget=1.0)",
                             "token-select(local=1000)",
                             "infllm(budget=1.0,block=7)",
                             "infllm(local=100,block=32)",
                             "loki(budget=1.0)",
                             "retrieval-attention(topk=1000)",
                             "retrieval-attention(sinks=1000)",
                             "retrieval-attention(recent=1000)",
                             "magicpig(local=1000)",
                             "magicpig(sinks=1000)",
                             "squeezed-attention(threshold=0)",
                             "squeezed-attention(recent=1000)",
                             "triforce(budget=1.0)",
                             "triforce(chunk=1000)",
                             "lserve(budget=1.0)",
                             "lserve(streaming=0-,local=1000,recent=1000)",
                             "ltri_llm(budget=1.0)",
                             "ltri_llm(budget=1000)",
                             "dca(chunk=9,local=3)",
                             "self-extend(group=3,window=5)"})
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

TEST_P(Reads, LServesStreamingHeadsReadSinksAndTheLatest) {
  for (const Shape s : {shape(90, 90), shape(33, 101)}) {
    const Case c(s, 5);
    const ApplyOutput out = c.run("lserve(budget=24,page=8,part=4,streaming=0,sinks=5,local=11,recent=9)", backend());
    const auto tokens = lists(out, "read");
    EXPECT_LT(c.error(out,
                      [&](int64_t head, int64_t i, int64_t j) {
                        if (i == s.n - 1)
                          return std::binary_search(tokens[size_t(head)].begin(), tokens[size_t(head)].end(), int32_t(j));
                        return head / c.group() > 0 || j < 5 || c.first() + i - j < 11;
                      }),
              kExact);
    // Whole pages that hold one of those.
    for (int64_t head = 0; head < c.group(); ++head)
      for (int32_t j = 0; j < s.m; ++j)
        EXPECT_EQ(std::binary_search(tokens[size_t(head)].begin(), tokens[size_t(head)].end(), j),
                  j / 8 * 8 < 5 || (j / 8 + 1) * 8 > s.m - 9);
    for (int64_t head = c.group(); head < s.h; ++head) EXPECT_LE(tokens[size_t(head)].size(), 24u);
  }
}

TEST(ReadErrors, NameWhatIsWrong) {
  const Case c({6, 2, 16, 16, 16, 16});
  for (const auto& [spec, words] : {std::pair{"lserve(page=24)", "page=24"},
                                    {"lserve(page=8,part=3)", "part=3 does not divide page=8"},
                                    {"self-extend(heads=0)", "heads=0"},
                                    {"ltri_llm(budget=271)", "budget=271"},
                                    {"ltri_llm(longest=1)", "longest"},
                                    {"dca(chunk=9,local=5)", "local=5 is more than half of chunk=9"},
                                    {"dca(heads=0)", "heads=0"}}) {
    const auto out = heed::apply(std::string(spec), c.input("reference"));
    ASSERT_FALSE(out.has_value()) << spec;
    EXPECT_NE(out.error().text().find(words), std::string::npos) << out.error().text();
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

/// Blocks as keys.
std::vector<int32_t> keys_of(const std::vector<int32_t>& blocks, int64_t block, int64_t m) {
  std::vector<int32_t> out;
  for (int32_t b : blocks)
    for (int64_t j = b * block; j < std::min<int64_t>(m, (b + 1) * block); ++j) out.push_back(int32_t(j));
  return out;
}

TEST_P(Reads, KineticsReadsBlocksOfTheHighestMeanLogit) {
  for (const auto& [m, block, budget, sinks, local] :
       {std::tuple{203, 16, 100, 4, 20}, {150, 8, 70, 9, 1}, {97, 1, 30, 0, 5}, {60, 16, 20, 4, 40}}) {
    const Case c(shape(2, m), 7);
    const int64_t blocks = (m + block - 1) / block, take = (budget + block - 1) / block;
    const auto tokens = read(c,
                             "kinetics(budget=" + std::to_string(budget) + ",block=" + std::to_string(block) +
                                 ",sinks=" + std::to_string(sinks) + ",local=" + std::to_string(local) + ")",
                             backend());
    for (int64_t head = 0; head < c.shape.h; ++head) {
      std::vector<double> score(static_cast<size_t>(blocks), 0.0);
      int64_t forced = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t end = std::min<int64_t>(m, (b + 1) * block);
        for (int64_t j = b * block; j < end; ++j)
          for (int64_t member = head / c.group() * c.group(); member < (head / c.group() + 1) * c.group(); ++member)
            score[size_t(b)] += c.dot(member, 1, j) / double(end - b * block);
        const bool stays = b * block < sinks || (b + 1) * block > m - local;
        if (stays) score[size_t(b)] = INFINITY, ++forced;
      }
      EXPECT_EQ(tokens[size_t(head)], keys_of(top(score, std::max(take, forced)), block, m)) << "block " << block;
    }
  }
}

TEST_P(Reads, ShadowKvReadsLandmarksAndOutliers) {
  for (const auto& [m, budget, outliers, latest] :
       {std::tuple{203, 40, 3, 4}, {150, 16, 0, 2}, {61, 8, 5, 4}, {170, 25, 2, 0}}) {
    const int64_t chunk = 8;
    const Case c(shape(2, m), 8, 2.0);
    const auto tokens = read(c,
                             "shadowkv(budget=" + std::to_string(budget) + ",outliers=" + std::to_string(outliers) +
                                 ",latest=" + std::to_string(latest) + ")",
                             backend());
    const int64_t blocks = (m + chunk - 1) / chunk;
    auto landmark = [&](int64_t kv, int64_t b, int64_t e, int64_t end) {
      double sum = 0;
      for (int64_t j = b * chunk; j < end; ++j) sum += double(c.k->at<float>(kv, j, e));
      return sum / double(end - b * chunk);
    };
    for (int64_t kv = 0; kv < c.shape.g; ++kv) {
      // Of a prompt of all m entries; the query counts as generated when it reads.
      const int64_t prompt_whole = std::max<int64_t>(0, m / chunk - latest),
                    whole = std::max<int64_t>(0, (m - 1) / chunk - latest);
      std::vector<double> unlike;
      for (int64_t b = 0; b < prompt_whole; ++b) {
        double least = 2;
        for (int64_t j = b * chunk; j < (b + 1) * chunk; ++j) {
          double kl = 0, kk = 0, ll = 0;
          for (int64_t e = 0; e < c.shape.d; ++e) {
            const double k = c.k->at<float>(kv, j, e), l = landmark(kv, b, e, (b + 1) * chunk);
            kl += k * l, kk += k * k, ll += l * l;
          }
          least = std::min(least, kl / std::sqrt(kk * ll));
        }
        unlike.push_back(-least);
      }
      const auto worst = top(unlike, outliers);
      auto stays = [&](int64_t b) { return b >= whole || std::binary_search(worst.begin(), worst.end(), int32_t(b)); };
      std::vector<double> paid(static_cast<size_t>(blocks), -INFINITY);
      for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head) {
        double most = -INFINITY, total = 0;
        std::vector<double> logit(static_cast<size_t>(blocks), -INFINITY);
        for (int64_t b = 0; b < blocks; ++b) {
          if (stays(b)) continue;
          double dot = 0;
          for (int64_t e = 0; e < c.shape.d; ++e)
            dot += double(c.q->at<float>(head, 1, e)) * landmark(kv, b, e, (b + 1) * chunk);
          most = std::max(most, logit[size_t(b)] = dot / std::sqrt(double(c.shape.d)));
        }
        for (double x : logit) total += std::exp(x - most);
        for (int64_t b = 0; b < blocks; ++b)
          if (!stays(b)) paid[size_t(b)] = std::max(paid[size_t(b)], std::exp(logit[size_t(b)] - most) / total);
      }
      std::set<int32_t> chunks;
      for (int32_t b : top(paid, (budget + chunk - 1) / chunk))
        if (paid[size_t(b)] > -INFINITY) chunks.insert(b);
      for (int64_t b = 0; b < blocks; ++b)
        if (stays(b)) chunks.insert(int32_t(b));
      const auto expected = keys_of({chunks.begin(), chunks.end()}, chunk, m);
      for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head)
        EXPECT_EQ(tokens[size_t(head)], expected) << m;
    }
  }
}

TEST_P(Reads, DoubleSparsityRanksByItsChannels) {
  for (const auto& [n, m, factor] : {std::tuple{40, 150, 4}, {90, 90, 16}, {1, 70, 2}, {50, 121, 1}}) {
    const Case c(shape(n, m), 9);
    const auto tokens = read(c, "double-sparsity(budget=33,factor=" + std::to_string(factor) + ")", backend());
    for (int64_t head = 0; head < c.shape.h; ++head) {
      std::vector<double> importance(size_t(c.shape.d), 0.0), score(static_cast<size_t>(m), 0.0);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t e = 0; e < c.shape.d; ++e)
          importance[size_t(e)] += std::abs(double(c.q->at<float>(head, i, e)) *
                                            double(c.k->at<float>(head / c.group(), c.first() + i, e)));
      for (int32_t e : top(importance, c.shape.d / factor))
        for (int64_t j = 0; j < m; ++j)
          score[size_t(j)] += double(c.q->at<float>(head, n - 1, e)) * double(c.k->at<float>(head / c.group(), j, e));
      EXPECT_EQ(tokens[size_t(head)], top(score, 33)) << "factor " << factor;
    }
  }
}

TEST_P(Reads, HyLraAndLycheeDecodeReadOneSetAGroup) {
  const Case c(shape(1, 150), 10);
  const auto by_weight = read(c, "hylra(budget=33)", backend()), by_logit = read(c, "lychee-decode(budget=33)", backend());
  for (int64_t kv = 0; kv < c.shape.g; ++kv) {
    std::vector<double> weight(150, 0.0), logit(150, 0.0);
    for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head) {
      const auto p = c.causal(head, 0);
      for (int64_t j = 0; j < 150; ++j) weight[size_t(j)] += p[size_t(j)], logit[size_t(j)] += c.dot(head, 0, j);
    }
    weight.back() = logit.back() = INFINITY;
    for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head) {
      EXPECT_EQ(by_weight[size_t(head)], top(weight, 33));
      EXPECT_EQ(by_logit[size_t(head)], top(logit, 33));
    }
  }
}

/// Lloyd's k-means of channels e0 … e1 − 1 of a KV head's keys, begun with keys spread evenly: centroids, and each key's.
std::pair<Rows, std::vector<int64_t>> k_means(const Case& c, int64_t kv, int64_t e0, int64_t e1, int64_t count,
                                              int rounds, bool cosine) {
  const int64_t m = c.shape.m;
  auto key = [&](int64_t j, int64_t e) { return double(c.k->at<float>(kv, j, e0 + e)); };
  Rows centroids;
  for (int64_t x = 0; x < count; ++x) {
    centroids.emplace_back();
    for (int64_t e = 0; e < e1 - e0; ++e) centroids.back().push_back(key(x * m / count, e));
  }
  std::vector<int64_t> label(static_cast<size_t>(m));
  for (int round = 0; round <= rounds; ++round) {
    for (int64_t j = 0; j < m; ++j) {
      double best = -INFINITY;
      for (int64_t x = 0; x < count; ++x) {
        double dot = 0, norm = 0, apart = 0;
        for (int64_t e = 0; e < e1 - e0; ++e) {
          const double a = key(j, e), b = centroids[size_t(x)][size_t(e)];
          dot += a * b, norm += b * b, apart += (a - b) * (a - b);
        }
        const double alike = cosine ? dot / std::sqrt(norm) : -apart;
        if (alike > best) best = alike, label[size_t(j)] = x;
      }
    }
    if (round == rounds) break;
    for (int64_t x = 0; x < count; ++x) {
      std::vector<double> sum(size_t(e1 - e0), 0.0);
      int64_t size = 0;
      for (int64_t j = 0; j < m; ++j) {
        if (label[size_t(j)] != x) continue;
        ++size;
        for (int64_t e = 0; e < e1 - e0; ++e) sum[size_t(e)] += key(j, e);
      }
      for (int64_t e = 0; e < e1 - e0 && size > 0; ++e) centroids[size_t(x)][size_t(e)] = sum[size_t(e)] / double(size);
    }
  }
  return {centroids, label};
}

// Without rounds the centroids are rows spread evenly; with one they are the means of those that joined them.
TEST_P(Reads, ClusterKvReadsClustersInOrderOfTheirCentroids) {
  for (const auto& [m, tokens, rounds, budget, sinks] :
       {std::tuple{150, 10, 0, 40, 3}, {150, 10, 1, 40, 0}, {97, 7, 4, 33, 16}, {60, 100, 2, 20, 4}}) {
    const Case c(shape(2, m), 13);
    const auto tokens_read = read(c,
                                  "clusterkv(budget=" + std::to_string(budget) + ",tokens=" + std::to_string(tokens) +
                                      ",rounds=" + std::to_string(rounds) + ",sinks=" + std::to_string(sinks) + ")",
                                  backend());
    const int64_t count = std::max(1, m / tokens), d = c.shape.d;
    for (int64_t kv = 0; kv < c.shape.g; ++kv) {
      const auto [centroids, label] = k_means(c, kv, 0, d, count, rounds, true);
      std::vector<double> score(static_cast<size_t>(m), 0.0);
      for (int64_t j = 0; j < m; ++j)
        for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head)
          for (int64_t e = 0; e < d; ++e)
            score[size_t(j)] += double(c.q->at<float>(head, 1, e)) * centroids[size_t(label[size_t(j)])][size_t(e)];
      std::fill_n(score.begin(), sinks, INFINITY);
      // One more than the budget: the query counts as generated.
      for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head)
        EXPECT_EQ(tokens_read[size_t(head)], top(score, budget + 1)) << "head " << head << " rounds " << rounds;
    }
  }
}

TEST_P(Reads, LtriReadsTheLatestWhereAShareHasNoRoomForMore) {
  const Case c(shape(9, 150), 17);
  for (const auto& [sinks, local, first] : {std::tuple{4, 26, 4}, {4, 28, 2}, {9, 100, 0}}) {
    std::vector<int32_t> expected(30);
    std::iota(expected.begin(), expected.begin() + first, 0);
    std::iota(expected.begin() + first, expected.end(), 120 + first);
    const std::string spec = "ltri_llm(budget=20%,sinks=" + std::to_string(sinks) + ",local=" + std::to_string(local) +
                             ")";
    for (const auto& tokens : read(c, spec, backend())) EXPECT_EQ(tokens, expected) << spec;
  }
}

// Spans cut out of the weights that queries pay in the same stretch, worth the mean logit of their keys.
TEST_P(Reads, LtriReadsTheSpansOfTheLargestMeanLogit) {
  for (const auto& [n, m, stretch, longest, baseline, budget, sinks, local] : {std::tuple{150, 150, 32, 8, 0.02, 50, 4, 10},
                                                                               {97, 97, 20, 6, 0.03, 30, 0, 1},
                                                                               {40, 90, 16, 16, 0.01, 33, 3, 5},
                                                                               {1, 60, 8, 4, 0.02, 20, 2, 2},
                                                                               {33, 33, 64, 5, 0.05, 9, 2, 3}}) {
    const Case c(shape(n, m), 17, 2.0);
    const std::string spec = "ltri_llm(stretch=" + std::to_string(stretch) + ",longest=" + std::to_string(longest) +
                             ",baseline=" + std::to_string(baseline) + ",budget=" + std::to_string(budget) +
                             ",sinks=" + std::to_string(sinks) + ",local=" + std::to_string(local) + ")";
    const auto tokens = read(c, spec, backend());
    for (int64_t kv = 0; kv < c.shape.g; ++kv) {
      Rows paid(static_cast<size_t>(n), std::vector<double>(static_cast<size_t>(m), 0.0));
      std::vector<double> logit(static_cast<size_t>(m), 0.0), score(static_cast<size_t>(m), 0.0);
      for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head) {
        for (int64_t i = 0; i < n; ++i) {
          const auto p = c.causal(head, i);
          for (int64_t j = 0; j < m; ++j) paid[size_t(i)][size_t(j)] += p[size_t(j)] / double(c.group());
        }
        for (int64_t j = 0; j < m; ++j) logit[size_t(j)] += c.dot(head, n - 1, j);
      }
      // Keys that no query of the prompt came with stand in spans of `longest`.
      std::vector<int> begins(static_cast<size_t>(m), 0);
      for (int64_t j = 0; j < m - n; ++j) begins[size_t(j)] = j % longest == 0;
      for (int64_t from = 0; from < n; from += stretch) {
        const int64_t there = std::min<int64_t>(stretch, n - from), old = m - n + from;
        std::vector<int> taken(static_cast<size_t>(there), 0);
        begins[size_t(old)] = 1;
        for (;;) {
          double best = 0;
          int64_t a = 0, b = 0;
          for (int64_t x = 0; x < there; ++x) {
            double sum = 0;
            for (int64_t y = x; y < std::min<int64_t>(there, x + longest) && !taken[size_t(y)]; ++y) {
              for (int64_t j = x; j <= y; ++j) sum += paid[size_t(from + y)][size_t(old + j)] - baseline;
              if (y > x && sum > best) best = sum, a = x, b = y + 1;
            }
          }
          if (best <= 0) break;
          std::fill(taken.begin() + a, taken.begin() + b, 1);
          begins[size_t(old + a)] = 1;
          if (b < there) begins[size_t(old + b)] = 1;
        }
      }
      for (int64_t a = 0; a < m;) {
        int64_t b = a + 1;
        while (b < m && !begins[size_t(b)]) ++b;
        const double sum = std::accumulate(logit.begin() + a, logit.begin() + b, 0.0);
        std::fill(score.begin() + a, score.begin() + b, sum / double(b - a));
        a = b;
      }
      std::fill_n(score.begin(), sinks, INFINITY);
      std::fill(score.end() - local, score.end(), INFINITY);
      for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head)
        EXPECT_EQ(tokens[size_t(head)], top(score, budget)) << spec << " head " << head;
    }
  }
}

TEST_P(Reads, PqCacheReadsByCodesOfHalves) {
  for (const auto& [m, centroids, rounds, topk, recent, sinks] :
       {std::tuple{150, 8, 0, 0.2, 0.1, 3}, {150, 16, 2, 0.1, 0.05, 32}, {97, 5, 4, 0.3, 0.0, 0}, {60, 64, 1, 0.25, 0.2, 4}}) {
    const Case c(shape(2, m), 14, 2.0);
    const auto tokens = read(c,
                             "pqcache(topk=" + std::to_string(topk) + ",recent=" + std::to_string(recent) +
                                 ",centroids=" + std::to_string(centroids) + ",rounds=" + std::to_string(rounds) +
                                 ",sinks=" + std::to_string(sinks) + ")",
                             backend());
    const int64_t d = c.shape.d, latest = int64_t(recent * (m - sinks));
    for (int64_t kv = 0; kv < c.shape.g; ++kv) {
      std::vector<double> score(static_cast<size_t>(m), 0.0);
      const auto low = k_means(c, kv, 0, d / 2, centroids, rounds, false),
                 high = k_means(c, kv, d / 2, d, centroids, rounds, false);
      for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head) {
        std::vector<double> logit;
        for (int64_t j = sinks; j < m - latest; ++j) {
          double dot = 0;
          for (int64_t e = 0; e < d; ++e) {
            const auto& [book, code] = e < d / 2 ? low : high;
            dot += double(c.q->at<float>(head, 1, e)) * book[size_t(code[size_t(j)])][size_t(e % (d / 2))];
          }
          logit.push_back(dot / std::sqrt(double(d)));
        }
        double total = 0;
        for (double x : logit) total += std::exp(x);
        for (size_t j = 0; j < logit.size(); ++j) score[size_t(sinks) + j] += std::exp(logit[j]) / total;
      }
      for (int64_t j = 0; j < m; ++j)
        if (j < sinks || j >= m - latest) score[size_t(j)] = INFINITY;
      // The query counts as generated: the window is at least one.
      const int64_t count = sinks + std::max<int64_t>(latest, 1) + int64_t(std::ceil(topk * (m - sinks) - 1e-9));
      for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head)
        EXPECT_EQ(tokens[size_t(head)], top(score, count)) << m;
    }
  }
}

/// Eigenvectors of a symmetric matrix as rows, by falling eigenvalue (Jacobi's rotations).
Rows eigenvectors(Rows a) {
  const size_t d = a.size();
  Rows v(d, std::vector<double>(d, 0.0));
  for (size_t i = 0; i < d; ++i) v[i][i] = 1;
  for (int sweep = 0; sweep < 30; ++sweep)
    for (size_t p = 0; p < d; ++p)
      for (size_t q = p + 1; q < d; ++q) {
        if (std::abs(a[p][q]) < 1e-300) continue;
        const double angle = 0.5 * std::atan2(2 * a[p][q], a[q][q] - a[p][p]), cos = std::cos(angle), sin = std::sin(angle);
        const auto turn = [&](double& x, double& y) {
          const double was = x;
          x = cos * was - sin * y, y = sin * was + cos * y;
        };
        for (size_t i = 0; i < d; ++i) turn(a[i][p], a[i][q]);
        for (size_t i = 0; i < d; ++i) turn(a[p][i], a[q][i]);
        for (size_t i = 0; i < d; ++i) turn(v[p][i], v[q][i]);
      }
  std::vector<double> values;
  for (size_t i = 0; i < d; ++i) values.push_back(a[i][i]);
  std::vector<int32_t> order = all_of(int64_t(d));
  std::sort(order.begin(), order.end(), [&](int32_t x, int32_t y) { return values[size_t(x)] > values[size_t(y)]; });
  Rows out;
  for (int32_t i : order) out.push_back(v[size_t(i)]);
  return out;
}

/// Keys that lie near a few directions which are no channels, with a mean that is none of them; queries likewise.
Case along_directions(Shape s, uint64_t seed) {
  Case c(s, seed);
  Random random(seed + 1);
  for (int64_t kv = 0; kv < s.g; ++kv) {
    Rows u(size_t(s.d), std::vector<double>(size_t(s.d)));
    for (auto& row : u)
      for (double& x : row) x = random.normal() / std::sqrt(double(s.d));
    const auto spread = [&](Buffer& x, int64_t at, int64_t rows, double mean) {
      for (int64_t i = 0; i < rows; ++i) {
        std::vector<double> y(size_t(s.d), mean);
        for (int64_t e = 0; e < s.d; ++e)
          for (int64_t b = 0; b < s.d; ++b)
            y[size_t(b)] += 4 * std::pow(0.6, double(e)) * double(x->at<float>(at, i, e)) * u[size_t(e)][size_t(b)];
        for (int64_t e = 0; e < s.d; ++e) x->at<float>(at, i, e) = float(y[size_t(e)]);
      }
    };
    spread(c.k, kv, s.m, 0.7);
    for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head) spread(c.q, head, s.n, 0);
  }
  return c;
}

TEST_P(Reads, LokiRanksAlongMainDirections) {
  for (const auto& [n, m, rank, budget, centre] : {std::tuple{40, 150, 0.25, 33, true},
                                                   {90, 90, 0.5, 20, true},
                                                   {1, 70, 0.13, 9, true},
                                                   {2, 203, 0.0, 50, true},
                                                   {3, 60, 1.0, 12, true},
                                                   {2, 150, 0.25, 33, false},
                                                   {2, 80, 0.13, 12, false}}) {
    const Case c = along_directions(shape(n, m), 21);
    const auto tokens = read(c,
                             "loki(rounds=60,budget=" + std::to_string(budget) + ",rank=" + std::to_string(rank) +
                                 (centre ? ")" : ",centre=false)"),
                             backend());
    const int64_t d = c.shape.d, r = std::max<int64_t>(1, int64_t(rank * double(d)));
    int64_t missed = 0, missed_by_channels = 0;  // of the entries that rank highest exactly
    for (int64_t kv = 0; kv < c.shape.g; ++kv) {
      std::vector<double> mean(size_t(d), 0.0);
      for (int64_t j = 0; j < m; ++j)
        for (int64_t e = 0; e < d && centre; ++e) mean[size_t(e)] += double(c.k->at<float>(kv, j, e)) / double(m);
      Rows covariance(size_t(d), std::vector<double>(size_t(d), 0.0));
      for (int64_t j = 0; j < m; ++j)
        for (int64_t a = 0; a < d; ++a)
          for (int64_t b = 0; b < d; ++b)
            covariance[size_t(a)][size_t(b)] += (double(c.k->at<float>(kv, j, a)) - mean[size_t(a)]) *
                                                (double(c.k->at<float>(kv, j, b)) - mean[size_t(b)]);
      const Rows directions = eigenvectors(covariance);
      const auto along = [&](const Buffer& x, int64_t at, int64_t row, int64_t which) {
        double sum = 0;
        for (int64_t e = 0; e < d; ++e) sum += double(x->at<float>(at, row, e)) * directions[size_t(which)][size_t(e)];
        return sum;
      };
      for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head) {
        std::vector<double> score(static_cast<size_t>(m), 0.0), exact;
        for (int64_t j = 0; j < m; ++j) {
          for (int64_t which = 0; which < r; ++which)
            score[size_t(j)] += along(c.q, head, n - 1, which) * along(c.k, kv, j, which);
          exact.push_back(c.dot(head, n - 1, j));
        }
        expect_top(tokens[size_t(head)], score, budget, "loki, rank " + std::to_string(r));
        const auto wanted = top(exact, budget);
        if (r == d) { EXPECT_EQ(tokens[size_t(head)], wanted); }
        std::vector<double> plain(static_cast<size_t>(m), 0.0);
        for (int64_t j = 0; j < m; ++j)
          for (int64_t e = 0; e < r; ++e)
            plain[size_t(j)] += double(c.q->at<float>(head, n - 1, e)) * double(c.k->at<float>(kv, j, e));
        const auto shared = [&](const std::vector<int32_t>& x) {
          std::vector<int32_t> both;
          std::set_intersection(x.begin(), x.end(), wanted.begin(), wanted.end(), std::back_inserter(both));
          return int64_t(both.size());
        };
        missed += budget - shared(tokens[size_t(head)]), missed_by_channels += budget - shared(top(plain, budget));
      }
    }
    if (r <= 2) { EXPECT_GT(missed, 0); }
    if (r < d) { EXPECT_LT(missed, missed_by_channels) << "rank " << r; }
  }
}

TEST_P(Reads, RetrievalAttentionReadsEndsAndTheBestOfTheRest) {
  for (const auto& [m, topk, sinks, recent] :
       {std::tuple{150, 20, 4, 10}, {203, 7, 0, 0}, {61, 5, 30, 31}, {90, 0, 3, 5}, {40, 9, 100, 2}}) {
    const Case c(shape(2, m), 22);
    const auto tokens = read(c,
                             "retrieval-attention(topk=" + std::to_string(topk) + ",sinks=" + std::to_string(sinks) +
                                 ",recent=" + std::to_string(recent) + ")",
                             backend());
    for (int64_t head = 0; head < c.shape.h; ++head) {
      std::vector<double> rest;
      std::set<int32_t> expected;
      for (int64_t j = 0; j < m; ++j) {
        const bool end = j < sinks || j >= m - recent - 1;  // the query counts as generated
        if (end) expected.insert(int32_t(j));
        rest.push_back(end ? -INFINITY : c.dot(head, 1, j));
      }
      for (int32_t j : top(rest, std::min<int64_t>(topk, m - int64_t(expected.size())))) expected.insert(j);
      EXPECT_EQ(tokens[size_t(head)], sorted(expected)) << m;
    }
  }
}

/// What MagicPIG's tables say of the last query and each key: in how many of them they meet, and with which
/// probability they meet in two or more; infinity for keys that are read anyway.
struct Met {
  std::vector<double> tables, chance;
};
Met met(const Case& c, int64_t head, int64_t tables, int64_t bits, int64_t sinks, int64_t local, uint64_t seed) {
  const int64_t m = c.shape.m, d = c.shape.d, kv = head / c.group();
  Random random(seed);
  Rows planes(size_t(tables * bits), std::vector<double>(size_t(d)));
  for (auto& plane : planes)
    for (double& x : plane) x = double(float(random.normal()));
  std::vector<double> mean(size_t(d), 0.0), q(size_t(d), 0.0);
  for (int64_t j = sinks; j < m - local; ++j)
    for (int64_t e = 0; e < d; ++e) mean[size_t(e)] += double(c.k->at<float>(kv, j, e)) / double(m - local - sinks);
  for (int64_t e = 0; e < d; ++e) q[size_t(e)] = double(c.q->at<float>(head, c.shape.n - 1, e));
  Met out;
  for (int64_t j = 0; j < m; ++j) {
    std::vector<double> k(static_cast<size_t>(d));
    for (int64_t e = 0; e < d; ++e) k[size_t(e)] = double(c.k->at<float>(kv, j, e)) - mean[size_t(e)];
    const auto dot = [&](const std::vector<double>& a, const std::vector<double>& b) {
      return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
    };
    int64_t count = 0;
    for (int64_t t = 0; t < tables; ++t) {
      bool same = true;
      for (int64_t b = 0; b < bits; ++b)
        same &= (dot(planes[size_t(t * bits + b)], q) > 0) == (dot(planes[size_t(t * bits + b)], k) > 0);
      count += same;
    }
    const double angle = std::acos(std::clamp(dot(q, k) / std::sqrt(dot(q, q) * dot(k, k)), -1.0, 1.0)),
                 p = std::pow(1 - angle / std::numbers::pi, double(bits));
    out.tables.push_back(j < sinks || j >= m - local ? INFINITY : double(count));
    out.chance.push_back(1 - std::pow(1 - p, double(tables)) - double(tables) * p * std::pow(1 - p, double(tables - 1)));
  }
  return out;
}

TEST_P(Reads, MagicPigWeighsWhatItsTablesMeet) {
  for (const auto& [n, m, tables, bits, sinks, local, seed] :
       {std::tuple{2, 150, 20, 4, 4, 10, 0}, {40, 90, 60, 6, 0, 0, 3}, {1, 61, 2, 1, 3, 5, 1}, {3, 203, 150, 10, 4, 64, 2}}) {
    const Case c(shape(n, m), 23);
    const ApplyOutput out = c.run("magicpig(tables=" + std::to_string(tables) + ",bits=" + std::to_string(bits) +
                                      ",sinks=" + std::to_string(sinks) + ",local=" + std::to_string(local) +
                                      ",seed=" + std::to_string(seed) + ")",
                                  backend());
    const auto tokens = lists(out, "read");
    for (int64_t head = 0; head < c.shape.h; ++head) {
      const Met found = met(c, head, tables, bits, sinks, local, uint64_t(seed));
      std::vector<int32_t> expected;
      std::vector<double> weight(size_t(m), 0.0);
      double total = 0;
      for (int64_t j = 0; j < m; ++j) {
        if (found.tables[size_t(j)] < 2) continue;
        expected.push_back(int32_t(j));
        const double share = found.tables[size_t(j)] == INFINITY ? 1 : found.chance[size_t(j)] + 1e-4;
        total += weight[size_t(j)] = std::exp(c.dot(head, n - 1, j) / std::sqrt(double(c.shape.d))) / share;
      }
      EXPECT_EQ(tokens[size_t(head)], expected);
      for (double& x : weight) x /= std::max(total, 1e-300);
      const auto row = c.output(head, weight);
      for (int64_t e = 0; e < c.shape.d_v; ++e)
        EXPECT_NEAR(out.find("out")->view().at<float>(head, n - 1, e), row[size_t(e)], kExact) << "head " << head;
      EXPECT_NEAR(out.find("lse")->view().at<float>(head, n - 1), expected.empty() ? -INFINITY : std::log(total), 1e-4);
    }
    for (int64_t head = 0; head < c.shape.h; ++head)
      for (int64_t i = 0; i + 1 < n; ++i) {  // the prompt is dense
        const auto row = c.output(head, c.causal(head, i));
        for (int64_t e = 0; e < c.shape.d_v; ++e)
          EXPECT_NEAR(out.find("out")->view().at<float>(head, i, e), row[size_t(e)], kExact);
      }
  }
}

// A key is met as often as its weight says, and with so many tables that all are met the estimate is the thing
// itself.
TEST_P(Reads, MagicPigsWeightIsHowOftenAKeyIsMet) {
  const Case c(shape(1, 40), 24);
  constexpr int64_t kSeeds = 60;
  std::vector<double> often(40, 0.0);
  for (int64_t seed = 0; seed < kSeeds; ++seed) {
    const std::string spec = "magicpig(tables=12,bits=2,sinks=0,local=0,seed=" + std::to_string(seed) + ")";
    const auto tokens = lists(c.run(spec, backend()), "read");
    for (int32_t j : tokens[0]) often[size_t(j)] += 1.0 / double(kSeeds);
  }
  const auto chance = met(c, 0, 12, 2, 0, 0, 0).chance;
  double apart = 0, low = 1, high = 0;
  for (size_t j = 0; j < 40; ++j) {
    apart += std::abs(often[j] - chance[j]) / 40;
    low = std::min(low, chance[j]), high = std::max(high, chance[j]);
  }
  EXPECT_LT(apart, 0.06);  // of 60 draws: 0.05 on average for chances of 0.5
  EXPECT_GT(high - low, 0.3);
  EXPECT_LT(c.dense_error(c.run("magicpig(tables=200,bits=1,sinks=0,local=0)", backend())), 1e-3);
}

TEST_P(Reads, MagicPigLeavesOtherHeadsAlone) {
  const Case c(shape(3, 90), 27);
  const std::string spec = "magicpig(tables=20,bits=4,sinks=4,local=10";
  const ApplyOutput all = c.run(spec + ")", backend()), some = c.run(spec + ",heads=1-)", backend());
  EXPECT_EQ(lists(some, "read")[0], all_of(90));
  for (int64_t head = 0; head < c.shape.h; ++head) {
    const auto dense = c.output(head, c.causal(head, 2));
    double apart = 0;
    for (int64_t e = 0; e < c.shape.d_v; ++e) {
      const double x = some.find("out")->view().at<float>(head, 2, e), y = all.find("out")->view().at<float>(head, 2, e);
      EXPECT_NEAR(x, head == 0 ? dense[size_t(e)] : y, kExact);
      apart = std::max(apart, std::abs(y - dense[size_t(e)]));
    }
    EXPECT_GT(apart, 1e-3);
    EXPECT_TRUE(std::isfinite(some.find("lse")->view().at<float>(head, 2)));
  }
}

TEST_P(Reads, SqueezedAttentionReadsClustersAboveItsThreshold) {
  for (const auto& [m, tokens, rounds, recent, threshold] : {std::tuple{150, 10, 0, 20, 0.004},
                                                             {150, 10, 2, 0, 0.01},
                                                             {97, 7, 4, 33, 0.002},
                                                             {60, 100, 2, 10, 0.5},
                                                             {30, 5, 1, 29, 0.9}}) {
    const Case c(shape(2, m), 25);
    const auto tokens_read = read(c,
                                  "squeezed-attention(threshold=" + std::to_string(threshold) +
                                      ",tokens=" + std::to_string(tokens) + ",rounds=" + std::to_string(rounds) +
                                      ",recent=" + std::to_string(recent) + ")",
                                  backend());
    Case prefix(shape(2, m - recent), 25);  // what is clustered
    for (int64_t kv = 0; kv < c.shape.g; ++kv)
      for (int64_t j = 0; j < m - recent; ++j)
        for (int64_t e = 0; e < c.shape.d; ++e) prefix.k->at<float>(kv, j, e) = c.k->at<float>(kv, j, e);
    const int64_t count = std::max(1, (m - recent) / tokens), d = c.shape.d;
    for (int64_t kv = 0; kv < c.shape.g; ++kv) {
      const auto [centroids, label] = k_means(prefix, kv, 0, d, count, rounds, true);
      std::vector<double> size(size_t(count), 0.0);
      for (int64_t x : label) ++size[size_t(x)];
      for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head) {
        std::vector<double> weight;
        double total = 0;
        for (int64_t x = 0; x < count; ++x) {
          double dot = 0;
          for (int64_t e = 0; e < d; ++e) dot += double(c.q->at<float>(head, 1, e)) * centroids[size_t(x)][size_t(e)];
          weight.push_back(std::exp(dot / std::sqrt(double(d))));
          total += size[size_t(x)] * weight.back();
        }
        std::vector<int32_t> expected;
        for (int64_t j = 0; j < m; ++j)
          if (j >= m - recent || weight[size_t(label[size_t(j)])] / total >= threshold) expected.push_back(int32_t(j));
        EXPECT_EQ(tokens_read[size_t(head)], expected) << m << " head " << head;
      }
    }
  }
}

TEST_P(Reads, TriForceReadsChunksOfTheLastQuery) {
  for (const auto& [n, m, chunk, budget] :
       {std::tuple{2, 150, 8, 40}, {40, 203, 5, 60}, {1, 61, 16, 16}, {3, 30, 8, 1}, {2, 7, 8, 100}}) {
    const Case c(shape(n, m), 26);
    const auto tokens = read(c, "triforce(budget=" + std::to_string(budget) + ",chunk=" + std::to_string(chunk) + ")",
                             backend());
    const int64_t chunks = m / chunk;
    for (int64_t head = 0; head < c.shape.h; ++head) {
      std::vector<double> score;
      for (int64_t b = 0; b < chunks; ++b) {
        score.push_back(b == 0 ? INFINITY : 0);
        for (int64_t j = b * chunk; j < (b + 1) * chunk; ++j) score.back() += c.dot(head, n - 1, j) / double(chunk);
      }
      auto expected = keys_of(top(score, std::max(1, budget / chunk)), chunk, m);
      for (int64_t j = chunks * chunk; j < m; ++j) expected.push_back(int32_t(j));
      EXPECT_EQ(tokens[size_t(head)], expected) << m;
    }
  }
}

TEST_P(Reads, RocketKvReadsByOneSidedBoundsOfItsChannels) {
  for (const auto& [m, page, channels, budget] :
       {std::tuple{150, 4, 0.25, 33}, {203, 8, 0.5, 60}, {61, 1, 1.0, 20}, {90, 2, 0.13, 7}}) {
    const Case c(shape(2, m), 15);
    const auto tokens = read(c,
                             "rocketkv(budget=" + std::to_string(budget) + ",page=" + std::to_string(page) +
                                 ",channels=" + std::to_string(channels) + ")",
                             backend());
    const int64_t d = c.shape.d, pages = (m + page - 1) / page;
    for (int64_t kv = 0; kv < c.shape.g; ++kv) {
      std::vector<double> sum(size_t(d), 0.0), size(size_t(d), 0.0);
      for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head)
        for (int64_t e = 0; e < d; ++e)
          sum[size_t(e)] += double(c.q->at<float>(head, 1, e)),
              size[size_t(e)] += std::abs(double(c.q->at<float>(head, 1, e)));
      const auto looked_at = top(size, std::max<int64_t>(1, int64_t(channels * double(d))));
      std::vector<double> paid(static_cast<size_t>(pages), 0.0), score(static_cast<size_t>(m), 0.0);
      for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head) {
        double part = 0, whole = 0;
        for (int64_t e = 0; e < d; ++e) whole += std::abs(double(c.q->at<float>(head, 1, e)));
        for (int32_t e : looked_at) part += std::abs(double(c.q->at<float>(head, 1, e)));
        std::vector<double> logit;
        for (int64_t p = 0; p < pages; ++p) {
          double dot = 0;
          for (int32_t e : looked_at) {
            const double sign = sum[size_t(e)] > 0 ? 1 : -1;
            double most = -INFINITY;  // the chunk's key
            for (int64_t j = p * page; j < std::min<int64_t>(m, (p + 1) * page); ++j)
              most = std::max(most, sign * double(c.k->at<float>(kv, j, e)));
            dot += sign * double(c.q->at<float>(head, 1, e)) * most;
          }
          logit.push_back(dot / std::sqrt(double(d) * part / whole));
        }
        const double most = *std::max_element(logit.begin(), logit.end());
        double total = 0;
        for (double& x : logit) total += x = std::exp(x - most);
        for (int64_t p = 0; p < pages; ++p) paid[size_t(p)] += logit[size_t(p)] / total;
      }
      for (int64_t j = 0; j < m; ++j) score[size_t(j)] = paid[size_t(j / page)];
      for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head)
        EXPECT_EQ(tokens[size_t(head)], top(score, budget)) << m;
    }
  }
}

// A key that answers the query is found by every reader, wherever it stands.
TEST_P(Reads, APlantedKeyIsFound) {
  for (const int64_t place : {0, 77, 131, 199}) {
    Case c(shape(2, 200), 11, 0.3);
    for (int64_t e = 0; e < c.shape.d; ++e) {
      const float x = e % 3 == 0 ? -4.0f : 4.0f;
      for (int64_t head = 0; head < c.shape.h; ++head) c.q->as<float>()[(head * 2 + 1) * c.shape.d + e] = x;
      for (int64_t kv = 0; kv < c.shape.g; ++kv) c.k->as<float>()[(kv * 200 + place) * c.shape.d + e] = x;
    }
    for (const char* spec :
         {"quest(budget=32)", "tidal-decode(budget=8)", "twilight(p=0.5)", "omnikv(budget=8)",
          "recycled-attention(budget=8)", "kinetics(budget=64,local=16,block=8)", "shadowkv(budget=24)",
          "double-sparsity(budget=8,factor=4)", "hylra(budget=8)", "lychee-decode(budget=8)",
          "clusterkv(budget=24,tokens=4,sinks=2)", "pqcache(topk=0.1,sinks=2)", "rocketkv(budget=16)",
          "token-select(budget=8,sinks=4,local=4)", "loki(budget=8)", "retrieval-attention(topk=1,sinks=4,recent=4)",
          "triforce(budget=24)", "squeezed-attention(threshold=0.01,tokens=4,recent=8)"})
      for (const auto& list : read(c, spec, backend()))
        EXPECT_TRUE(std::binary_search(list.begin(), list.end(), int32_t(place))) << spec << " at " << place;
  }
}

TEST_P(Reads, MoreBudgetReadsMore) {
  const Case c(shape(1, 180), 5);
  for (const char* name : {"quest", "tidal-decode", "recycled-attention", "omnikv", "kinetics", "shadowkv",
                           "double-sparsity", "hylra", "lychee-decode", "clusterkv", "rocketkv", "loki", "triforce"}) {
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
