// What is asked of sessions works on memory that the host may not touch, with the figures of ordinary memory.
#include <gtest/gtest.h>

#include <cmath>

#include "backends.h"
#include "base/random.h"
#include "lab/attend.h"
#include "lab/compare.h"
#include "lab/heads.h"
#include "lab/perplexity.h"
#include "lab/trace.h"

namespace heed::test {
namespace {

std::shared_ptr<const Model> small_model() {
  ModelInfo shape;
  shape.architecture = "llama";
  shape.layers = 3, shape.h = 4, shape.g = 2, shape.d = shape.d_v = 16, shape.hidden = 64, shape.vocabulary = 97,
  shape.context = 512;
  shape.windows = {0, 24, 0};
  return Model::random(shape, 96, Dtype::F32, 5);
}

std::vector<int32_t> random_text(int64_t count) {
  Random random(11);
  std::vector<int32_t> out(static_cast<size_t>(count));
  for (int32_t& t : out) t = int32_t(random.below(97));
  return out;
}

SessionOptions on(const std::string& backend, const std::string& attention = "dense") {
  guarded_kernels();
  SessionOptions o;
  o.attention = attention, o.backend = backend;
  return o;
}

TEST(GuardedLab, TracesAgree) {
  const auto model = small_model();
  const auto text = random_text(90);
  for (const char* spec : {"h2o(budget=20)", "quest(budget=16,page=4,dense=0)", "adakv(snapkv(budget=24,window=4))"}) {
    const Arrays plain = trace(model, on("cpu", spec), text, 70), guarded = trace(model, on("guarded", spec), text, 70);
    ASSERT_EQ(plain.size(), guarded.size());
    for (size_t i = 0; i < plain.size(); ++i) {
      const Tensor &a = plain[i].second, &b = guarded[i].second;
      ASSERT_EQ(a.shape(), b.shape()) << spec << " " << plain[i].first;
      for (int64_t j = 0; j < a.numel(); ++j) {
        const std::string where = std::string(spec) + " " + plain[i].first;
        switch (a.type) {
          case Dtype::F32: ASSERT_NEAR(a.as<float>()[j], b.as<float>()[j], 1e-4) << where; break;
          case Dtype::I64: ASSERT_EQ(a.as<int64_t>()[j], b.as<int64_t>()[j]) << where; break;
          case Dtype::I32: ASSERT_EQ(a.as<int32_t>()[j], b.as<int32_t>()[j]) << where; break;
          default: FAIL() << where << " is " << a.shape();
        }
      }
    }
  }
}

TEST(GuardedLab, ComparisonsAgree) {
  const auto model = small_model();
  const Passage text = passage(random_text(120), 120, 20);
  CompareOptions options;
  options.attention = {"snapkv(budget=24,window=4)", "quest(budget=16,page=4,dense=0)",
                       "xattention(block=8,stride=4,threshold=0.5)", "moba(block=8,topk=2)"};
  options.details = true;
  options.session = on("cpu");
  const Comparison plain = compare(model, text, options);
  options.session = on("guarded");
  const Comparison guarded = compare(model, text, options);
  ASSERT_EQ(plain.rows.size(), guarded.rows.size());
  for (size_t i = 0; i < plain.rows.size(); ++i) {
    const Row &a = plain.rows[i], &b = guarded.rows[i];
    EXPECT_EQ(a.kv_bytes, b.kv_bytes) << a.attention;
    EXPECT_EQ(a.peak_bytes, b.peak_bytes) << a.attention;
    EXPECT_EQ(a.kept, b.kept) << a.attention;
    EXPECT_EQ(a.density_prefill, b.density_prefill) << a.attention;
    EXPECT_EQ(a.density_read, b.density_read) << a.attention;
    EXPECT_NEAR(a.ppl, b.ppl, 1e-3 * a.ppl) << a.attention;
    EXPECT_NEAR(a.kld_mean, b.kld_mean, 1e-4) << a.attention;
    EXPECT_NEAR(a.mass_prefill, b.mass_prefill, 1e-4) << a.attention;
    EXPECT_NEAR(a.mass_decode, b.mass_decode, 1e-4) << a.attention;
    ASSERT_EQ(a.plans.size(), b.plans.size());
    for (size_t p = 0; p < a.plans.size(); ++p) EXPECT_EQ(a.plans[p].share, b.plans[p].share) << a.attention;
    ASSERT_EQ(a.reads.size(), b.reads.size());
    for (size_t p = 0; p < a.reads.size(); ++p) EXPECT_EQ(a.reads[p].share, b.reads[p].share) << a.attention;
  }
}

TEST(GuardedLab, HeadsAndPerplexityAgree) {
  const auto model = small_model();
  const auto text = random_text(200);
  HeadOptions options;
  options.queries = 16, options.window = 32, options.session = on("cpu");
  const auto plain = head_views(model, text, options);
  options.session = on("guarded");
  const auto guarded = head_views(model, text, options);
  for (size_t l = 0; l < plain.size(); ++l)
    for (size_t h = 0; h < plain[l].size(); ++h) {
      EXPECT_NEAR(plain[l][h].sink, guarded[l][h].sink, 1e-5);
      EXPECT_NEAR(plain[l][h].local, guarded[l][h].local, 1e-5);
      EXPECT_NEAR(plain[l][h].distance, guarded[l][h].distance, 1e-3);
      EXPECT_NEAR(plain[l][h].entropy, guarded[l][h].entropy, 1e-4);
    }
  EXPECT_NEAR(perplexity(model, on("cpu"), text, 50, -1).sum, perplexity(model, on("guarded"), text, 50, -1).sum, 1e-2);
  RetrievalPrompt prompt{random_text(60), 20, 26};
  RetrievalOptions retrieval;
  retrieval.limit = 5, retrieval.least_recall = -1, retrieval.backend = "cpu";
  const RetrievalScores a = retrieval_heads(model, std::span(&prompt, 1), retrieval);
  retrieval.backend = "guarded";
  EXPECT_EQ(a.score, retrieval_heads(model, std::span(&prompt, 1), retrieval).score);
}

TEST(GuardedLab, AttendTakesAndGivesArraysOfTheHost) {
  guarded_kernels();
  Random random(3);
  Buffer q(Dtype::F32, {4, 20, 16}), k(Dtype::F32, {2, 50, 16}), v(Dtype::F32, {2, 50, 24});
  for (const Buffer* b : {&q, &k, &v})
    for (float& x : b->view().span<float>()) x = float(random.normal());
  const Buffer rowptr = Buffer::of<int64_t>({5}, std::vector<int64_t>{0, 1, 2, 4, 6});
  const Buffer index = Buffer::of<int32_t>({6}, std::vector<int32_t>{0, 2, 0, 1, 1, 3});
  Plan blocks;
  blocks.form = Plan::Form::Blocks, blocks.q_tile = 20, blocks.k_tile = 16, blocks.rowptr = rowptr,
  blocks.index = index, blocks.nnz_bound = 6;
  for (const Plan& plan : {Plan(), blocks}) {
    AttendOptions options;
    const Attended a = attend(q, k, v, plan, options);
    options.backend = "guarded";
    const Attended b = attend(q, k, v, plan, options);
    for (int64_t i = 0; i < a.out->numel(); ++i) ASSERT_EQ(a.out->as<float>()[i], b.out->as<float>()[i]);
    for (int64_t i = 0; i < a.lse->numel(); ++i) ASSERT_EQ(a.lse->as<float>()[i], b.lse->as<float>()[i]);
  }
}

}  // namespace
}  // namespace heed::test
