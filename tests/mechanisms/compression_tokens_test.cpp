// Tokens that stand for others (gists, beacons): masks against explicit ones, and caches from which what nobody sees any
// more has gone against one pass over everything.
#include <filesystem>

#include "keep_case.h"
#include "mechanisms/registry.h"
#include "session_case.h"

namespace heed::test {
namespace {

class CompressionTokens : public Mechanisms {};
HEED_ON_ALL_SETTINGS(CompressionTokens);

TEST_P(CompressionTokens, GistsHideWhatStandsBeforeThem) {
  for (const auto& [s, first, count] : {std::tuple{shape(90, 90), 30, 3},
                                        {shape(40, 75), 50, 1},
                                        {shape(40, 75), 20, 4},
                                        {shape(60, 60), 0, 2},
                                        {shape(60, 60), 57, 3}}) {
    const Case c(s, 3);
    Buffer marks = Buffer::zeros(Dtype::F32, {s.m});
    for (int64_t j = first; j < first + count; ++j) marks->as<float>()[j] = 1;
    ApplyInput in = c.input(backend());
    in.inputs["marks"] = marks;
    const std::string spec = "gist(count=" + std::to_string(count) + ")";
    const ApplyOutput out = Case::run(spec, in);
    const int64_t last = first + count - 1;
    EXPECT_LT(
        c.error(out, [&, from = first](int64_t, int64_t i, int64_t j) { return j >= from || c.first() + i <= last; }), kExact)
        << spec;
    std::vector<int32_t> expected;
    for (int64_t j = first; j < s.m; ++j) expected.push_back(int32_t(j));
    for (const auto& list : lists(out, "kept")) EXPECT_EQ(list, expected) << spec;
    // As many marks as gists are wanted, or nothing is hidden.
    const ApplyOutput too_few = Case::run("gist(count=" + std::to_string(count + 1) + ")", in);
    EXPECT_LT(c.dense_error(too_few), kExact);
    for (const auto& list : lists(too_few, "kept")) EXPECT_EQ(list, all_of(s.m));
  }
}

TEST_P(CompressionTokens, BeaconsStandForTheirWindow) {
  for (const auto& [s, window, ratio] : {std::tuple{shape(100, 100), 12, 4},
                                         {shape(100, 100), 6, 1},
                                         {shape(33, 80), 16, 2},
                                         {shape(54, 54), 9, 9},
                                         {shape(20, 20), 64, 8},
                                         {shape(1, 1), 4, 2}}) {
    const Case c(s, 4);
    const int64_t whole = window + window / ratio;
    const auto beacon = [&, ratio = ratio](int64_t j) { return j % whole % (ratio + 1) == ratio; };
    const std::string spec = "activation-beacon(window=" + std::to_string(window) + ",ratio=" + std::to_string(ratio) +
                             ")";
    const ApplyOutput out = c.run(spec, backend());
    EXPECT_LT(
        c.error(out, [&](int64_t, int64_t i, int64_t j) { return beacon(j) || j / whole == (c.first() + i) / whole; }), kExact)
        << spec;
    std::vector<int32_t> expected;
    for (int64_t j = 0; j < s.m; ++j)
      if (beacon(j) || j / whole >= s.m / whole) expected.push_back(int32_t(j));
    for (const auto& list : lists(out, "kept")) EXPECT_EQ(list, expected) << spec;
  }
}

/// Logits of all tokens, fed as a prompt in parts and then one by one.
std::vector<float> fed(const std::shared_ptr<const Model>& model, const std::string& spec, int64_t prompt,
                       int64_t chunk, const std::vector<std::vector<int32_t>>& texts) {
  SessionOptions o = in_f32(spec, chunk);
  o.backend = backend_or("cpu"), o.sequences = int(texts.size());
  Session session(model, o);
  std::vector<float> out;
  std::vector<std::span<const int32_t>> parts;
  for (const auto& t : texts) parts.push_back(std::span(t).first(size_t(prompt)));
  auto take = [&](const Tensor& t) { out.insert(out.end(), t.as<float>(), t.as<float>() + t.numel()); };
  take(session.prefill(parts));
  for (size_t i = size_t(prompt); i < texts[0].size(); ++i) {
    std::vector<int32_t> next;
    for (const auto& t : texts) next.push_back(t[i]);
    take(session.decode(next));
  }
  return out;
}
/// The last `tokens` tokens' logits of a single pass under a mask, from which nothing goes.
std::vector<float> masked(const std::shared_ptr<const Model>& model, const std::string& spec, int64_t prompt,
                          const std::vector<std::vector<int32_t>>& texts) {
  std::vector<float> out;
  const int64_t vocabulary = model->info().vocabulary;
  std::vector<std::vector<float>> rows;
  for (const auto& t : texts) {
    SessionOptions o = in_f32(spec);
    o.backend = backend_or("cpu");
    Session session(model, o);
    const Tensor all = session.prefill(std::span<const int32_t>(t), Session::Logits::All);
    rows.emplace_back(all.as<float>() + (prompt - 1) * vocabulary, all.as<float>() + int64_t(t.size()) * vocabulary);
  }
  for (int64_t i = 0; i * vocabulary < int64_t(rows[0].size()); ++i)
    for (const auto& r : rows) out.insert(out.end(), r.begin() + i * vocabulary, r.begin() + (i + 1) * vocabulary);
  return out;
}

TEST(CompressionTokensInSessions, ACacheGivesWhatOneMaskedPassGives) {
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}}) {
    const auto model = tiny_model(h, g);
    std::vector<std::vector<int32_t>> texts{text(80, 1), text(80, 2)};
    for (auto& t : texts)
      for (int32_t& id : t) id = id == 60 ? 59 : id;
    const auto dense = fed(model, "dense", 70, 0, texts);
    texts[0][30] = texts[0][31] = 60, texts[1][50] = texts[1][51] = 60;
    for (const char* spec : {"gist(token=60,count=2)", "activation-beacon(window=12,ratio=3)",
                             "activation-beacon(window=12,ratio=3,when=every(5))"})
      for (const int64_t chunk : {0, 16, 7}) {
        const auto whole = masked(model, spec, 70, texts), cached = fed(model, spec, 70, chunk, texts);
        EXPECT_LT(distance(whole, cached), 2e-4) << spec << " in parts of " << chunk;
        EXPECT_GT(distance(whole, dense), 1e-3) << spec;
      }
    const auto early = fed(model, "gist(token=60,count=2,when=chunk)", 70, 9, texts);
    EXPECT_LT(distance(masked(model, "gist(token=60,count=2)", 70, texts), early), 2e-4);
  }
}

