// The measurements on a small random model, against loops over the session's own logits.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstring>

#include "base/random.h"
#include "lab/bench.h"
#include "lab/compare_rows.h"
#include "lab/files.h"
#include "lab/perplexity.h"
#include "lab/report.h"
#include "lab/score.h"
#include "lab/trace.h"

namespace heed {
namespace {

std::shared_ptr<const Model> small_model() {
  ModelInfo shape;
  shape.architecture = "llama";
  shape.layers = 2, shape.h = 4, shape.g = 2, shape.d = shape.d_v = 16, shape.hidden = 64, shape.vocabulary = 97,
  shape.context = 512;
  return Model::random(shape, 96, Dtype::F32, 5);
}

std::vector<int32_t> random_text(int64_t count, int32_t vocabulary = 97) {
  Random random(11);
  std::vector<int32_t> out(static_cast<size_t>(count));
  for (int32_t& t : out) t = int32_t(random.below(vocabulary));
  return out;
}

SessionOptions with(const std::string& attention) {
  SessionOptions options;
  options.attention = attention;
  return options;
}

/// Losses of tokens 1 … of a text under dense attention, fed one token at a time.
std::vector<double> losses_one_by_one(std::shared_ptr<const Model> model, std::span<const int32_t> text) {
  Session session(model, with("dense"));
  std::vector<double> out;
  Tensor logits = session.prefill(text.subspan(0, 1));
  for (size_t i = 1; i < text.size(); ++i) {
    out.push_back(nll(logits.select(0, 0).span<const float>(), text[i]));
    logits = session.decode(text[i]);
  }
  return out;
}

TEST(Perplexity, ScoresTheSecondHalfOfEachChunk) {
  const auto model = small_model();
  for (int64_t context : {8, 33}) {
    const auto text = random_text(3 * context + 5);
    const Perplexity result = perplexity(model, with("dense"), text, context, -1);
    EXPECT_EQ(result.chunks, 3);
    EXPECT_EQ(result.tokens, 3 * (context - context / 2 - 1));
    double sum = 0;
    for (int64_t chunk = 0; chunk < 3; ++chunk) {
      const auto losses = losses_one_by_one(model, std::span(text).subspan(size_t(chunk * context), size_t(context)));
      for (int64_t i = context / 2; i + 1 < context; ++i) sum += losses[size_t(i)];
    }
    EXPECT_NEAR(result.sum, sum, 2e-2 * double(result.tokens));
    EXPECT_NEAR(result.ppl(), std::exp(sum / double(result.tokens)), 0.02 * result.ppl());
  }
}

TEST(Perplexity, GoesOnWhereItStopped) {
  const auto model = small_model();
  const auto text = random_text(64);
  const Perplexity whole = perplexity(model, with("dense"), text, 16, 4);
  const Perplexity half = perplexity(model, with("dense"), text, 16, 2);
  const Perplexity rest = perplexity(model, with("dense"), text, 16, 4, half);
  EXPECT_EQ(half.chunks, 2);
  EXPECT_EQ(whole.tokens, rest.tokens);
  EXPECT_EQ(whole.sum, rest.sum);
}

TEST(Perplexity, RefusesATextShorterThanAChunk) {
  EXPECT_THROW(perplexity(small_model(), with("dense"), random_text(15), 16, -1), Error);
}

TEST(Perplexity, StopsWhenAskedTo) {
  interrupt();
  const Perplexity none = perplexity(small_model(), with("dense"), random_text(64), 16, -1);
  clear_interrupt();
  EXPECT_EQ(none.chunks, 0);
  EXPECT_EQ(none.tokens, 0);
}

const Buffer& array(const Arrays& arrays, const std::string& name) {
  for (const auto& [n, buffer] : arrays)
    if (n == name) return buffer;
  throw std::runtime_error("no array " + name);
}

TEST(Trace, ArraysHaveTheShapesPromised) {
  const auto model = small_model();
  const auto text = random_text(50);
  const Arrays arrays = trace(model, with("streaming-llm(sinks=2,window=6)"), text, 40);
  EXPECT_EQ(array(arrays, "tokens")->shape(), "[50]");
  EXPECT_EQ(array(arrays, "nll")->shape(), "[49]");
  EXPECT_EQ(array(arrays, "kept_offsets")->shape(), "[5]");
  EXPECT_EQ(array(arrays, "kv_bytes")->shape(), "[2]");
  EXPECT_EQ(array(arrays, "density")->shape(), "[2, 4]");
  EXPECT_EQ(array(arrays, "read_tokens")->shape(), "[2, 4]");
  const auto offsets = array(arrays, "kept_offsets")->span<int64_t>();
  for (int64_t s = 0; s < 4; ++s) {
    const auto kept = array(arrays, "kept_index")
                          ->span<int32_t>()
                          .subspan(size_t(offsets[size_t(s)]), size_t(offsets[size_t(s + 1)] - offsets[size_t(s)]));
    EXPECT_EQ(std::vector<int32_t>(kept.begin(), kept.end()), (std::vector<int32_t>{0, 1, 34, 35, 36, 37, 38, 39}));
  }
}

TEST(Trace, DenseLossesAreThoseOfOneTokenAtATime) {
  const auto model = small_model();
  const auto text = random_text(41);
  const auto expected = losses_one_by_one(model, text);
  for (int64_t prefill : {1, 20, 40, 41}) {
    const Arrays arrays = trace(model, with("dense"), text, prefill);
    const auto nll = array(arrays, "nll")->span<float>();
    ASSERT_EQ(nll.size(), expected.size());
    for (size_t i = 0; i < expected.size(); ++i) EXPECT_NEAR(nll[i], expected[i], 0.03) << prefill << " " << i;
  }
  EXPECT_THROW(trace(model, with("dense"), text, 42), Error);
  EXPECT_THROW(trace(model, with("dense"), text, 0), Error);
}

TEST(Passage, IsCutAndChecked) {
  const auto text = random_text(100);
  EXPECT_EQ(passage(text, 80, 0).prompt, 60);
  EXPECT_EQ(passage(text, 80, 10).prompt, 70);
  EXPECT_EQ(passage(text, 80, 10).tokens.size(), 80u);
  EXPECT_THROW(passage(text, 101, 0), Error);
  EXPECT_THROW(passage(text, 80, 80), Error);
  EXPECT_THROW(passage(text, 4, 1), Error);
}

TEST(Compare, DenseIsFirstAndAtNoDistanceFromItself) {
  const auto model = small_model();
  CompareOptions options;
  options.attention = {"streaming-llm(sinks=4,window=12)"};
  options.details = true;
  const Passage text = passage(random_text(120), 120, 24);
  const Comparison result = compare(model, text, options);
  ASSERT_EQ(result.rows.size(), 2u);
  const Row &dense = result.rows[0], &cut = result.rows[1];
  EXPECT_EQ(dense.attention, "dense");
  EXPECT_EQ(dense.kld_mean, 0);
  EXPECT_EQ(dense.kld_p99, 0);
  EXPECT_EQ(dense.top1_agree, 1);
  EXPECT_EQ(dense.density(), 1);
  EXPECT_EQ(dense.mass_prefill, 1);
  const auto losses = losses_one_by_one(model, text.tokens);
  double sum = 0;
  for (size_t i = size_t(text.prompt); i < text.tokens.size(); ++i) sum += losses[i - 1];
  EXPECT_NEAR(std::log(dense.ppl), sum / double(text.scored()), 0.02);

  EXPECT_GT(cut.kld_mean, 0);
  EXPECT_LT(cut.kv_bytes, dense.kv_bytes);
  EXPECT_NEAR(cut.density_kept, 16.0 / 96, 1e-9);
  EXPECT_GT(cut.mass_decode, 0);
  EXPECT_LT(cut.mass_decode, 0.9);
  for (const auto& layer : cut.kept)
    for (int64_t count : layer) EXPECT_EQ(count, 16);
  EXPECT_EQ(cut.nll.size(), 24u);
  EXPECT_GE(cut.peak_bytes, cut.kv_bytes);
  EXPECT_GT(dense.prefill_tps, 0);
  EXPECT_GT(dense.decode_tps, 0);
}

TEST(Compare, MassOfAUniformAttentionIsTheShareKept) {
  // Tiny weights make attention nearly uniform, so what is kept holds its share of the mass.
  const auto model = small_model();
  CompareOptions options;
  options.attention = {"streaming-llm(sinks=4,window=28,when=prompt)"};
  const Comparison result = compare(model, passage(random_text(200), 200, 40), options);
  const double decoded = 20.5;  // tokens behind the prompt that a step sees, on average
  EXPECT_NEAR(result.rows[1].mass_decode, (32 + decoded) / (160 + decoded), 0.05);
}

TEST(Compare, MassIsSampledWhereNoWindowBoundsWhatIsRead) {
  ModelInfo shape = small_model()->info();
  shape.layers = 12, shape.ropes.clear();
  for (int l = 0; l < 12; ++l) shape.windows.push_back(l % 6 == 5 ? 0 : 16);
  const auto model = Model::random(shape, 96, Dtype::F32, 5);
  CompareOptions options;
  options.attention = {"streaming-llm(sinks=4,window=28)"};
  const Passage text = passage(random_text(200), 200, 40);
  const Row some = compare(model, text, options).rows[1];
  EXPECT_EQ(some.probed_layers, (std::vector<int>{5, 11}));
  EXPECT_LT(some.mass_decode, 0.5);
  options.probe_layers = 12;
  EXPECT_EQ(compare(model, text, options).rows[1].probed_layers.size(), 12u);
}

TEST(Compare, BadSpecsFailBeforeAnyWork) {
  CompareOptions options;
  options.attention = {"snapkw"};
  EXPECT_THROW(compare(small_model(), passage(random_text(64), 64, 8), options), Error);
}

TEST(Compare, ATextBeyondTheContextIsRefusedBeforeAnyWork) {
  // The prompt alone would fit.
  const Passage passage = heed::passage(random_text(600), 514, 100);
  bool begun = false;
  EXPECT_THROW(compare(small_model(), passage, {}, [&](double, const std::string&) { begun = true; }), Error);
  EXPECT_THROW(trace(small_model(), with("dense"), random_text(513), 400, [&](double) { begun = true; }), Error);
  EXPECT_THROW(bench(small_model(), with("dense"), {.generate = 500, .depth = 20}, 1), Error);
  EXPECT_FALSE(begun);
  EXPECT_EQ(compare(small_model(), heed::passage(random_text(600), 513, 2), {}).rows.size(), 1u)
      << "the last is not fed";
}

TEST(Compare, AMechanismThatFailsLeavesTheOthersTheirRows) {
  // A profile that is gone by the time its turn comes.
  const std::string profile = testing::TempDir() + "heed-profile.json";
  value_or_throw(write_file(profile, "{\"attention\": \"tova\"}"));
  CompareOptions options;
  options.attention = {"@" + profile, "knorm(budget=10%)"};
  const Comparison result = compare(small_model(), passage(random_text(64), 64, 8), options,
                                    [&](double, const std::string&) { std::remove(profile.c_str()); });
  ASSERT_EQ(result.rows.size(), 2u);
  EXPECT_EQ(result.rows[1].attention, "knorm(budget=10%)");
  EXPECT_GT(result.rows[1].decode_tps, 0);
  ASSERT_EQ(result.failed.size(), 1u);
  EXPECT_EQ(result.failed[0].first, options.attention[0]);
  EXPECT_NE(result.failed[0].second.find("heed-profile.json"), std::string::npos) << result.failed[0].second;
}

TEST(Compare, TheFrontIsWhatNothingBeats) {
  const auto row = [](double ppl, int64_t bytes) {
    Row r;
    r.ppl = ppl, r.kv_bytes = bytes;
    return r;
  };
  const std::vector<Row> rows = {row(2, 100), row(3, 10), row(3, 20), row(2.5, 20), row(2, 100), row(4, 9), row(4, 10)};
  const std::vector<bool> front = {true, true, false, true, true, true, false};
  EXPECT_EQ(pareto_front(rows, [](const Row& r) { return double(r.kv_bytes); }), front);
}

TEST(Compare, KeepsRowsDoneWhenStopped) {
  CompareOptions options;
  options.attention = {"streaming-llm(sinks=4,window=12)"};
  bool second = false;
  const Comparison result = compare(small_model(), passage(random_text(64), 64, 8), options,
                                    [&](double, const std::string& name) {
                                      if (name != "dense" && !second) second = true, interrupt();
                                    });
  clear_interrupt();
  EXPECT_TRUE(result.interrupted);
  ASSERT_EQ(result.rows.size(), 1u);
  EXPECT_EQ(result.rows[0].attention, "dense");
  EXPECT_GT(result.rows[0].prefill_tps, 0);
}

TEST(Compare, StoppedBeforeAnythingIsFinishedHasNoRows) {
  interrupt();
  const Comparison result = compare(small_model(), passage(random_text(64), 64, 8), CompareOptions());
  clear_interrupt();
  EXPECT_TRUE(result.interrupted);
  EXPECT_TRUE(result.rows.empty());
}

TEST(Compare, TakesFinishedRunsFromItsFile) {
  const std::string path = testing::TempDir() + "heed-rows.jsonl", profile = testing::TempDir() + "heed-rows.json";
  std::remove(path.c_str());
  value_or_throw(write_file(profile, "{\"attention\": \"tova(budget=16)\"}"));
  const auto model = small_model();
  const Passage text = passage(random_text(96), 96, 16);
  CompareOptions options;
  options.attention = {"streaming-llm(sinks=4,window=12)", "@" + profile};
  options.details = true;
  options.repetitions = 2;
  const Comparison alone = compare(model, text, options);
  std::vector<std::string> ran;  // names as they come, each once in a row
  const auto compared = [&] {
    ran.clear();
    SampleFile file(path, compare_lines());
    options.file = &file;
    return compare(model, text, options, [&](double, const std::string& name) {
      if (ran.empty() || ran.back() != name) ran.push_back(name);
      if (name[0] == '@' && ran.size() == 3) interrupt();
    });
  };
  EXPECT_TRUE(compared().interrupted) << "in the third mechanism's first run";
  clear_interrupt();
  const Comparison rest = compared();
  clear_interrupt();
  ASSERT_GE(ran.size(), 4u) << "dense for its distributions, the third, and all of them for a second time: "
                            << testing::PrintToString(ran);
  EXPECT_EQ((std::vector<std::string>{ran[0], ran[1]}), (std::vector<std::string>{"dense", "@" + profile}));
  const Comparison again = compared();
  EXPECT_EQ(ran, std::vector<std::string>());
  ASSERT_EQ(rest.rows.size(), 3u);
  ASSERT_EQ(again.rows.size(), 3u);
  for (size_t i = 0; i < 3; ++i) {
    const Row &x = rest.rows[i], &y = again.rows[i], &z = alone.rows[i];
    EXPECT_EQ(to_json(TimedRow{x, 0, 0}), to_json(TimedRow{y, 0, 0}))
        << x.attention << ": whatever the report draws, and times";
    EXPECT_EQ(std::tie(x.attention, x.prefill_tps, x.decode_tps, x.seconds),
              std::tie(y.attention, y.prefill_tps, y.decode_tps, y.seconds));
    EXPECT_EQ(std::tie(x.ppl, x.kld, x.kv_share, x.kept, x.kept_where, x.mass_by_head, x.probed_layers),
              std::tie(z.ppl, z.kld, z.kv_share, z.kept, z.kept_where, z.mass_by_head, z.probed_layers))
        << "as in a comparison without a file";
  }
  value_or_throw(write_file(profile, "{\"attention\": \"tova(budget=17)\"}"));
  EXPECT_NE(compared().rows[2].kld, again.rows[2].kld) << "the name is the same, what it names is not";
  EXPECT_EQ(ran.front(), "dense");
  std::remove(path.c_str()), std::remove(profile.c_str());
}

TEST(Compare, SaysWhatWasNotExercised) {
  Row row;
  row.attention = "quest";
  row.density_read = 0.7;
  EXPECT_NE(not_exercised(row, 10000), "");
  row.kv_share = 0.3;
  EXPECT_EQ(not_exercised(row, 10000), "");
  row.kv_share = 1, row.density_read = 0.1;
  EXPECT_EQ(not_exercised(row, 10000), "");
  EXPECT_NE(not_exercised(row, 4096), "");
  row.attention = "dense";
  EXPECT_EQ(not_exercised(row, 4096), "");
}

TEST(Report, NothingInANameEndsTheScript) {
  Comparison comparison;
  comparison.rows.emplace_back().attention = "dense";
  const std::string page = report(*small_model(), comparison, "</script><b>@SCRIPT@", R"([{"attention":"</script>"}])");
  EXPECT_EQ(page.find("</script><b>"), std::string::npos);
  EXPECT_EQ(page.find("\"</script>\""), std::string::npos);
  EXPECT_EQ(page.find("@STYLE@"), std::string::npos);
  EXPECT_EQ(page.find("http-equiv"), std::string::npos);
}

TEST(Bench, CountsTokensAndRepetitions) {
  const auto model = small_model();
  for (const BenchTest test : {BenchTest{16, 0, 0}, BenchTest{0, 3, 8}}) {
    const BenchResult result = bench(model, with("dense"), test, 3);
    ASSERT_EQ(result.seconds.size(), 3u);
    double mean = 0;
    for (double s : result.seconds) mean += double(test.prompt + test.generate) / s / 3;
    EXPECT_NEAR(result.mean_ts(), mean, 1e-9 * mean);
  }
}

TEST(Bench, SaysWhatIsReadOfTheKeys) {
  const auto model = small_model();
  const BenchTest prompt{40, 0, 0}, generate{0, 3, 20};
  EXPECT_EQ(bench(model, with("dense"), prompt, 1).density, 1);
  // Row i of 40 sees itself, 3 before it and 2 sinks.
  double pairs = 0;
  for (int i = 0; i < 40; ++i) pairs += std::min(i + 1, 6);
  EXPECT_NEAR(bench(model, with("a-shape(sinks=2,local=4)"), prompt, 1).density, pairs / (40 * 41 / 2.0), 0.05);
  EXPECT_EQ(bench(model, with("dense"), generate, 1).keys_read, 23);  // 21 to 25, untimed ones too
  EXPECT_LE(bench(model, with("streaming-llm(sinks=2,window=6)"), generate, 1).keys_read, 8);
}

}  // namespace
}  // namespace heed
