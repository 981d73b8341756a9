#include "lab/query_stats.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "attention/array_file.h"
#include "base/npy.h"
#include "base/random.h"
#include "lab/files.h"
#include "mechanisms/registry.h"

namespace heed {
namespace {

Spec stats_spec(const std::string& text) { return value_or_throw(parse_spec(text))[0]; }

std::shared_ptr<const Model> stats_model() {
  ModelInfo shape;
  shape.layers = 2, shape.h = 4, shape.g = 2, shape.d = shape.d_v = 16, shape.hidden = 48, shape.vocabulary = 61;
  return Model::random(shape, 64, Dtype::F32, 5);
}
std::vector<int32_t> stats_tokens(int64_t length) {
  Random random(9);
  std::vector<int32_t> out;
  for (int64_t i = 0; i < length; ++i) out.push_back(int32_t(random.below(61)));
  return out;
}

// Queries before rotation, all of them side by side, and the textbook's two passes.
TEST(QueryStats, AreMeanAndCovarianceOfAllQueries) {
  const auto model = stats_model();
  const ModelInfo& m = model->info();
  const auto ids = stats_tokens(150);
  QueryStatsOptions options;
  options.length = 40, options.texts = 100;
  options.session.backend = "reference";
  const QueryStats stats = learn_query_stats(model, ids, options);
  EXPECT_EQ(stats.texts, 4);
  EXPECT_EQ(stats.count, 3 * 36 + 26);
  std::vector<std::vector<std::vector<double>>> rows(size_t(m.layers * m.h));
  for (int64_t begin = 0; begin < 150; begin += 40) {
    SessionOptions plain;
    plain.backend = "reference", plain.attention = "rerotate(knorm(budget=1.0))";  // keeps queries before rotation at hand
    Session session(model, plain);
    session.tap([&](LayerView& at) {
      for (int64_t head = 0; head < m.h; ++head)
        for (int64_t r = at.plain_q.begin(head) + 4; r < at.plain_q.end(head); ++r) {
          auto& row = rows[size_t(at.layer * m.h + head)].emplace_back();
          for (int64_t c = 0; c < m.d; ++c) row.push_back(double(at.plain_q.values.at<float>(r, c)));
        }
    });
    session.prefill(std::span(ids).subspan(size_t(begin), size_t(std::min<int64_t>(40, 150 - begin))), Session::Logits::None);
  }
  for (size_t head = 0; head < rows.size(); ++head) {
    const auto& x = rows[head];
    ASSERT_EQ(int64_t(x.size()), stats.count);
    std::vector<double> mean(16, 0.0);
    for (const auto& row : x)
      for (size_t c = 0; c < 16; ++c) mean[c] += row[c] / double(x.size());
    for (size_t a = 0; a < 16; ++a) {
      EXPECT_NEAR(stats.mean[head * 16 + a], mean[a], 1e-5);
      for (size_t b = 0; b < 16; ++b) {
        double sum = 0;
        for (const auto& row : x) sum += (row[a] - mean[a]) * (row[b] - mean[b]);
        EXPECT_NEAR(stats.covariance[(head * 16 + a) * 16 + b], sum / double(x.size() - 1), 2e-5);
      }
    }
  }
  EXPECT_THROW(learn_query_stats(model, std::span(ids).first(5), options), Error);
}

TEST(QueryStats, AProfileFindsItsArraysBesideIt) {
  const auto model = stats_model();
  QueryStatsOptions options;
  options.length = 40, options.session.backend = "reference";
  const QueryStats stats = learn_query_stats(model, stats_tokens(90), options);
  const std::string folder = testing::TempDir() + "/heed_query_stats";
  std::filesystem::create_directories(folder);
  const auto profile = query_stats_profile(stats_spec("expected-attention-stats(budget=20)"), model->info(), stats,
                                           folder + "/own.npz", "own.npz");
  EXPECT_EQ(profile["attention"], "expected-attention-stats(budget=20,stats=@own.npz)");
  EXPECT_THROW(
      query_stats_profile(stats_spec("expected-attention-stats(stats=@x.npz)"), model->info(), stats, "x", "x"), Error);
  EXPECT_THROW(query_stats_profile(stats_spec("expected-attention-stats"), model->info(), stats, "x", "a,b.npz"), Error);
  value_or_throw(write_file(folder + "/own.json", profile.dump()));

  SessionOptions o;
  o.attention = "@" + folder + "/own.json", o.backend = "reference";
  Session session(model, o);
  session.prefill(stats_tokens(70));
  for (int l = 0; l < 2; ++l)
    for (int kv = 0; kv < 2; ++kv) {
      const auto held = session.store().layer(l).positions(kv);
      ASSERT_EQ(held.size(), 20u);
      for (int32_t j = 0; j < 4; ++j) EXPECT_EQ(held[size_t(j)], j) << "sinks stay";
    }
  session.decode(3);

  // Files of other models, of other shapes, or not there, are told as such.
  const auto refused = [&](const std::string& named, const std::string& part) {
    SessionOptions other;
    other.backend = "reference";
    other.attention = "expected-attention-stats(stats=" + named + ")";
    try {
      Session one(model, other);
      ADD_FAILURE() << named << " was taken";
    } catch (const Error& error) {
      EXPECT_EQ(error.failure().exit_status(), 2) << error.what();
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
  };
  Buffer few(Dtype::F32, {2, 4, 8});
  value_or_throw(write_npz(folder + "/few.npz", {{"mean", few}}));
  refused("@" + folder + "/few.npz", "[2, 4, 16]");
  refused("@" + folder + "/a_file_with_a_name_of_more_than_forty_characters.npz", "heed_query_stats");
  refused("own.npz", "names no file");
  if (model->info().hash != 0) {
    Buffer hash(Dtype::U64, {1});
    *hash->as<uint64_t>() = model->info().hash + 1;
    value_or_throw(write_npz(folder + "/other.npz", {{"model", hash}}));
    refused("@" + folder + "/other.npz", "another model");
  }
  SessionOptions none;
  none.attention = "expected-attention-stats", none.backend = "reference";
  EXPECT_THROW(Session(model, none), Error);
}

// On a real model: what is learnt on one text serves another one about as well as that one's own statistics.
TEST(QueryStats, ServeARealModel) {
  const std::string path = std::string(HEED_MODELS) + "/smollm2-135m.gguf",
                    book = std::string(HEED_MODELS) + "/text.txt";
  if (!std::filesystem::exists(path) || !std::filesystem::exists(book)) GTEST_SKIP() << "no model";
  const std::shared_ptr<const Model> model = value_or_throw(Model::load(path));
  const auto ids = model->tokenizer()->encode(value_or_throw(read_file(book)).substr(0, 12000));
  ASSERT_GT(ids.size(), 2200u);
  QueryStatsOptions options;
  options.length = 256, options.texts = 4;
  const QueryStats stats = learn_query_stats(model, std::span(ids).first(1024), options);
  const std::string folder = testing::TempDir() + "/heed_query_stats_real";
  std::filesystem::create_directories(folder);
  const auto profile = query_stats_profile(stats_spec("expected-attention-stats(budget=30%)"), model->info(), stats,
                                           folder + "/own.npz", "own.npz");
  value_or_throw(write_file(folder + "/own.json", profile.dump()));
  const auto loss = [&](const std::string& attention) {
    SessionOptions o;
    o.attention = attention;
    Session session(model, o);
    const std::span<const int32_t> part = std::span(ids).subspan(1024, 640);
    Tensor logits = session.prefill(part.first(512));
    double sum = 0;
    for (size_t i = 512; i < part.size(); ++i) {
      const float* x = logits.as<float>();
      const float most = *std::max_element(x, x + logits.numel());
      double total = 0;
      for (int64_t c = 0; c < logits.numel(); ++c) total += std::exp(double(x[c]) - double(most));
      sum += std::log(total) + double(most) - double(x[part[i]]);
      logits = session.decode(part[i]);
    }
    return sum / double(part.size() - 512);
  };
  const double dense = loss("dense"), own = loss("expected-attention(budget=30%)"),
               learnt = loss("@" + folder + "/own.json"), random = loss("random(budget=30%,sinks=4)");
  RecordProperty("losses", "dense " + std::to_string(dense) + ", own " + std::to_string(own) + ", learnt " +
                               std::to_string(learnt) + ", random " + std::to_string(random));
  std::printf("dense %.4f, its own statistics %.4f, learnt ones %.4f, random %.4f\n", dense, own, learnt, random);
  EXPECT_GT(learnt, dense - 0.05);
  EXPECT_LT(learnt, random);
  EXPECT_LT(learnt, own + 0.3);
}

}  // namespace
}  // namespace heed
