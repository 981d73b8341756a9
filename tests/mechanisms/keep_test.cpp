#include "harness.h"

namespace heed::test {
namespace {

class Keep : public Mechanisms {};
HEED_ON_ALL_SETTINGS(Keep);

/// What a policy keeps, as a set for each KV head, and that the output of the prompt stays dense.
std::vector<std::vector<int32_t>> kept(const Case& c, const std::string& spec, const std::string& backend) {
  const ApplyOutput out = c.run(spec, backend);
  EXPECT_LT(c.dense_error(out), kExact) << spec;
  return lists(out, "kept");
}

/// The last query over the kept entries, against the explicit softmax over them.
double kept_error(const Case& c, const ApplyOutput& out) {
  const auto held = lists(out, "kept");
  double worst = 0;
  for (int64_t head = 0; head < c.shape.h; ++head) {
    const auto& list = held[size_t(head / c.group())];
    const auto expected = c.output(head, c.weights(head, c.shape.n - 1, [&](int64_t j) { return std::binary_search(list.begin(), list.end(), int32_t(j)); }));
    for (int64_t x = 0; x < c.shape.d_v; ++x) worst = std::max(worst, std::abs(double(out.find("kept_out")->view().at<float>(head, x)) - expected[size_t(x)]));
  }
  return worst;
}

/// Mean over the group (or maximum) of votes[head][j].
std::vector<double> grouped(const Case& c, int64_t kv, const Rows& votes, bool max = false) {
  std::vector<double> out(size_t(c.shape.m), max ? -INFINITY : 0.0);
  for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head)
    for (int64_t j = 0; j < c.shape.m; ++j) {
      double& x = out[size_t(j)];
      x = max ? std::max(x, votes[size_t(head)][size_t(j)]) : x + votes[size_t(head)][size_t(j)] / double(c.group());
    }
  return out;
}

/// Column sums of the last `rows` rows of every query head.
Rows column_sums(const Case& c, int64_t rows) {
  Rows out;
  for (int64_t head = 0; head < c.shape.h; ++head) {
    auto& sum = out.emplace_back(size_t(c.shape.m), 0.0);
    for (int64_t i = std::max<int64_t>(0, c.shape.n - rows); i < c.shape.n; ++i) {
      const auto p = c.causal(head, i);
      for (int64_t j = 0; j < c.shape.m; ++j) sum[size_t(j)] += p[size_t(j)];
    }
  }
  return out;
}

/// SnapKV's scores of all keys of a KV head, +∞ for the window.
std::vector<double> snapkv_scores(const Case& c, int64_t kv, int64_t window, int64_t kernel, bool max_pool = false, bool max_group = false) {
  const auto votes = grouped(c, kv, column_sums(c, window), max_group);
  const int64_t prefix = std::max<int64_t>(0, c.shape.m - window);
  std::vector<double> out(size_t(c.shape.m), INFINITY);
  for (int64_t j = 0; j < prefix; ++j) {
    double sum = 0, most = -INFINITY;
    for (int64_t x = j - kernel / 2; x <= j + kernel / 2; ++x) {
      if (x < 0 || x >= prefix) continue;
      sum += votes[size_t(x)], most = std::max(most, votes[size_t(x)]);
    }
    out[size_t(j)] = max_pool ? most : sum / double(kernel);
  }
  return out;
}

TEST_P(Keep, IdentityKeepsAll) {
  for (const Shape s : {shape(97, 97), shape(1, 1), shape(5, 130)}) {
    const Case c(s);
    for (const char* spec : {"streaming-llm(window=1000000)", "snapkv(budget=1.0)", "pyramidkv(budget=1.0)", "adakv(snapkv(budget=1.0))",
                             "h2o(budget=1.0)", "tova(budget=1.0)", "kivi(residual=100000)"}) {
      const ApplyOutput out = c.run(spec, backend());
      EXPECT_LT(c.dense_error(out), kExact) << spec;
      EXPECT_LT(kept_error(c, out), kExact) << spec;
      for (const auto& list : lists(out, "kept")) EXPECT_EQ(list, all_of(s.m)) << spec;
    }
  }
}

TEST_P(Keep, WhatIsLeftIsReadExactly) {
  const Case c(shape(70, 133), 5);
  for (const char* spec : {"streaming-llm(budget=40)", "snapkv(budget=40,window=8)", "adakv(snapkv(budget=40,window=8))", "h2o(budget=31)", "tova(budget=17)"}) {
    const ApplyOutput out = c.run(spec, backend());
    EXPECT_LT(kept_error(c, out), kExact) << spec;
    for (const auto& list : lists(out, "kept")) {
      EXPECT_TRUE(std::is_sorted(list.begin(), list.end()));
      EXPECT_LT(list.size(), 133u);
    }
  }
}

TEST_P(Keep, StreamingKeepsSinksAndTheLatest) {
  const Case c(shape(90, 90));
  for (const auto& [spec, sinks, recent] : {std::tuple{"streaming-llm(window=30)", 4, 30}, {"streaming-llm(sinks=0,window=7)", 0, 7},
                                            {"streaming-llm(budget=20,sinks=3)", 3, 17}, {"streaming-llm(budget=50%)", 4, 41}}) {
    std::vector<int32_t> expected = all_of(sinks);
    for (int32_t j = 90 - recent; j < 90; ++j) expected.push_back(j);
    for (const auto& list : kept(c, spec, backend())) EXPECT_EQ(list, expected) << spec;
  }
}

TEST_P(Keep, SnapKvIsTheTopOfPooledVotes) {
  for (const Shape s : {shape(120, 120), shape(11, 101)}) {
    const Case c(s, 3);
    for (const auto& [spec, window, kernel, max_pool, max_group] :
         {std::tuple{"snapkv(budget=33,window=16)", 16, 5, false, false}, {"snapkv(budget=33,window=5,kernel=7,pool=max)", 5, 7, true, false},
          {"snapkv(budget=33,window=9,kernel=1,group=max)", 9, 1, false, true}}) {
      const auto held = kept(c, spec, backend());
      for (int64_t kv = 0; kv < s.g; ++kv) EXPECT_EQ(held[size_t(kv)], top(snapkv_scores(c, kv, window, kernel, max_pool, max_group), 33)) << spec;
    }
  }
}

TEST_P(Keep, SnapKvOfOneRowIsThatRow) {
  const Case c(shape(60, 60), 8);
  const auto held = kept(c, "snapkv(budget=12,window=1,kernel=1)", backend());
  for (int64_t kv = 0; kv < c.shape.g; ++kv) {
    auto scores = grouped(c, kv, column_sums(c, 1));
    scores.back() = INFINITY;
    EXPECT_EQ(held[size_t(kv)], top(scores, 12));
  }
}

TEST_P(Keep, AFractionOfAShortPromptKeepsItsNewest) {
  const Case c(shape(40, 40));
  for (const auto& list : kept(c, "snapkv(budget=0.2)", backend())) {
    ASSERT_EQ(list.size(), 8u);
    EXPECT_EQ(list.front(), 32);
  }
}

TEST_P(Keep, AdaKvDividesALayersBudget) {
  const Case c(shape(110, 110), 9);
  const int64_t window = 8, budget = 30;
  std::vector<std::vector<double>> scores;
  for (int64_t kv = 0; kv < c.shape.g; ++kv) scores.push_back(snapkv_scores(c, kv, window, 5));
  std::vector<double> pool;
  for (const auto& s : scores) pool.insert(pool.end(), s.begin(), s.end());
  const auto winners = top(pool, c.shape.g * budget);
  for (double alpha : {0.0, 0.2, 1.0}) {
    const auto held = kept(c, "adakv(snapkv(budget=30,window=8),alpha=" + std::to_string(alpha) + ")", backend());
    int64_t total = 0;
    for (int64_t kv = 0; kv < c.shape.g; ++kv) {
      int64_t share = -window;
      for (int32_t i : winners) share += i / c.shape.m == kv;
      const int64_t expected = window + std::llround((1 - alpha) * double(share) + std::floor(alpha * double(budget - window)));
      EXPECT_EQ(held[size_t(kv)], top(scores[size_t(kv)], expected)) << "alpha " << alpha;
      EXPECT_GE(int64_t(held[size_t(kv)].size()), window + int64_t(alpha * double(budget - window)));
      total += int64_t(held[size_t(kv)].size());
    }
    EXPECT_NEAR(double(total), double(c.shape.g * budget), 1.5 * double(c.shape.g));
  }
  // The library's rule: each head's best ⌊α n⌋ count as forced, and the total is exact.
  const auto held = kept(c, "adakv(snapkv(budget=30,window=8),alpha=0.5,port=true)", backend());
  auto floored = pool;
  for (int64_t kv = 0; kv < c.shape.g; ++kv)
    for (int32_t i : top(scores[size_t(kv)], 15)) floored[size_t(kv * c.shape.m + i)] = INFINITY;
  std::vector<std::vector<int32_t>> expected(static_cast<size_t>(c.shape.g));
  for (int32_t i : top(floored, c.shape.g * budget)) expected[size_t(i / c.shape.m)].push_back(int32_t(i % c.shape.m));
  EXPECT_EQ(held, expected);
}

TEST_P(Keep, AdaKvAroundOtherPoliciesKeepsTheTotal) {
  const Case c(shape(64, 64), 4);
  for (const char* spec : {"adakv(h2o(budget=20),alpha=0)", "adakv(tova(budget=20),alpha=0)", "adakv(pyramidkv(budget=20,window=4),alpha=0)"}) {
    int64_t total = 0;
    for (const auto& list : kept(c, spec, backend())) total += int64_t(list.size());
    EXPECT_EQ(total, 20 * c.shape.g) << spec;
  }
}

TEST_P(Keep, H2oSumsWhatAllQueriesPaid) {
  for (const Shape s : {shape(80, 80), shape(33, 70)}) {
    const Case c(s, 6);
    const auto held = kept(c, "h2o(budget=25,recent=0.4)", backend());
    for (int64_t kv = 0; kv < s.g; ++kv) {
      auto scores = grouped(c, kv, column_sums(c, s.n));
      std::fill(scores.end() - 10, scores.end(), INFINITY);
      EXPECT_EQ(held[size_t(kv)], top(scores, 25));
    }
    std::vector<int32_t> last = all_of(s.m);
    last.erase(last.begin(), last.end() - 25);
    for (const auto& list : kept(c, "h2o(budget=25,recent=1)", backend())) EXPECT_EQ(list, last);
  }
}

TEST_P(Keep, TovaIsTheLastRowOfTheLayer) {
  const Case c(shape(75, 75), 7);
  std::vector<double> mean(size_t(c.shape.m), 0.0);
  for (const auto& row : column_sums(c, 1))
    for (size_t j = 0; j < row.size(); ++j) mean[j] += row[j] / double(c.shape.h);
  for (const auto& list : kept(c, "tova(budget=19)", backend())) EXPECT_EQ(list, top(mean, 19));
  mean.back() = INFINITY;
  for (const auto& list : kept(c, "tova(budget=19,force_last=true)", backend())) EXPECT_EQ(list, top(mean, 19));
}

TEST_P(Keep, HeadsOutsideKeepAll) {
  if (GetParam().g < 2) return;
  const Case c(shape(64, 64));
  const auto held = kept(c, "snapkv(budget=16,window=4,heads=1)", backend());
  EXPECT_EQ(held[0], all_of(64));
  EXPECT_EQ(held[1].size(), 16u);
}

TEST_P(Keep, PositionsAreThoseGiven) {
  const Case c(shape(20, 50));
  std::vector<int32_t> positions;
  for (int32_t j = 0; j < 50; ++j) positions.push_back(3 * j + 7);
  ApplyInput in = c.input(backend());
  in.positions = Tensor(positions.data(), Dtype::I32, {50});
  const auto plain = lists(c.run("snapkv(budget=14,window=4)", backend()), "kept"), moved = lists(Case::run("snapkv(budget=14,window=4)", in), "kept");
  for (size_t kv = 0; kv < plain.size(); ++kv)
    for (size_t i = 0; i < plain[kv].size(); ++i) EXPECT_EQ(moved[kv][i], positions[size_t(plain[kv][i])]);
}

// Old entries lie within half a step of their group, the residual exactly.
TEST_P(Keep, KiviKeepsHalfAStep) {
  const Case c(shape(8, 300, 32, 64), 2);
  for (const auto& [spec, bits, residual] : {std::tuple{"kivi(residual=100)", 2, 100}, {"kivi(bits=4,residual=100)", 4, 100}, {"kivi(bits=2,residual=301)", 2, 301}}) {
    const ApplyOutput out = c.run(spec, backend());
    EXPECT_LT(c.dense_error(out), kExact);
    // The output over rounded entries differs from dense by no more than what half a step in each of K and V can do.
    double worst = 0, bound_v = 0;
    const double levels = (1 << bits) - 1;
    for (int64_t kv = 0; kv < c.shape.g; ++kv)
      for (int64_t j = 0; j < c.shape.m; ++j)
        for (int64_t x = 0; x < c.shape.d_v; x += 32) {
          double low = INFINITY, high = -INFINITY;
          for (int64_t y = x; y < x + 32; ++y) low = std::min(low, double(c.v->at<float>(kv, j, y))), high = std::max(high, double(c.v->at<float>(kv, j, y)));
          bound_v = std::max(bound_v, (high - low) / levels / 2);
        }
    for (int64_t head = 0; head < c.shape.h; ++head) {
      const auto expected = c.output(head, c.causal(head, c.shape.n - 1));
      for (int64_t x = 0; x < c.shape.d_v; ++x) worst = std::max(worst, std::abs(double(out.find("kept_out")->view().at<float>(head, x)) - expected[size_t(x)]));
    }
    if (residual > 300) EXPECT_LT(worst, kExact);
    else {
      EXPECT_GT(worst, 1e-4) << "nothing was rounded";
      EXPECT_LT(worst, 8 * bound_v);
    }
    for (const auto& list : lists(out, "kept")) EXPECT_EQ(list, all_of(300));
  }
}

TEST(KeepPolicies, ABudgetBelowWhatIsForcedNamesTheParameter) {
  const Case c({2, 2, 64, 64, 16, 16});
  for (const auto& [spec, name] : {std::pair{"snapkv(budget=16)", "window"}, {"pyramidkv(budget=16)", "window"}, {"streaming-llm(budget=4)", "sinks"},
                                   {"adakv(snapkv(budget=31))", "window"}, {"snapkv(kernel=4)", "kernel"}, {"kivi(bits=3)", "bits"}}) {
    const auto out = apply(spec, c.input("reference"));
    ASSERT_FALSE(out.has_value()) << spec;
    EXPECT_EQ(out.error().code, Code::Invalid);
    EXPECT_NE(out.error().text().find(name), std::string::npos) << out.error().text();
  }
}

}  // namespace
}  // namespace heed::test
