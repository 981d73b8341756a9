// When policies cut and how much they leave: kvpress's decoding, ratio-decoding, prefill-decoding and per-layer presses, as
// README.md says that they are written here.
#include "mechanisms/registry.h"
#include "session_case.h"

namespace heed::test {
namespace {

/// The entries of one head of a layer whose keys have the smallest norms.
std::vector<int32_t> smallest(LayerView& at, int64_t head, int64_t count) {
  const Ragged keys = stored_keys(at);
  std::vector<double> score;
  for (int64_t j = keys.begin(head); j < keys.end(head); ++j) {
    double sum = 0;
    for (int64_t c = 0; c < at.model.d; ++c) sum += std::pow(double(keys.values.at<float>(j, c)), 2);
    score.push_back(-std::sqrt(sum));
  }
  std::vector<int32_t> out;
  const std::vector<int32_t> positions = at.store->positions(head);
  for (int32_t i : top(score, count)) out.push_back(positions[size_t(i)]);
  return out;
}

TEST(Timing, WhatReadmeSaysIsASpec) {
  ModelInfo shape = tiny_model(6, 2)->info();
  shape.layers = 32;
  for (const char* spec : {"snapkv(budget=2048,when=decode(512))", "knorm(budget=seen(50%),when=decode(1))",
                           "snapkv(budget=1024)+h2o(budget=1024,when=decode(128))",
                           "snapkv(budget=10%,layers=0-9)+snapkv(budget=30%,layers=10-)"})
    EXPECT_TRUE(Composition::parse(spec, shape, registry()).has_value()) << spec;
}

// Nothing goes before the first n steps are over, and then as much as makes the target.
TEST(Timing, DecodingCutsEveryNthStepAlone) {
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}, {8, 1}})
    for (const auto& [budget, every, chunk] : {std::tuple{20, 4, 0}, {7, 1, 13}, {70, 3, 0}, {20, 100, 0}}) {
      Session session(
          tiny_model(h, g),
          in_f32("knorm(budget=" + std::to_string(budget) + ",when=decode(" + std::to_string(every) + "))", chunk));
      std::vector<std::vector<int32_t>> expected(static_cast<size_t>(g));
      session.tap([&, g = g, budget = budget](LayerView& at) {
        if (at.layer != 2 || !at.decoding()) return;
        for (int64_t head = 0; head < g; ++head) expected[size_t(head)] = smallest(at, head, budget);
      });
      session.prefill(text(50, 3));
      int64_t length = 50;
      EXPECT_EQ(session.store().layer(2).length(0), length) << "a prompt stays whole";
      for (int step = 1; step <= 9; ++step) {
        session.decode(step * 7 % 61);
        const bool cuts = step % every == 0;
        length = cuts ? std::min<int64_t>(length + 1, budget) : length + 1;
        for (int64_t head = 0; head < g; ++head) {
          const auto there = session.store().layer(2).positions(head);
          EXPECT_EQ(int64_t(there.size()), length) << "step " << step;
          if (cuts) { EXPECT_EQ(there, expected[size_t(head)]); }
        }
      }
    }
}

TEST(Timing, AShareOfWhatHasBeenSeenGrowsWithTheText) {
  for (const auto& [when, share] : {std::pair{"decode(1)", 0.5}, {"every(1)", 0.29}, {"decode(3)", 0.01}, {"chunk", 0.4}}) {
    Session session(tiny_model(6, 2), in_f32("knorm(budget=seen(" + std::to_string(share) + "),when=" + when + ")"));
    const bool prompts = std::string(when) == "every(1)" || std::string(when) == "chunk";
    const int every = std::string(when) == "decode(3)" ? 3 : 1;
    const auto target = [&, share = share](int64_t seen) {
      return std::max<int64_t>(1, int64_t(std::floor(double(seen) * share + 1e-9)));
    };
    session.prefill(text(50, 3));
    int64_t seen = 50, length = prompts ? target(50) : 50;
    const auto check = [&] {
      for (int64_t head = 0; head < 2; ++head)
        EXPECT_EQ(session.store().layer(0).length(head), length) << when << " " << seen;
    };
    check();
    for (int step = 1; step <= 8; ++step) {
      session.decode(step);
      ++seen, ++length;
      if (std::string(when) != "chunk" && step % every == 0) length = std::min(length, target(seen));
      check();
    }
    // Behind a second prompt, of all text and not of the prompts alone.
    session.prefill(text(20, 5));
    seen += 20, length += 20;
    if (prompts) length = std::min(length, target(seen));
    check();
  }
}

TEST(Timing, SharesAndTimesAreChecked) {
  EXPECT_FALSE(Composition::parse("quest(budget=seen(0.5))", tiny_model(6, 2)->info(), registry()).has_value())
      << "a reader's share is of the prompt";
  EXPECT_FALSE(Composition::parse("knorm(budget=seen(20))", tiny_model(6, 2)->info(), registry()).has_value());
  EXPECT_FALSE(Composition::parse("knorm(budget=seen(0))", tiny_model(6, 2)->info(), registry()).has_value());
  EXPECT_FALSE(Composition::parse("knorm(when=decode(0))", tiny_model(6, 2)->info(), registry()).has_value());
}

TEST(Timing, OnePolicyForPromptsAndOneForDecoding) {
  const auto model = tiny_model(6, 2);
  const std::string first = "snapkv(budget=24,window=4)", both = first + "+knorm(budget=12,when=decode(4))";
  for (int64_t chunk : {0, 25}) {
    EXPECT_EQ(held(model, both, chunk), held(model, first, chunk)) << "behind the prompt the first one has cut";
    Session session(model, in_f32(both, chunk));
    std::vector<int32_t> expected;
    session.tap([&](LayerView& at) {
      if (at.layer == 2 && at.decoding()) expected = smallest(at, 1, 12);
    });
    session.prefill(text(83, 1));
    for (int64_t step = 1; step <= 8; ++step) {
      session.decode(int32_t(step));
      const auto there = session.store().layer(2).positions(1);
      EXPECT_EQ(int64_t(there.size()), step < 4 ? 24 + step : 12 + step % 4) << step;
      if (step % 4 == 0) { EXPECT_EQ(there, expected); }
    }
  }
  // The order in which they are named is nobody's business.
  EXPECT_TRUE(Composition::parse("knorm(when=decode(4))+adakv(snapkv)", model->info(), registry()).has_value());
  for (const char* spec : {"snapkv+knorm", "snapkv+knorm(when=every(4))", "snapkv(when=every(2))+knorm(when=decode(2))",
                           "h2o(when=decode(2))+knorm(when=decode(2))", "kivi+knorm(when=decode(2))"}) {
    const auto refused = Composition::parse(spec, model->info(), registry());
    ASSERT_FALSE(refused.has_value()) << spec;
    EXPECT_EQ(refused.error().code, Code::Conflict);
  }
}

TEST(Timing, LayersHaveBudgetsOfTheirOwn) {
  Session session(tiny_model(6, 2), in_f32("knorm(budget=20%,layers=0-1)+knorm(budget=60%,layers=2-)"));
  session.prefill(text(50, 3));
  for (int layer = 0; layer < 4; ++layer) EXPECT_EQ(session.store().layer(layer).length(0), layer < 2 ? 10 : 30);
}

}  // namespace
}  // namespace heed::test
