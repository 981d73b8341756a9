// Every planner with every keep policy, every planner with every reader, every keep policy with every reader.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <map>

#include "backends.h"
#include "base/random.h"
#include "cases.h"
#include "lab/compare.h"
#include "mechanisms/registry.h"

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

/// Logits of the prompt's last token and of each decoded one.
std::vector<std::vector<float>> logits_of(const Ground& ground, const std::string& attention) {
  SessionOptions options = ground.options;
  options.attention = attention;
  Session session(ground.model, options);
  std::vector<std::vector<float>> out;
  const auto add = [&](Tensor logits) {
    const auto row = logits.select(0, 0).span<const float>();
    out.emplace_back(row.begin(), row.end());
  };
  const size_t prompt = ground.text.size() - size_t(ground.decoded);
  add(session.prefill(std::span(ground.text).first(prompt)));
  for (size_t i = prompt; i < ground.text.size(); ++i) add(session.decode(ground.text[i]));
  return out;
}

/// The mean of KL(p ‖ q) over rows of logits.
double mean_divergence(const std::vector<std::vector<float>>& p, const std::vector<std::vector<float>>& q) {
  const auto log_sum = [](const std::vector<float>& row) {
    const double most = *std::max_element(row.begin(), row.end());
    double sum = 0;
    for (float x : row) sum += std::exp(x - most);
    return most + std::log(sum);
  };
  double sum = 0;
  for (size_t r = 0; r < p.size(); ++r) {
    const double a = log_sum(p[r]), b = log_sum(q[r]);
    for (size_t i = 0; i < p[r].size(); ++i) sum += std::exp(p[r][i] - a) * ((p[r][i] - a) - (q[r][i] - b));
  }
  return sum / double(p.size());
}

/// All pairs out of `specs`: a planner with a keep policy, a planner with a reader, a keep policy with a reader.
std::vector<std::string> pairs_of(const Ground& ground, const std::vector<std::string>& specs) {
  const auto playing = [&](Role role) {
    std::vector<std::string> out;
    for (const std::string& spec : specs) {
      const auto parsed = Composition::parse(spec, ground.model->info(), registry());
      if (parsed && std::any_of(parsed->parts().begin(), parsed->parts().end(),
                                [&](const Composition::Part& p) { return has(p.roles, role); }))
        out.push_back(spec);
    }
    return out;
  };
  std::vector<std::string> out;
  for (const auto& [one, other] : {std::pair(Role::Plan, Role::Keep), {Role::Plan, Role::Read}, {Role::Keep, Role::Read}}) {
    const auto others = playing(other);
    for (const std::string& a : playing(one))
      for (const std::string& b : others)
        if (a != b) out.push_back(a + "+" + b);
  }
  return out;
}

/// visit(pair) for each pair that composes; one that does not says why. Returns how many ran.
template <class Visit>
int each_of(const std::vector<std::string>& pairs, Visit visit) {
  int run = 0;
  for (const std::string& pair : pairs) {
    try {
      visit(pair);
      ++run;
    } catch (const Error& e) {
      EXPECT_EQ(e.failure().exit_status(), 2) << pair << ": " << e.what();
      EXPECT_FALSE(e.failure().what.empty()) << pair;
    }
  }
  return run;
}

std::vector<std::string> with_budget(const Ground& ground, const std::string& budget) {
  const std::vector<std::string> budgets = {budget};
  return every_mechanism(ground.model, ground.options, budgets).specs;
}
std::vector<std::string> identities() {
  std::vector<std::string> specs;
  for (const Entry& e : registry())
    if (e.kind == "mechanism" && !e.identity.empty() && e.name != "dense") specs.push_back(e.identity);
  return specs;
}

void expect_finite(const Ground& ground, const std::string& pair) {
  for (const auto& row : logits_of(ground, pair))
    for (float x : row) ASSERT_TRUE(std::isfinite(x)) << pair;
}

TEST(Pairs, RunAtHalfTheEntries) {
  const std::vector<std::string> specs = with_budget(small(), "50%");
  const int run = each_of(pairs_of(small(), specs), [](const std::string& pair) { expect_finite(small(), pair); });
  EXPECT_GT(run, int(specs.size()));
}

TEST(Pairs, EqualDenseAtTheirIdentities) {
  const std::vector<std::string> specs = identities();
  const auto dense = logits_of(small(), "dense");
  const int run = each_of(pairs_of(small(), specs), [&](const std::string& pair) {
    const auto logits = logits_of(small(), pair);
    ASSERT_EQ(logits.size(), dense.size());
    float most = 0;
    for (size_t r = 0; r < dense.size(); ++r)
      for (size_t i = 0; i < dense[r].size(); ++i) most = std::max(most, std::abs(logits[r][i] - dense[r][i]));
    EXPECT_LT(most, 2e-3f) << pair;
  });
  EXPECT_GT(run, int(specs.size()));
}

/// Thousands of pairs take hours on a real model: some of them, drawn without repetition, and all of them with a large
/// HEED_CASES, in four parts that GTEST_TOTAL_SHARDS divides (docs/testing.md).
class RealPairs : public testing::TestWithParam<std::tuple<std::string, int>> {
 protected:
  static constexpr int kParts = 4;
  static std::vector<std::string> some(std::vector<std::string> pairs, int part) {
    Random random(23);
    for (size_t i = pairs.size(); i > 1; --i) std::swap(pairs[i - 1], pairs[size_t(random.below(int64_t(i)))]);
    std::vector<std::string> out;
    for (size_t i = size_t(part); i < pairs.size() && int(out.size()) < test::cases(1); i += kParts)
      out.push_back(pairs[i]);
    return out;
  }
};

TEST_P(RealPairs, RunAtAFifthOfTheEntries) {
  const auto& [file, part] = GetParam();
  const Ground& ground = real(file);
  const auto pairs = some(pairs_of(ground, with_budget(ground, "20%")), part);
  ASSERT_FALSE(pairs.empty());
  each_of(pairs, [&](const std::string& pair) { expect_finite(ground, pair); });
}

TEST_P(RealPairs, PredictAsDenseAtTheirIdentities) {
  const auto& [file, part] = GetParam();
  const Ground& ground = real(file);
  const auto dense = logits_of(ground, "dense");
  const auto pairs = some(pairs_of(ground, identities()), part);
  ASSERT_FALSE(pairs.empty());
  each_of(pairs,
          [&](const std::string& pair) { EXPECT_LT(mean_divergence(dense, logits_of(ground, pair)), 0.02) << pair; });
}

INSTANTIATE_TEST_SUITE_P(Models, RealPairs,
                         testing::Combine(testing::Values("smollm2-135m.gguf", "gemma3-270m.gguf"), testing::Range(0, 4)),
                         [](const auto& info) {
                           return std::get<0>(info.param).substr(0, 5) + "_" + std::to_string(std::get<1>(info.param));
                         });

}  // namespace
}  // namespace heed
