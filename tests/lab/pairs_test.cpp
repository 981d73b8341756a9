// Every planner with every keep policy, every planner with every reader, every keep policy with every reader.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "base/random.h"
#include "lab/compare.h"
#include "mechanisms/registry.h"

namespace heed {
namespace {

constexpr int64_t kPrompt = 70, kDecoded = 5;

/// Three query heads to a KV head; the second layer sees 24 tokens.
std::shared_ptr<const Model> pair_model() {
  static const auto model = [] {
    ModelInfo shape;
    shape.architecture = "llama";
    shape.layers = 3, shape.h = 6, shape.g = 2, shape.d = shape.d_v = 16, shape.hidden = 96, shape.vocabulary = 61;
    shape.context = 256;
    shape.windows = {0, 24, 0};
    return Model::random(shape, 128, Dtype::F32, 17);
  }();
  return model;
}

SessionOptions exact(const std::string& attention) {
  SessionOptions options;
  options.attention = attention;
  options.k.kind = options.v.kind = PageType::Kind::F32;
  return options;
}

/// Logits of the prompt's last token and of each decoded one.
std::vector<float> logits_of(const std::string& attention) {
  Random random(3);
  std::vector<int32_t> text(static_cast<size_t>(kPrompt + kDecoded));
  for (int32_t& t : text) t = int32_t(random.below(61));
  Session session(pair_model(), exact(attention));
  std::vector<float> out;
  const auto add = [&](Tensor logits) {
    const auto row = logits.select(0, 0).span<const float>();
    out.insert(out.end(), row.begin(), row.end());
  };
  add(session.prefill(std::span(text).subspan(0, size_t(kPrompt))));
  for (int64_t i = 0; i < kDecoded; ++i) add(session.decode(text[size_t(kPrompt + i)]));
  return out;
}

/// Whether a mechanism of the catalogue can run here and claims a role.
bool plays(const std::string& spec, Role role) {
  const auto parsed = Composition::parse(spec, pair_model()->info(), registry());
  return parsed && std::any_of(parsed->parts().begin(), parsed->parts().end(),
                               [&](const Composition::Part& p) { return has(p.roles, role); });
}

/// All pairs of different roles out of `specs`; `visit(pair)` runs those that compose. A pair that does not says why.
template <class Visit>
void each_pair(const std::vector<std::string>& specs, Visit visit) {
  int run = 0;
  for (const auto& [one, other] : {std::pair(Role::Plan, Role::Keep), {Role::Plan, Role::Read}, {Role::Keep, Role::Read}})
    for (const std::string& a : specs)
      for (const std::string& b : specs) {
        if (!plays(a, one) || !plays(b, other) || a == b) continue;
        const std::string pair = a + "+" + b;
        try {
          visit(pair);
          ++run;
        } catch (const Error& e) {
          EXPECT_EQ(e.failure().exit_status(), 2) << pair << ": " << e.what();
          EXPECT_FALSE(e.failure().what.empty()) << pair;
        }
      }
  EXPECT_GT(run, int(specs.size()));
}

TEST(Pairs, RunAtHalfTheEntries) {
  const std::vector<std::string> budgets = {"50%"};
  const Everything every = every_mechanism(pair_model(), exact("dense"), budgets);
  each_pair(every.specs, [](const std::string& pair) {
    for (float x : logits_of(pair)) ASSERT_TRUE(std::isfinite(x)) << pair;
  });
}

TEST(Pairs, EqualDenseAtTheirIdentities) {
  std::vector<std::string> specs;
  for (const Entry& e : registry())
    if (e.kind == "mechanism" && !e.identity.empty() && e.name != "dense") specs.push_back(e.identity);
  const std::vector<float> dense = logits_of("dense");
  each_pair(specs, [&](const std::string& pair) {
    const std::vector<float> logits = logits_of(pair);
    ASSERT_EQ(logits.size(), dense.size());
    float most = 0;
    for (size_t i = 0; i < dense.size(); ++i) most = std::max(most, std::abs(logits[i] - dense[i]));
    EXPECT_LT(most, 2e-3f) << pair;
  });
}

}  // namespace
}  // namespace heed
