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
                             "lserve(budget=1.0)",
                             "lserve(streaming=0-,local=1000,recent=1000)",
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
                                    {"self-extend(heads=0)", "heads=0"}}) {
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
          "token-select(budget=8,sinks=4,local=4)"})
      for (const auto& list : read(c, spec, backend()))
        EXPECT_TRUE(std::binary_search(list.begin(), list.end(), int32_t(place))) << spec << " at " << place;
  }
}

TEST_P(Reads, MoreBudgetReadsMore) {
  const Case c(shape(1, 180), 5);
  for (const char* name : {"quest", "tidal-decode", "recycled-attention", "omnikv", "kinetics", "shadowkv",
                           "double-sparsity", "hylra", "lychee-decode", "clusterkv", "rocketkv"}) {
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
