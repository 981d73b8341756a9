// Every planner with every keep policy, every planner with every reader, every keep policy with every reader.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iostream>
#include <map>

#include "backends.h"
#include "base/random.h"
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

/// Whether a mechanism of the catalogue can run here and claims a role.
bool plays(const Ground& ground, const std::string& spec, Role role) {
  const auto parsed = Composition::parse(spec, ground.model->info(), registry());
  return parsed && std::any_of(parsed->parts().begin(), parsed->parts().end(),
                               [&](const Composition::Part& p) { return has(p.roles, role); });
}

/// All pairs of different roles of `a` with one of `specs`; `visit(pair)` runs those that compose. A pair that does not
/// says why. Returns how many ran.
template <class Visit>
int each_pair(const Ground& ground, const std::string& a, const std::vector<std::string>& specs, Visit visit) {
  int run = 0;
  for (const auto& [one, other] : {std::pair(Role::Plan, Role::Keep), {Role::Plan, Role::Read}, {Role::Keep, Role::Read}}) {
    if (!plays(ground, a, one)) continue;
    for (const std::string& b : specs) {
      if (a == b || !plays(ground, b, other)) continue;
      const std::string pair = a + "+" + b;
      try {
        visit(pair);
        ++run;
      } catch (const Error& e) {
        EXPECT_EQ(e.failure().exit_status(), 2) << pair << ": " << e.what();
        EXPECT_FALSE(e.failure().what.empty()) << pair;
      }
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
  int run = 0;
  for (const std::string& a : specs)
    run += each_pair(small(), a, specs, [](const std::string& pair) { expect_finite(small(), pair); });
  EXPECT_GT(run, int(specs.size()));
}

TEST(Pairs, EqualDenseAtTheirIdentities) {
  const std::vector<std::string> specs = identities();
  const auto dense = logits_of(small(), "dense");
  int run = 0;
  for (const std::string& a : specs)
    run += each_pair(small(), a, specs, [&](const std::string& pair) {
      const auto logits = logits_of(small(), pair);
      ASSERT_EQ(logits.size(), dense.size());
      float most = 0;
      for (size_t r = 0; r < dense.size(); ++r)
        for (size_t i = 0; i < dense[r].size(); ++i) most = std::max(most, std::abs(logits[r][i] - dense[r][i]));
      EXPECT_LT(most, 2e-3f) << pair;
    });
  EXPECT_GT(run, int(specs.size()));
}

/// Thousands of pairs on real models: asked for with --gtest_also_run_disabled_tests (docs/testing.md).
class DISABLED_RealPairs : public testing::TestWithParam<std::tuple<std::string, std::string>> {
 protected:
  static std::string name_of(const std::string& spec) { return spec.substr(0, spec.find('(')); }
};

TEST_P(DISABLED_RealPairs, RunAtAFifthOfTheEntries) {
  const auto& [file, name] = GetParam();
  const Ground& ground = real(file);
  const std::vector<std::string> specs = with_budget(ground, "20%");
  int run = 0;
  for (const std::string& a : specs)
    if (name_of(a) == name)
      run += each_pair(ground, a, specs, [&](const std::string& pair) { expect_finite(ground, pair); });
  RecordProperty("pairs", run);
  std::cout << "pairs: " << run << "\n";
}

TEST_P(DISABLED_RealPairs, PredictAsDenseAtTheirIdentities) {
  const auto& [file, name] = GetParam();
  const Ground& ground = real(file);
  const std::vector<std::string> specs = identities();
  const auto dense = logits_of(ground, "dense");
  int run = 0;
  for (const std::string& a : specs)
    if (name_of(a) == name)
      run += each_pair(ground, a, specs, [&](const std::string& pair) {
        EXPECT_LT(mean_divergence(dense, logits_of(ground, pair)), 0.02) << pair;
      });
  RecordProperty("pairs", run);
  std::cout << "pairs: " << run << "\n";
}

std::vector<std::string> names() {
  std::vector<std::string> out;
  for (const Entry& e : registry())
    if (e.kind == "mechanism") out.push_back(e.name);
  return out;
}
INSTANTIATE_TEST_SUITE_P(Models, DISABLED_RealPairs,
                         testing::Combine(testing::Values("smollm2-135m.gguf", "gemma3-270m.gguf"),
                                          testing::ValuesIn(names())),
                         [](const auto& info) {
                           std::string name = std::get<0>(info.param).substr(0, 4) + "_" + std::get<1>(info.param);
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

}  // namespace
}  // namespace heed
