// What one pass of speculative decoding tells the other about where to look.
#include "keep_case.h"
#include "mechanisms/registry.h"
#include "session_case.h"

namespace heed::test {
namespace {

class Speculation : public Mechanisms {};
HEED_ON_ALL_SETTINGS(Speculation);

/// The fewest keys that hold the share p of a row.
std::set<int32_t> top_share(const std::vector<double>& row, double p) {
  std::vector<int32_t> order = all_of(int64_t(row.size()));
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return row[size_t(a)] > row[size_t(b)]; });
  const double all = std::accumulate(row.begin(), row.end(), 0.0);
  std::set<int32_t> out;
  double sum = 0;
  for (int32_t j : order) {
    if (sum >= p * all && !out.empty()) break;
    out.insert(j), sum += row[size_t(j)];
  }
  return out;
}

TEST_P(Speculation, DraftsReadWhatVerifiedRowsPaidFor) {
  for (const auto& [s, rows, p] :
       {std::tuple{shape(90, 90), 1, 0.6}, {shape(90, 90), 5, 0.5}, {shape(4, 70), 8, 0.7}, {shape(1, 40), 3, 0.3}}) {
    const Case c(s, 6);
    std::set<int32_t> expected;
    for (int64_t i = std::max<int64_t>(0, s.n - rows); i < s.n; ++i) {
      std::vector<double> mean(size_t(s.m), 0.0);
      for (int64_t head = 0; head < s.h; ++head) {
        const auto row = c.causal(head, i);
        for (int64_t j = 0; j < s.m; ++j) mean[size_t(j)] += row[size_t(j)] / double(s.h);
      }
      const auto set = top_share(mean, p);
      expected.insert(set.begin(), set.end());
    }
    const std::string spec = "spec-attn(p=" + number(p) + ",rows=" + std::to_string(rows) + ")";
    for (const auto& list : lists(c.run(spec, backend()), "read")) EXPECT_EQ(list, sorted(expected)) << spec;
  }
}

TEST_P(Speculation, VerificationReadsWhatADraftsRowsChose) {
  const Case c(shape(5, 80), 7);
  Random random(3);
  for (const double p : {0.4, 0.9, 1.0}) {
    Buffer draft(Dtype::F32, {5, 80});
    std::set<int32_t> expected;
    for (int64_t i = 0; i < 5; ++i) {
      std::vector<double> row;
      for (int64_t j = 0; j < 80; ++j)
        row.push_back(draft->at<float>(i, j) = j <= 75 + i ? float(std::exp(2 * random.normal())) : 0);
      const auto set = p < 1 ? top_share(row, p) : std::set<int32_t>();
      expected.insert(set.begin(), set.end());
    }
    for (int32_t j = p < 1 ? 75 : 0; j < 80; ++j) expected.insert(j);
    ApplyInput in = c.input(backend());
    in.inputs["draft"] = draft;
    const ApplyOutput out = Case::run("spec-attn(p=" + number(p) + ")", in);
    // The last row of `out` is the drafting read's.
    double worst = 0;
    for (int64_t head = 0; head < c.shape.h; ++head)
      for (int64_t i = 0; i < 4; ++i) {
        const auto row = c.output(
            head, c.weights(head, i, [&](int64_t j) { return j <= 75 + i && expected.contains(int32_t(j)); }));
        for (int64_t e = 0; e < c.shape.d_v; ++e)
          worst = std::max(worst, std::abs(double(out.find("out")->view().at<float>(head, i, e)) - row[size_t(e)]));
      }
    EXPECT_LT(worst, kExact) << p;
  }
  ApplyInput in = c.input(backend());
  const Buffer narrow = Buffer::zeros(Dtype::F32, {5, 79});
  in.inputs["draft"] = narrow;
  const auto wrong = apply("spec-attn", in);
  ASSERT_FALSE(wrong);
  EXPECT_EQ(wrong.error().exit_status(), 2);
}

// Drafting by the sparse read and verifying in parts gives dense greedy decoding's tokens.
TEST(SpeculationInSessions, VerifiedTokensAreThoseOfDenseAttention) {
  const auto model = tiny_model(6, 2);
  const auto prompt = text(60, 4);
  const auto best = [&](const Tensor& logits, int64_t row) {
    const float* x = logits.as<float>() + row * logits.size[1];
    return int32_t(std::max_element(x, x + logits.size[1]) - x);
  };
  SessionOptions o = in_f32("dense");
  o.backend = backend_or("cpu");
  std::vector<int32_t> greedy;
  Session dense(model, o);
  greedy.push_back(best(dense.prefill(std::span<const int32_t>(prompt)), 0));
  while (greedy.size() < 24) greedy.push_back(best(dense.decode(greedy.back()), 0));

  o.attention = "spec-attn(p=0.5,rows=4)";
  Session session(model, o);
  std::vector<int32_t> made{best(session.prefill(std::span<const int32_t>(prompt)), 0)};
  int64_t steps = 0;
  double read = 0;
  while (made.size() < 24) {
    const int64_t held = int64_t(session.tokens().size());
    std::vector<int32_t> fed{made.back()};
    for (int i = 0; i < 4; ++i) fed.push_back(best(session.decode(fed.back()), 0)), ++steps;
    session.truncate(0, held);
    const Tensor checked = session.prefill(std::vector{std::span<const int32_t>(fed)}, Session::Logits::All);
    size_t right = 0;
    while (right + 1 < fed.size() && best(checked, int64_t(right)) == fed[right + 1]) made.push_back(fed[++right]);
    made.push_back(best(checked, int64_t(right)));
    session.truncate(0, held + int64_t(right) + 1);
  }
  made.resize(24);
  EXPECT_EQ(made, greedy);
  for (const auto& layer : session.read_tokens())
    for (double keys : layer) read += keys / 24;
  EXPECT_GT(steps, 0);
  EXPECT_LT(read, 55) << "drafts read everything";
}

TEST(SpeculationInSessions, GoesWithNoPolicyThatDrops) {
  const ModelInfo m;
  for (const char* spec : {"spec-attn+snapkv", "spec-attn(p=2)", "spec-attn(rows=0)"})
    EXPECT_FALSE(Composition::parse(spec, m, registry())) << spec;
  EXPECT_TRUE(Composition::parse("spec-attn+kivi", m, registry()));
}

}  // namespace
}  // namespace heed::test
