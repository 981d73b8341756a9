// What an evaluation keeps and how it counts: samples' files, intervals, continuations, LongBench's files.
#include "lab/samples.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>

#include "apps/tiny_model.h"
#include "lab/agreement.h"
#include "lab/interval.h"
#include "lab/longbench.h"
#include "lab/position.h"
#include "lab/questions.h"
#include "lab/score.h"

namespace heed {
namespace {

using Json = SampleFile::Json;

class Samples : public testing::Test {
 protected:
  Samples() : path_((std::filesystem::temp_directory_path() / ("samples-" + std::to_string(getpid()))).string()) {
    std::filesystem::remove(path_);
  }
  ~Samples() override { std::filesystem::remove(path_); }
  void write(const std::string& bytes) const { std::ofstream(path_, std::ios::binary) << bytes; }
  std::string read() const {
    std::ifstream in(path_, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  static Json key(int index) {
    return {{"model", "m"}, {"attention", "dense"}, {"task", "vt"}, {"length", 64}, {"seed", 1}, {"index", index}};
  }
  static Json result(double score) {
    return {{"answer", "x\n"}, {"score", score}, {"chance", 0}, {"tokens", 9}, {"density", 1}};
  }
  std::string path_;
};

TEST_F(Samples, AreFoundAgainByAllOfTheirKey) {
  {
    SampleFile file(path_);
    file.add(key(0), result(0.25));
    file.add(key(1), result(1));
    EXPECT_EQ((*file.find(key(0)))["score"], 0.25);
  }
  SampleFile file(path_);
  ASSERT_NE(file.find(key(1)), nullptr);
  EXPECT_EQ((*file.find(key(1)))["score"], 1);
  EXPECT_EQ(file.find(key(2)), nullptr);
  for (const char* field : {"model", "attention", "task"}) {
    Json other = key(1);
    other[field] = "another";
    EXPECT_EQ(file.find(other), nullptr) << field;
  }
  for (const char* field : {"length", "seed"}) {
    Json other = key(1);
    other[field] = 77;
    EXPECT_EQ(file.find(other), nullptr) << field;
  }
  Json deeper = key(1);
  deeper["depth"] = 0.5;
  EXPECT_EQ(file.find(deeper), nullptr);
}

TEST_F(Samples, AnUnfinishedLineIsMadeAgain) {
  SampleFile(path_).add(key(0), result(1));
  const std::string whole = read();
  for (size_t cut : {size_t(1), size_t(20), whole.size() - 2}) {
    write(whole + whole.substr(0, cut));
    SampleFile file(path_);
    EXPECT_NE(file.find(key(0)), nullptr);
    EXPECT_EQ(read(), whole);
    file.add(key(1), result(0));
    SampleFile again(path_);
    EXPECT_NE(again.find(key(1)), nullptr);
  }
}

TEST_F(Samples, WhatIsNoSampleIsRefusedByLine) {
  SampleFile(path_).add(key(0), result(1));
  const std::string good = read();
  Json huge = key(1);
  huge.update(result(2));
  const std::vector<std::string> bad = {
      "\n",
      "null\n",
      "[]\n",
      "{}\n",
      "\"text\"\n",
      "{\"model\": 1}\n",
      "\xff\xfe\n",
      std::string(3, '\0') + "\n",
      "not ended",
      huge.dump() + "\n",
      std::string(100000, '[') + "\n",
      "{\"model\":\"m\",\"task\":\"t\",\"answer\":\"a\",\"index\":0,\"score\":\"1\"}\n"};
  for (const std::string& line : bad) {
    write(good + line + (line.back() == '\n' ? good : ""));
    try {
      SampleFile file(path_);
      ADD_FAILURE() << line.substr(0, 40);
    } catch (const Error& e) {
      EXPECT_EQ(e.failure().exit_status(), 2);
      EXPECT_NE(std::string(e.what()).find(path_ + ":2"), std::string::npos) << e.what();
    }
  }
  write("");
  EXPECT_EQ(SampleFile(path_).find(key(0)), nullptr);
}

// Newcombe (1998), table I: 81 of 263 and 0 of 20 and 1 of 29.
TEST(Interval, WilsonIsThePublishedOne) {
  const Interval a = wilson(81.0 / 263, 263), b = wilson(0, 20), c = wilson(1.0 / 29, 29);
  EXPECT_NEAR(a.low, 0.2553, 5e-5);
  EXPECT_NEAR(a.high, 0.3662, 5e-5);
  EXPECT_EQ(b.low, 0);
  EXPECT_NEAR(b.high, 0.1611, 5e-5);
  EXPECT_NEAR(c.low, 0.0061, 5e-5);
  EXPECT_NEAR(c.high, 0.1718, 5e-5);
  EXPECT_EQ(wilson(1, 5).high, 1);
  EXPECT_EQ(wilson(0, 0).high, 1);
}

TEST(Interval, ResampledMeansSpreadAsTheTheorySays) {
  Random random(4);
  std::vector<double> scores;
  for (int i = 0; i < 400; ++i) scores.push_back(double(random.below(5)) / 4);
  const Interval boot = score_interval(scores), normal = normal_interval(scores);
  EXPECT_STREQ(boot.method, "bootstrap");
  EXPECT_NEAR(boot.low, normal.low, 0.005);
  EXPECT_NEAR(boot.high, normal.high, 0.005);
  EXPECT_EQ(score_interval(scores).low, boot.low);
  EXPECT_STREQ(score_interval(std::vector<double>{1, 0, 1}).method, "wilson");
  EXPECT_STREQ(score_interval(std::vector<double>{0.5, 0.5}).method, "wilson");
  // 2, 4, 4, 4, 5, 5, 7, 9: mean 5, standard deviation (n − 1) 2.138.
  const Interval known = normal_interval(std::vector<double>{2, 4, 4, 4, 5, 5, 7, 9});
  EXPECT_NEAR(known.high - 5, 1.96 * 2.13809 / std::sqrt(8.0), 1e-3);
}

TEST(Agreement, CountsUpToAndBehindTheFirstDifference) {
  using Tokens = std::vector<int32_t>;
  const Agreement same = agreement(Tokens{1, 2, 3}, Tokens{1, 2, 3}),
                  some = agreement(Tokens{1, 2, 3, 4, 5}, Tokens{1, 9, 3, 8, 5});
  EXPECT_EQ(same.first_difference, 3);
  EXPECT_EQ(same.before, 1);
  EXPECT_EQ(same.after, 1);
  EXPECT_EQ(some.first_difference, 1);
  EXPECT_DOUBLE_EQ(some.before, 0.2);
  EXPECT_DOUBLE_EQ(some.after, 0.5);
  EXPECT_EQ(agreement(Tokens{1}, Tokens{2}).after, 0);
  EXPECT_THROW(agreement(Tokens{1}, Tokens{}), Error);
}

std::shared_ptr<const Model> tiny() {
  static const auto model = [] {
    const std::string path = (std::filesystem::temp_directory_path() / ("tiny-" + std::to_string(getpid()) + ".gguf")).string();
    TinyModel().write(path);
    auto out = value_or_throw(Model::load(path));
    std::filesystem::remove(path);
    return out;
  }();
  return model;
}

std::vector<int32_t> some_text(int count) {
  Random random(2);
  std::vector<int32_t> out;
  for (int i = 0; i < count; ++i) out.push_back(int32_t(random.below(200)));
  return out;
}

TEST(Agreement, DenseAgreesWithItselfAndAShortWindowDoesNot) {
  const auto text = some_text(60);
  SessionOptions options;
  EXPECT_EQ(generation_agreement(tiny(), options, text, 20).first_difference, 20);
  options.attention = "streaming-llm(sinks=1,window=3)";
  EXPECT_LT(generation_agreement(tiny(), options, text, 20).first_difference, 20);
}

TEST(Position, ScoresEveryTokenOnceWhereItStands) {
  const auto text = some_text(70);
  const auto parts = loss_by_position(tiny(), {}, text, 32, -1, 4);
  ASSERT_EQ(parts.size(), 4u);
  Session session(tiny(), {});
  std::vector<double> losses;
  Tensor logits = session.prefill(std::span(text).first(1));
  for (size_t i = 1; i < 32; ++i) {
    losses.push_back(nll(logits.select(0, 0).span<const float>(), text[i]));
    logits = session.decode(text[i]);
  }
  for (size_t b = 0; b < 4; ++b) {
    EXPECT_EQ(parts[b].losses.size(), b == 0 ? 14u : 16u);
    for (int64_t i = std::max<int64_t>(1, parts[b].first); i < parts[b].end; ++i)
      EXPECT_NEAR(parts[b].losses[size_t(i - std::max<int64_t>(1, parts[b].first))], losses[size_t(i - 1)], 0.03);
  }
  EXPECT_THROW(loss_by_position(tiny(), {}, text, 80, -1, 4), Error);
}

// A question is answered alike whether or not it was there when dense attention read the context.
TEST(Ask, DenseAnswersBlindAsItDoesAware) {
  const auto text = some_text(50), question = some_text(9);
  std::vector<int32_t> said[2];
  for (const Query query : {Query::Aware, Query::Blind}) {
    Session session(tiny(), {});
    const Answer a = answer(session, ask(session, text, question, query), 12, false);
    said[int(query)] = a.tokens;
    EXPECT_EQ(session.tokens().size(), 50u + 9 + a.tokens.size() - (a.tokens.size() == 12));
  }
  EXPECT_EQ(said[0], said[1]);
}

TEST(Ask, ABlindMechanismCutsBeforeTheQuestion) {
  SessionOptions options;
  options.attention = "snapkv(budget=16,window=4)";
  const auto text = some_text(60), question = some_text(9);
  for (const Query query : {Query::Aware, Query::Blind}) {
    Session session(tiny(), options);
    std::vector<int64_t> held;  // by KV head 0 of layer 0 when a prompt or chunk arrives
    session.tap([&](LayerView& at) {
      if (at.layer == 0 && at.phase != Phase::Decode) held.push_back(at.k.length(0) - at.q.length(0));
    });
    ask(session, text, question, query);
    EXPECT_EQ(held, query == Query::Aware ? std::vector<int64_t>{0} : (std::vector<int64_t>{0, 16}));
  }
}

TEST_F(Samples, TasksGoOnAndAskNothingTwice) {
  const auto words = *tiny()->tokenizer();
  int64_t made = 0;
  const auto make = [&](int64_t index) {
    ++made;
    Question q;
    q.context = words.encode("the ship " + std::to_string(index)), q.question = words.encode(" is"), q.limit = 4,
    q.chance = 0.25;
    q.score = [index](const std::string&) { return double(index % 2); };
    return q;
  };
  const TaskRow what{.task = "t", .metric = "m", .query = Query::Aware, .length = 64};
  {
    SampleFile file(path_);
    const TaskRow row = run_task(tiny(), {}, what, 3, file, {{"model", "m"}}, make);
    EXPECT_EQ(row.scores, (std::vector<double>{0, 1, 0}));
    EXPECT_EQ(row.chance, 0.25);
    EXPECT_TRUE(row.at_chance());
    EXPECT_EQ(row.density, 1);
  }
  EXPECT_EQ(made, 3);
  SampleFile file(path_);
  EXPECT_EQ(run_task(tiny(), {}, what, 5, file, {{"model", "m"}}, make).scores.size(), 5u);
  EXPECT_EQ(made, 5);
  interrupt();
  const TaskRow stopped = run_task(tiny(), {}, what, 9, file, {{"model", "m"}}, make);
  clear_interrupt();
  EXPECT_TRUE(stopped.interrupted);
  EXPECT_EQ(stopped.scores.size(), 5u) << "what was finished counts";
  EXPECT_EQ(made, 5);
}

TEST(LongBench, ReadsItsFields) {
  const auto items = value_or_throw(
      read_longbench("\n{\"input\": \"q\", \"context\": \"c\", \"answers\": [\"a\", \"b\"], \"all_classes\": null, "
                     "\"x\": 1}\r\n\n{\"input\":\"\",\"context\":\"\",\"answers\":[\"z\"],\"all_classes\":[\"z\"]}",
                     "f"));
  ASSERT_EQ(items.size(), 2u);
  EXPECT_EQ(items[0].answers, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(items[1].classes, (std::vector<std::string>{"z"}));
  for (const char* bad :
       {"", "\n \n", "{", "[]", "null", "{\"input\": 1, \"context\": \"\", \"answers\": [\"a\"]}",
        "{\"input\": \"\", \"context\": \"\", \"answers\": []}",
        "{\"input\": \"\", \"context\": \"\", \"answers\": [1]}", "{\"input\": \"\", \"answers\": [\"a\"]}",
        "{\"input\": \"\", \"context\": \"\", \"answers\": \"a\"}",
        "{\"input\": \"\", \"context\": \"\", \"answers\": [\"a\"], \"all_classes\": \"a\"}", "\xff"}) {
    const auto result = read_longbench(bad, "file.jsonl");
    ASSERT_FALSE(result) << bad;
    EXPECT_EQ(result.error().exit_status(), 2);
    EXPECT_EQ(result.error().where.rfind("file.jsonl", 0), 0u);
  }
}

TEST(LongBench, CutsTheMiddleOfAContextThatIsTooLong) {
  const Tokenizer& words = *tiny()->tokenizer();
  LongBenchItem item{"{context}?", std::string(300, 'a') + std::string(300, 'b'), {"yes", "no"}, {}};
  const Metric& metric = *longbench_metric("qa_f1");
  const std::string form = "Read: {context}\nQ: {input}\nA:";
  const Question whole = longbench_question(item, metric, words, form, 1000, 20),
                 cut = longbench_question(item, metric, words, form, 200, 20);
  EXPECT_EQ(whole.prompt, "Read: " + item.context + "\nQ: {context}?\nA:");
  EXPECT_EQ(words.decode(whole.context) + words.decode(whole.question), whole.prompt);
  EXPECT_EQ(int64_t(cut.context.size() + cut.question.size()), 180);
  EXPECT_EQ(cut.prompt.rfind("Read: aaa", 0), 0u);
  EXPECT_NE(cut.prompt.find("ab"), std::string::npos);
  EXPECT_NE(cut.prompt.find("b\nQ: {context}?\nA:"), std::string::npos);
  EXPECT_EQ(cut.score("No."), 1);
  EXPECT_EQ(cut.score("maybe"), 0);
  EXPECT_THROW(longbench_question(item, metric, words, "no place", 1000, 20), Error);
  EXPECT_THROW(longbench_question(item, metric, words, "{input}{context}", 1000, 20), Error);
  EXPECT_THROW(longbench_question(item, metric, words, form, 30, 20), Error);
  for (const Metric& m : longbench_metrics())
    EXPECT_NO_THROW(longbench_question(item, m, words, longbench_template(m), 1000, 20)) << m.name;
}

}  // namespace
}  // namespace heed
