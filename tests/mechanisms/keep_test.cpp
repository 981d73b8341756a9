#include "attention/spec.h"
#include "keep_case.h"
#include "mechanisms/registry.h"

namespace heed::test {
namespace {

class Keep : public Mechanisms {};
HEED_ON_ALL_SETTINGS(Keep);

TEST_P(Keep, IdentityKeepsAll) {
  for (const Shape s : {shape(97, 97), shape(1, 1), shape(5, 130)}) {
    const Case c(s);
    for (const char* spec :
         {"streaming-llm(window=1000000)", "snapkv(budget=1.0)", "pyramidkv(budget=1.0)", "adakv(snapkv(budget=1.0))",
          "h2o(budget=1.0)", "tova(budget=1.0)", "knorm(budget=1.0)", "kivi(residual=100000)"}) {
      const ApplyOutput out = c.run(spec, backend());
      EXPECT_LT(c.dense_error(out), kExact) << spec;
      EXPECT_LT(kept_error(c, out), kExact) << spec;
      for (const auto& list : lists(out, "kept")) EXPECT_EQ(list, all_of(s.m)) << spec;
    }
  }
}

TEST_P(Keep, WhatIsLeftIsReadExactly) {
  const Case c(shape(70, 133), 5);
  for (const char* spec : {"streaming-llm(budget=40)", "snapkv(budget=40,window=8)", "adakv(snapkv(budget=40,window=8))",
                           "h2o(budget=31)", "tova(budget=17)", "knorm(budget=17)"}) {
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
  for (const auto& [spec, sinks, recent] : {std::tuple{"streaming-llm(window=30)", 4, 30},
                                            {"streaming-llm(sinks=0,window=7)", 0, 7},
                                            {"streaming-llm(budget=20,sinks=3)", 3, 17},
                                            {"streaming-llm(budget=50%)", 4, 41}}) {
    std::vector<int32_t> expected = all_of(sinks);
    for (int32_t j = 90 - recent; j < 90; ++j) expected.push_back(j);
    for (const auto& list : kept(c, spec, backend())) EXPECT_EQ(list, expected) << spec;
  }
}

TEST_P(Keep, SnapKvIsTheTopOfPooledVotes) {
  for (const Shape s : {shape(120, 120), shape(11, 101)}) {
    const Case c(s, 3);
    for (const auto& [spec, window, kernel, max_pool, max_group] :
         {std::tuple{"snapkv(budget=33,window=16)", 16, 5, false, false},
          {"snapkv(budget=33,window=5,kernel=7,pool=max)", 5, 7, true, false},
          {"snapkv(budget=33,window=9,kernel=1,group=max)", 9, 1, false, true}}) {
      const auto held = kept(c, spec, backend());
      for (int64_t kv = 0; kv < s.g; ++kv)
        EXPECT_EQ(held[size_t(kv)], top(snapkv_scores(c, kv, window, kernel, max_pool, max_group), 33)) << spec;
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

TEST_P(Keep, KnormKeepsTheSmallestKeys) {
  for (const Shape s : {shape(120, 120), shape(11, 201, 20)}) {
    const Case c(s, 12);
    for (const auto& [spec, budget, sinks] :
         {std::tuple{"knorm(budget=33)", 33, 0}, {"knorm(budget=40,sinks=5)", 40, 5}, {"knorm(budget=1)", 1, 0}}) {
      const auto held = kept(c, spec, backend());
      for (int64_t kv = 0; kv < s.g; ++kv) {
        std::vector<double> scores;
        for (int64_t j = 0; j < s.m; ++j) {
          double sum = 0;
          for (int64_t x = 0; x < s.d; ++x) sum += std::pow(double(c.k->at<float>(kv, j, x)), 2);
          scores.push_back(j < sinks ? INFINITY : -std::sqrt(sum));
        }
        EXPECT_EQ(held[size_t(kv)], top(scores, budget)) << spec;
      }
    }
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
      const int64_t expected = window +
                               std::llround((1 - alpha) * double(share) + std::floor(alpha * double(budget - window)));
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
  for (const char* spec : {"adakv(h2o(budget=20),alpha=0)", "adakv(tova(budget=20),alpha=0)",
                           "adakv(pyramidkv(budget=20,window=4),alpha=0)"}) {
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
  const auto plain = lists(c.run("snapkv(budget=14,window=4)", backend()), "kept"),
             moved = lists(Case::run("snapkv(budget=14,window=4)", in), "kept");
  for (size_t kv = 0; kv < plain.size(); ++kv)
    for (size_t i = 0; i < plain[kv].size(); ++i) EXPECT_EQ(moved[kv][i], positions[size_t(plain[kv][i])]);
}

// Old entries lie within half a step of their group, the residual exactly.
TEST_P(Keep, KiviKeepsHalfAStep) {
  const Case c(shape(8, 300, 32, 64), 2);
  for (const auto& [spec, bits, residual] : {std::tuple{"kivi(residual=100)", 2, 100},
                                             {"kivi(bits=4,residual=100)", 4, 100},
                                             {"kivi(bits=2,residual=301)", 2, 301}}) {
    const ApplyOutput out = c.run(spec, backend());
    EXPECT_LT(c.dense_error(out), kExact);
    // The output over rounded entries differs from dense by no more than what half a step in each of K and V can do.
    double worst = 0, bound_v = 0;
    const double levels = (1 << bits) - 1;
    for (int64_t kv = 0; kv < c.shape.g; ++kv)
      for (int64_t j = 0; j < c.shape.m; ++j)
        for (int64_t x = 0; x < c.shape.d_v; x += 32) {
          double low = INFINITY, high = -INFINITY;
          for (int64_t y = x; y < x + 32; ++y)
            low = std::min(low, double(c.v->at<float>(kv, j, y))), high = std::max(high, double(c.v->at<float>(kv, j, y)));
          bound_v = std::max(bound_v, (high - low) / levels / 2);
        }
    for (int64_t head = 0; head < c.shape.h; ++head) {
      const auto expected = c.output(head, c.causal(head, c.shape.n - 1));
      for (int64_t x = 0; x < c.shape.d_v; ++x)
        worst = std::max(worst, std::abs(double(out.find("kept_out")->view().at<float>(head, x)) - expected[size_t(x)]));
    }
    if (residual > 300) EXPECT_LT(worst, kExact);
    else {
      EXPECT_GT(worst, 1e-4) << "nothing was rounded";
      EXPECT_LT(worst, 8 * bound_v);
    }
    for (const auto& list : lists(out, "kept")) EXPECT_EQ(list, all_of(300));
  }
}

/// What pyramidkv grants layer `layer` of `layers` for a prompt of `length`.
int64_t granted(const std::string& spec, int layer, int layers, int64_t length) {
  Queue queue;
  queue.run = &reference_kernels();
  ModelInfo model;
  model.layers = layers, model.h = model.g = 2;
  const auto mechanism = value_or_throw(make_mechanism(value_or_throw(parse_spec(spec))[0], registry()));
  const auto& policy = static_cast<const KeepPolicy&>(*mechanism);
  const Buffer offsets = Buffer::of<int64_t>({3}, std::vector<int64_t>{0, length, 2 * length}),
               values = Buffer::zeros(Dtype::F32, {2 * length});
  const Ragged scores{values, offsets, {}, 2, 2 * length};
  const std::vector<int64_t> prompt{length};
  const Tensor counts = policy.allocate({queue, model, layer, std::span(&scores, 1), prompt, policy.kept()});
  EXPECT_EQ(counts.at<int32_t>(0, 0), counts.at<int32_t>(0, 1));
  return counts.at<int32_t>(0, 0);
}

TEST(KeepPolicies, PyramidKvFallsByEqualStepsAroundItsMean) {
  for (const auto& [length, budget, window, beta, layers] :
       {std::tuple{4000.0, 1000.0, 32.0, 20.0, 30}, {4000.0, 1900.0, 16.0, 10.0, 13}, {1000.0, 400.0, 8.0, 20.0, 2}}) {
    double total = 0;
    const std::string spec = "pyramidkv(budget=" + std::to_string(int(budget)) +
                             ",window=" + std::to_string(int(window)) + ",beta=" + std::to_string(beta);
    for (int l = 0; l < layers; ++l) {
      // The published library's lines, with its r chosen so that L (1 − r) is the budget.
      double low = budget / beta, high = budget * 2 - low;
      if (high >= length - window) high = length - window, low = budget * 2 - high;
      const double expected = high - l * ((high - low) / (layers - 1));
      const int64_t n = granted(spec + ")", l, layers, int64_t(length));
      EXPECT_NEAR(double(n), expected, 0.5 + 1e-9) << spec << " layer " << l;
      total += double(n);
    }
    EXPECT_NEAR(total / layers, budget, 0.5);
  }
  EXPECT_EQ(granted("pyramidkv(budget=200,window=32)", 0, 30, 4000), 200)
      << "the last layer would not hold its window: all alike";
  EXPECT_EQ(granted("pyramidkv(budget=1000,beta=1)", 29, 30, 4000), 1000) << "beta 1 is even";
  // The authors' numbers by hand: T = 480, lo = 24, hi = 936, step ⌊912 / 31⌋ = 29, and the window on top.
  EXPECT_EQ(granted("pyramidkv(budget=512,window=32,rule=authors)", 0, 32, 4000), 936 + 32);
  EXPECT_EQ(granted("pyramidkv(budget=512,window=32,rule=authors)", 31, 32, 4000), 936 - 31 * 29 + 32);
  EXPECT_EQ(granted("pyramidkv(budget=512,window=32,rule=authors)", 31, 32, 800), 512)
      << "between C and 2 T: no pyramid";
}

// Entries read back: half a step of their group for old pages, not a bit for the residual. Scales are rounded to f16.
TEST_P(Keep, KiviEntriesLieWithinHalfAStep) {
  const Case c(shape(1, 333, 40, 24), 12);
  for (const auto& [spec, bits, group, residual] : {std::tuple{"kivi(residual=70)", 2, 32, 70},
                                                    {"kivi(bits=4,group=16,residual=0)", 4, 16, 0},
                                                    {"kivi(bits=8,group=64,residual=130)", 8, 64, 130}}) {
    const int64_t g = c.shape.g, m = c.shape.m;
    Queue queue = queue_on(heed::backend(backend()));
    ModelInfo model;
    model.h = int(c.shape.h), model.g = int(g), model.d = 40, model.d_v = 24;
    const auto mechanism = value_or_throw(make_mechanism(value_or_throw(parse_spec(spec))[0], registry()));
    StoreOptions options;
    options.k.kind = options.v.kind = PageType::Kind::F32;
    const StoreShape layer{int(g), 40, 24};
    Store store(queue, std::span(&layer, 1), options);
    const Needs needs = mechanism->needs(model);
    EXPECT_EQ(store.add_layout(needs.quantised_k, needs.quantised_v), 1);
    Buffer offsets(Dtype::I64, {g + 1}), positions(Dtype::I32, {g * m}), k(Dtype::F32, {g * m, 40}),
        v(Dtype::F32, {g * m, 24});
    for (int64_t s = 0; s <= g; ++s) offsets->at<int64_t>(s) = s * m;
    for (int64_t r = 0; r < g * m; ++r) positions->at<int32_t>(r) = int32_t(r % m);
    const Tensor there = queue.upload(offsets);
    store.layer(0).append(queue, {queue.upload(c.k->reshape({g * m, 40})), there, {}, g, g * m},
                          {queue.upload(c.v->reshape({g * m, 24})), there, {}, g, g * m}, queue.upload(positions),
                          std::span(&m, 1));
    const int64_t bytes = store.bytes();
    LayerView at(model, queue, 0, Phase::Prompt);
    at.store = &store.layer(0), at.stores = &store;
    const auto& policy = static_cast<const KeepPolicy&>(*mechanism);
    EXPECT_TRUE(policy.settle(at));
    EXPECT_TRUE(policy.settle(at)) << "twice is once";
    EXPECT_LT(store.bytes(), bytes);
    std::fill_n(k->as<float>(), k->numel(), NAN), std::fill_n(v->as<float>(), v->numel(), NAN);
    const Tensor read_k = queue.upload(k), read_v = queue.upload(v);
    queue.run->page_read(queue, store.layer(0).pages(), nullptr, {read_k, there, {}, g, g * m},
                         {read_v, there, {}, g, g * m}, {});
    queue.read_back(read_k, k->data), queue.read_back(read_v, v->data);
    const int64_t old = (m - residual) / 64 * 64;
    const double levels = (1 << bits) - 1;
    int rounded = 0;
    auto check = [&](double got, double x, double low, double high, bool quantised) {
      rounded += got != x;
      EXPECT_NEAR(got, x, quantised ? (high - low) / levels / 2 * 1.01 + 1e-3 * std::max(std::abs(low), std::abs(high)) : 0);
    };
    for (int64_t kv = 0; kv < g; ++kv)
      for (int64_t j = 0; j < m; ++j) {
        for (int64_t x = 0; x < 40; ++x) {  // keys: `group` entries of a channel
          double low = INFINITY, high = -INFINITY;
          for (int64_t y = j / group * group; y < std::min(m, (j / group + 1) * group); ++y)
            low = std::min(low, double(c.k->at<float>(kv, y, x))), high = std::max(high, double(c.k->at<float>(kv, y, x)));
          check(k->at<float>(kv * m + j, x), c.k->at<float>(kv, j, x), low, high, j < old);
        }
        for (int64_t x = 0; x < 24; ++x) {  // values: `group` channels of an entry
          double low = INFINITY, high = -INFINITY;
          for (int64_t y = x / group * group; y < std::min<int64_t>(24, (x / group + 1) * group); ++y)
            low = std::min(low, double(c.v->at<float>(kv, j, y))), high = std::max(high, double(c.v->at<float>(kv, j, y)));
          check(v->at<float>(kv * m + j, x), c.v->at<float>(kv, j, x), low, high, j < old);
        }
      }
    EXPECT_GT(rounded, 0);
  }
}

TEST(KeepPolicies, ABudgetBelowWhatIsForcedNamesTheParameter) {
  const Case c({2, 2, 64, 64, 16, 16});
  for (const auto& [spec, name] : {std::pair{"snapkv(budget=16)", "window"},
                                   {"pyramidkv(budget=16)", "window"},
                                   {"streaming-llm(budget=4)", "sinks"},
                                   {"adakv(snapkv(budget=31))", "window"},
                                   {"snapkv(kernel=4)", "kernel"},
                                   {"kivi(bits=3)", "bits"},
                                   {"kv-hadamard(bits=5)", "bits"},
                                   {"turboquant(bits=3)", "bits"},
                                   {"kvquant(bits=5)", "bits"},
                                   {"kvquant(outliers=17)", "outliers"},
                                   {"qjl(outlier_bits=33)", "outlier_bits"},
                                   {"qjl(values=3)", "values"},
                                   {"polar-rope(bits=3)", "bits"},
                                   {"polar-rope(group=24)", "group"},
                                   {"polar-rope(values=3)", "values"},
                                   {"context-shift(budget=5,sinks=4)", "sinks"},
                                   {"ov-evict(budget=100)", "budget"},
                                   {"ov-evict(budget=0.5)", "budget"},
                                   {"ov-evict(budget=128)", "recent"},
                                   {"ov-evict(sinks=40)", "sinks"},
                                   {"trimmed-llama(heads=0)", "heads"},
                                   {"infllm(heads=0)", "heads"},
                                   {"infllm(block=2)", "representatives"},
                                   {"token-select(heads=-1)", "heads"},
                                   {"long-heads(heads=1)", "heads"},
                                   {"long-heads(chunks=2)", "chunks"}}) {
    const auto out = apply(spec, c.input("reference"));
    ASSERT_FALSE(out.has_value()) << spec;
    EXPECT_EQ(out.error().code, Code::Invalid);
    EXPECT_NE(out.error().text().find(name), std::string::npos) << out.error().text();
  }
}

}  // namespace
}  // namespace heed::test
