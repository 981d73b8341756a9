// Every planner with every keep policy, every planner with every reader, every keep policy with every reader.
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <map>

#include "backends.h"
#include "base/random.h"
#include "cases.h"
#include "lab/pairs.h"

namespace heed {
namespace {

/// What pairs run on: a model, how, and a text whose last tokens are decoded one by one.
struct Ground {
  std::shared_ptr<const Model> model;
  SessionOptions options;
  std::vector<int32_t> text;
  int64_t decoded;
};

/// Three query heads to a KV head; the second layer sees 24 tokens.
const Ground& small() {
  static const Ground ground = [] {
    ModelInfo shape;
    shape.architecture = "llama";
    shape.layers = 3, shape.h = 6, shape.g = 2, shape.d = shape.d_v = 16, shape.hidden = 96, shape.vocabulary = 61;
    shape.context = 256;
    shape.windows = {0, 24, 0};
    Ground out{Model::random(shape, 128, Dtype::F32, 17), {}, {}, 5};
    out.options.k.kind = out.options.v.kind = PageType::Kind::F32;
    Random random(3);
    for (int i = 0; i < 75; ++i) out.text.push_back(int32_t(random.below(61)));
    return out;
  }();
  return ground;
}

/// One of models/, on the first 256 tokens of models/text.txt, 64 of them decoded.
const Ground& real(const std::string& name) {
  static std::map<std::string, Ground> grounds;
  if (const auto at = grounds.find(name); at != grounds.end()) return at->second;
  Ground out{value_or_throw(Model::load(HEED_MODELS "/" + name)), {}, {}, 64};
  out.options.backend = test::backend_or("auto");
  std::ifstream file(HEED_MODELS "/text.txt");
  std::string text(4096, '\0');
  file.read(text.data(), std::streamsize(text.size()));
  if (!file) throw std::runtime_error("models/text.txt is not there: ./run setup");
  out.text = out.model->tokenizer()->encode(text);
  out.text.resize(256);
  return grounds.emplace(name, std::move(out)).first->second;
}

Passage passage_of(const Ground& ground) { return {ground.text, int64_t(ground.text.size()) - ground.decoded}; }

/// Each pair runs, or is refused in words before anything is fed; divergence from dense stays below `most`. Returns how
/// many ran.
int expect_of_each(const Ground& ground, const std::vector<std::string>& pairs, double most) {
  const Passage passage = passage_of(ground);
  PairRunner runner(ground.model, passage, ground.options);
  int run = 0;
  for (const std::string& pair : pairs) {
    const PairRow row = runner.run(pair);
    EXPECT_NE(row.outcome, PairRow::Outcome::Failed) << pair << ": " << row.reason;
    if (row.outcome == PairRow::Outcome::Refused) {
      EXPECT_TRUE(row.at_once && !row.reason.empty()) << pair << ": " << row.reason;
      continue;
    }
    EXPECT_LT(row.kld_mean, most) << pair;
    ++run;
  }
  return run;
}
constexpr double kAny = 1e30;

std::vector<std::string> with_budget(const Ground& ground, const std::string& budget) {
  const std::vector<std::string> budgets = {budget};
  return every_mechanism(ground.model, ground.options, budgets).specs;
}
std::vector<std::string> pairs_of(const Ground& ground, const std::vector<std::string>& specs) {
  return pairs_of(ground.model->info(), specs);
}

TEST(Pairs, RunAtHalfTheEntries) {
  const std::vector<std::string> specs = with_budget(small(), "50%");
  EXPECT_GT(expect_of_each(small(), pairs_of(small(), specs), kAny), int(specs.size()));
}

// Logits that differ by 2e-3 are 2e-6 apart.
TEST(Pairs, EqualDenseAtTheirIdentities) {
  const std::vector<std::string> specs = identities();
  EXPECT_GT(expect_of_each(small(), pairs_of(small(), specs), 2e-6), int(specs.size()));
}

TEST(Pairs, PartsAreAllOfThemOnce) {
  std::vector<std::string> pairs, parts;
  for (int i = 0; i < 20; ++i) pairs.push_back(std::to_string(i));
  for (int part = 0; part < 3; ++part)
    for (std::string& pair : part_of(pairs, part, 3)) parts.push_back(std::move(pair));
  EXPECT_NE(parts, pairs);
  std::sort(parts.begin(), parts.end()), std::sort(pairs.begin(), pairs.end());
  EXPECT_EQ(parts, pairs);
}

TEST(Pairs, ReachALineAndComeBack) {
  const PairRow refused{
      .attention = "a+b", .outcome = PairRow::Outcome::Refused, .reason = "no", .at_once = true, .seconds = 2},
      ran{.attention = "c+d", .ppl = 3, .kld_mean = 4, .kld_max = 5, .top1_agree = 0.5, .density_read = 0.25};
  for (const PairRow& row : {refused, ran}) EXPECT_EQ(to_json(pair_row(to_json(row))), to_json(row));
  SampleFile::Json line = to_json(ran);
  EXPECT_FALSE(pair_lines().valid(line));
  line["model"] = "m";
  EXPECT_TRUE(pair_lines().valid(line));
  line["outcome"] = "run";
  EXPECT_FALSE(pair_lines().valid(line));
  line["outcome"] = "ran";
  line.erase("ppl");
  EXPECT_FALSE(pair_lines().valid(line));
}

/// Thousands of pairs take hours on a real model: some of them, drawn without repetition, and all of them with a large
/// HEED_CASES, in four parts that GTEST_TOTAL_SHARDS divides (docs/testing.md).
class RealPairs : public testing::TestWithParam<std::tuple<std::string, int>> {
 protected:
  static constexpr int kParts = 4;
  static std::vector<std::string> some(std::vector<std::string> pairs, int part) {
    pairs = part_of(std::move(pairs), part, kParts);
    pairs.resize(std::min(pairs.size(), size_t(test::cases(1))));
    return pairs;
  }
};

TEST_P(RealPairs, RunAtAFifthOfTheEntries) {
  const auto& [file, part] = GetParam();
  const Ground& ground = real(file);
  const auto pairs = some(pairs_of(ground, with_budget(ground, "20%")), part);
  ASSERT_FALSE(pairs.empty());
  expect_of_each(ground, pairs, kAny);
}

TEST_P(RealPairs, PredictAsDenseAtTheirIdentities) {
  const auto& [file, part] = GetParam();
  const Ground& ground = real(file);
  const auto pairs = some(pairs_of(ground, identities()), part);
  ASSERT_FALSE(pairs.empty());
  expect_of_each(ground, pairs, 0.02);
}

INSTANTIATE_TEST_SUITE_P(Models, RealPairs,
                         testing::Combine(testing::Values("smollm2-135m.gguf", "gemma3-270m.gguf"), testing::Range(0, 4)),
                         [](const auto& info) {
                           return std::get<0>(info.param).substr(0, 5) + "_" + std::to_string(std::get<1>(info.param));
                         });

}  // namespace
}  // namespace heed