// A model that was not trained for it forgets what is hidden, but a cache and a masked pass forget the same.
TEST(CompressionTokensInSessions, ARealModelsCacheGivesWhatOneMaskedPassGives) {
  const std::string path = std::string(HEED_MODELS) + "/smollm2-135m.gguf";
  if (!std::filesystem::exists(path)) GTEST_SKIP() << "models/smollm2-135m.gguf is not there";
  const std::shared_ptr<const Model> model = value_or_throw(Model::load(path));
  std::string story;
  for (const char* part :
       {"The keeper climbed the stairs every evening. ", "At the top he lit the lamp and wound the clock. ",
        "Ships passed in the night, and he never looked. ", "His daughter brought bread and the news. "})
    story += part + story;
  std::vector<int32_t> ids = model->tokenizer()->encode(story);
  ASSERT_GT(ids.size(), 130u);
  ids.resize(130);
  const int32_t gist = 7;
  std::replace(ids.begin(), ids.end(), gist, gist + 1);
  ids[60] = ids[61] = gist;
  for (const char* spec : {"gist(token=7,count=2)", "activation-beacon(window=32,ratio=4)"}) {
    SessionOptions o;
    o.attention = spec, o.backend = backend_or("auto");
    const auto probabilities = [&](const Tensor& logits, int64_t row) {
      std::vector<double> p;
      double sum = 0;
      const float *x = logits.as<float>() + row * logits.size[1], most = *std::max_element(x, x + logits.size[1]);
      for (int64_t c = 0; c < logits.size[1]; ++c) sum += p.emplace_back(std::exp(double(x[c]) - double(most)));
      for (double& v : p) v /= sum;
      return p;
    };
    Session whole(model, o);
    const Tensor all = whole.prefill(std::vector{std::span<const int32_t>(ids)}, Session::Logits::All);
    o.chunk = 25;
    Session cached(model, o);
    cached.prefill(std::span<const int32_t>(ids).first(120));
    double kld = 0;
    for (int64_t i = 120; i < 130; ++i) {
      const auto p = probabilities(all, i), q = probabilities(cached.decode(ids[size_t(i)]), 0);
      for (size_t c = 0; c < p.size(); ++c)
        if (p[c] > 0) kld += p[c] * std::log(p[c] / q[c]) / 10;
    }
    EXPECT_LT(kld, 0.01) << spec;
    EXPECT_LT(cached.store().layer(3).length(0), 80) << spec;
  }
}

TEST(CompressionTokensInSessions, BadSpecsAreRefused) {
  const ModelInfo m;
  for (const char* spec :
       {"activation-beacon(window=10,ratio=3)", "gist(when=every(2))", "gist(token=-2)", "gist+snapkv"})
    EXPECT_FALSE(Composition::parse(spec, m, registry())) << spec;
}

}  // namespace
}  // namespace heed::test
