// RULER's prompts against its published rules, read back from the prompt's text alone.
#include "lab/ruler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <map>
#include <regex>
#include <set>

#include "apps/tiny_model.h"
#include "model/gguf.h"

namespace heed {
namespace {

std::string made_word(int64_t number) {
  std::string out;
  for (int i = 0; i < 5; ++i, number /= 7) out += char('a' + (number * 5 + i * 3) % 26);
  return out;
}

/// Prose of 3000 sentences, and a dictionary whose entries refer to one another.
const RulerText& book() {
  static const RulerText text = [] {
    Random random(9);
    std::string out = "Chapter 1\n\n";
    for (int paragraph = 0; paragraph < 300; ++paragraph) {
      for (int sentence = 0; sentence < 10; ++sentence) {
        out += "So";
        for (int w = 0; w < 8; ++w) out += " " + made_word(random.below(400));
        out += sentence % 3 ? ". " : "?\n   ";
      }
      out += "\n\n";
    }
    for (int i = 0; i < 200; ++i)
      out += "   :thing" + std::to_string(i) + ": /pron/ n.\n\n   1. [old] A " + made_word(i * 11 + 7) + " " +
             made_word(i * 3 + 5) + " " + made_word(i * 17 + 1) + " that is {known} well. See {thing" +
             std::to_string((i * 7 + 3) % 200) + "}.\n\n   More about it.\n\n";
    return RulerText::from(out);
  }();
  return text;
}

/// A byte a token, or nearly.
const Tokenizer& bytes() {
  static const Tokenizer words = [] {
    const std::string path = (std::filesystem::temp_directory_path() / ("ruler-" + std::to_string(getpid()) + ".gguf")).string();
    TinyModel().write(path);
    Tokenizer out = value_or_throw(Tokenizer::from(value_or_throw(Gguf::open(path))));
    std::filesystem::remove(path);
    return out;
  }();
  return words;
}

RulerSample sample(const char* task, int64_t length, int64_t index, RulerOptions options = {}, uint64_t seed = 3) {
  return ruler_sample(*ruler_task(task), bytes(), length, seed, index, book(), options);
}

std::vector<std::smatch> matches(const std::string& text, const std::regex& pattern) {
  return {std::sregex_iterator(text.begin(), text.end(), pattern), {}};
}

std::map<std::string, int> counts(const std::vector<std::string>& words) {
  std::map<std::string, int> out;
  for (const std::string& w : words) ++out[w];
  return out;
}

std::set<std::string> as_set(const std::vector<std::string>& list) { return {list.begin(), list.end()}; }

TEST(RulerText, FindsProseAndEntries) {
  const RulerText text = RulerText::from(
      "Chapter 1. A Title That Is Long Enough To Count As Eight\n\n   automagically\n\n"
      "   This is prose of {more} than eight words. Is it not? (It is.)\n\n"
      "   :awk: /awk/\n\n   1. n. [Unix techspeak] An interpreted language for massaging text data. It has {foo bar} "
      "and\n   {Grep-Like} tools.\n\n"
      "   :grep-like: adj.\n\n   Like the tool of that name, whatever it may do.\n\n"
      "   :empty: n.\n\n   :too short: n. Two words.\n\n   :selfish: n. A selfish thing is what this is called "
      "here.\n\n   :awk: n. A second one that does not count at all.\n");
  ASSERT_GT(text.words.size(), 12u);
  EXPECT_EQ(text.words[0] + " " + text.words[1], "This is");
  std::vector<std::string> ends;
  for (size_t i = 0; i < 12; ++i)
    if (text.sentence_end[i]) ends.push_back(text.words[i]);
  EXPECT_EQ(ends, (std::vector<std::string>{"words.", "not?"}));
  ASSERT_EQ(text.entries.size(), 1u);  // three letters are too few for a term, and others break a rule
  EXPECT_EQ(text.entries[0].term, "grep-like");
  EXPECT_EQ(text.entries[0].definition, "Like the tool of that name, whatever it may do.");
  EXPECT_EQ(text.entries[0].refers, "");
  EXPECT_TRUE(RulerText::from("").words.empty());
  EXPECT_TRUE(RulerText::from("::::\n\n:\n\n:a:\n\n:::: ").entries.empty());
}

TEST(RulerText, ReferencesLeadToEntries) {
  const auto& entries = book().entries;
  ASSERT_EQ(entries.size(), 200u);
  EXPECT_EQ(entries[4].refers, "thing31");
  EXPECT_EQ(entries[4].definition.rfind("A ", 0), 0u);
  EXPECT_NE(entries[4].definition.find(" that is known well."), std::string::npos);
}

TEST(Ruler, FillsTheLengthAndNoMore) {
  for (const RulerTask& task : ruler_tasks())
    for (int64_t length : {7000, 12000})
      for (bool example : {false, true}) {
        const RulerSample s = ruler_sample(task, bytes(), length, 1, length, book(), {.example = example});
        const int64_t tokens = int64_t(bytes().encode(s.context).size() + bytes().encode(s.question).size());
        EXPECT_EQ(tokens, s.tokens()) << task.name;
        EXPECT_LE(tokens + task.limit, length) << task.name;
        EXPECT_GE(tokens + task.limit, length - 400) << task.name << ": a unit of the haystack would have fitted";
        EXPECT_FALSE(s.expected.empty());
        EXPECT_GE(s.chance, 0);
        EXPECT_LT(s.chance, 0.6);
      }
}

TEST(Ruler, SampleDependsOnNothingElse) {
  for (const RulerTask& task : ruler_tasks()) {
    const char* name = task.name.c_str();
    const RulerSample a = sample(name, 7000, 4);
    sample(name, 8000, 1);
    const RulerSample b = sample(name, 7000, 4);
    EXPECT_EQ(a.context, b.context);
    EXPECT_EQ(a.question, b.question);
    EXPECT_NE(a.expected, sample(name, 7000, 5).expected) << name;
    EXPECT_NE(a.expected, sample(name, 7000, 4, {}, 4).expected) << name;
    EXPECT_NE(a.expected, sample(name, 7000, 3, {}, 4).expected)
        << name << ": streams of neighbouring seeds must not overlap";
  }
}

TEST(Ruler, NeedlesAreThereOnceAndOnlyThoseAskedForAreExpected) {
  const std::regex needle(R"(One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.)");
  const std::regex number("[1-9][0-9]{6}"), uuid("[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"),
      pair("[a-z]+-[a-z]+");
  for (const RulerTask& task : ruler_tasks()) {
    if (task.kind != RulerTask::Kind::Needle) continue;
    for (int64_t index = 0; index < 3; ++index) {
      const RulerSample s = sample(task.name.c_str(), 8000, index);
      std::map<std::string, std::vector<std::string>> by_key;
      std::set<std::string> values;
      for (const auto& m : matches(s.context, needle)) {
        by_key[m[2]].push_back(m[3]);
        EXPECT_TRUE(values.insert(m[3]).second) << "a value twice";
        EXPECT_TRUE(std::regex_match(m[3].str(), task.value == RulerTask::Item::Uuid ? uuid : number)) << m[3];
        EXPECT_TRUE(std::regex_match(m[2].str(), task.key == RulerTask::Item::Uuid ? uuid : pair)) << m[2];
      }
      const int keys = std::max(task.keys, task.queries) + (task.haystack == RulerTask::Haystack::Needles ? s.units : 0);
      EXPECT_EQ(int(by_key.size()), keys) << task.name;
      std::vector<std::string> right;
      const std::string query = s.question.substr(s.question.rfind(" for ") + 5);
      for (const auto& [key, of] : by_key) {
        EXPECT_EQ(int(of.size()), task.values);
        if ((" " + query).find(" " + key) != std::string::npos) right.insert(right.end(), of.begin(), of.end());
      }
      EXPECT_EQ(as_set(right), as_set(s.expected)) << task.name << query;
      EXPECT_EQ(int(s.expected.size()), task.queries * task.values);
      EXPECT_EQ(s.question.find(s.expected[0]), std::string::npos) << "the answer is given away";
    }
  }
}

TEST(Ruler, NeedleLiesAtTheDepthAskedFor) {
  for (const char* task : {"niah_single_1", "niah_single_2", "niah_multikey_2"})
    for (double depth : {0.0, 0.25, 0.5, 0.9, 1.0}) {
      const RulerSample s = sample(task, 20000, 1, {.example = true, .depth = depth});
      const size_t from = s.context.rfind(" afterwards.\n") + 13, at = s.context.find(s.expected[0], from);
      ASSERT_NE(at, std::string::npos);
      EXPECT_NEAR(double(at - from) / double(s.context.size() - from), depth, 0.01) << task;
    }
  EXPECT_THROW(sample("niah_multivalue", 8000, 0, {.depth = 0.5}), Error);
  EXPECT_THROW(sample("vt", 8000, 0, {.depth = 0.5}), Error);
}

// Needles of one prompt lie at different places, over all of the text.
TEST(Ruler, DrawnDepthsCoverTheText) {
  double low = 1, high = 0;
  for (int64_t index = 0; index < 40; ++index) {
    const RulerSample s = sample("niah_single_2", 4000, index);
    const double depth = double(s.context.find(s.expected[0])) / double(s.context.size());
    low = std::min(low, depth), high = std::max(high, depth);
  }
  EXPECT_LT(low, 0.15);
  EXPECT_GT(high, 0.85);
}

TEST(Ruler, ChainsResolve) {
  for (int64_t index = 0; index < 5; ++index) {
    const RulerSample s = sample("vt", 6000, index);
    // A little interpreter: assignments in the order in which they stand.
    std::map<std::string, std::string> value;
    for (const auto& m : matches(s.context, std::regex(R"(VAR ([A-Z]+) = (VAR )?(\w+)\n)"))) {
      EXPECT_FALSE(value.contains(m[1])) << "assigned twice";
      if (m[2].matched) { ASSERT_TRUE(value.contains(m[3])) << "used before it is assigned"; }
      value[m[1]] = m[2].matched ? value[m[3]] : m[3].str();
    }
    const std::string asked = std::regex_replace(s.question, std::regex(R"(^[^0-9]*([0-9]{5})[^]*$)"), "$1");
    std::set<std::string> right;
    for (const auto& [name, v] : value)
      if (v == asked) right.insert(name);
    EXPECT_EQ(right, as_set(s.expected));
    EXPECT_EQ(s.expected.size(), 5u);
    EXPECT_EQ(value.size(), 10u) << "the example has a chain of its own";
    EXPECT_NE(s.question.find(" 5 variables"), std::string::npos);
  }
}

std::vector<std::string> numbered(const std::string& text) {
  std::vector<std::string> words;
  for (const auto& m : matches(text, std::regex(R"((\d+)\. (\S+))"))) {
    EXPECT_EQ(std::stoul(m[1]), words.size() + 1);
    words.push_back(m[2]);
  }
  return words;
}

TEST(Ruler, CommonWordsAreTheTenMostCommon) {
  for (int64_t length : {3000, 12000}) {
    const RulerSample s = sample("cwe", length, 2);
    const std::string opening = "the ones that appear most often.\n";
    const size_t list = s.context.rfind(opening) + opening.size(), example = s.context.find(opening) + opening.size();
    ASSERT_LT(example, list);
    const auto all = counts(numbered(s.context.substr(list)));
    EXPECT_EQ(int(all.size()), s.units);
    const std::set<std::string> right = as_set(s.expected);
    EXPECT_EQ(right.size(), 10u);
    for (const auto& [word, times] : all)
      EXPECT_EQ(times, right.contains(word) ? (length < 4096 ? 6 : 30) : (length < 4096 ? 1 : 3)) << word;
    for (const std::string& word : s.expected) EXPECT_TRUE(all.contains(word));
    // The example is answered rightly, with other words.
    const size_t asked = s.context.find("\nQuestion:", example), said = s.context.find("are: ", asked) + 4;
    const auto shown = counts(numbered(s.context.substr(example, asked - example)));
    const auto answers = numbered(s.context.substr(said, s.context.find('\n', said) - said));
    EXPECT_EQ(answers.size(), 10u);
    for (const auto& [word, times] : shown) {
      const bool common = as_set(answers).contains(word);
      EXPECT_EQ(times, common ? (length < 4096 ? 3 : 10) : (length < 4096 ? 1 : 3));
      EXPECT_FALSE(all.contains(word));
    }
  }
}

TEST(Ruler, FrequentWordsFollowTheZetaDistribution) {
  for (int64_t length : {2000, 12000}) {
    const RulerSample s = sample("fwe", length, 2);
    const std::string opening = "coded words. ";
    std::vector<std::string> words;
    const std::string list = s.context.substr(s.context.find(opening) + opening.size());
    for (const auto& m : matches(list, std::regex(R"(\S+)"))) words.push_back(m[0]);
    const auto all = counts(words);
    std::vector<std::pair<int, std::string>> ranked;
    for (const auto& [word, times] : all) ranked.push_back({times, word});
    std::sort(ranked.rbegin(), ranked.rend());
    ASSERT_GT(ranked.size(), 5u);
    EXPECT_EQ(ranked[0].second, "...");
    for (size_t r = 0; r < ranked.size(); ++r)
      EXPECT_EQ(ranked[r].first, int(double(s.units) / double((r + 1) * (r + 1)) / (std::acos(-1.0) * std::acos(-1.0) / 6)))
          << r;
    EXPECT_EQ(std::vector<std::string>({ranked[1].second, ranked[2].second, ranked[3].second}), s.expected);
    EXPECT_GT(ranked[3].first, ranked[4].first) << "a fourth word is as frequent";
    EXPECT_LE(int64_t(ranked.size()), (length - 50) / 50);
  }
}

TEST(Ruler, QuestionsAreAnsweredByTheDocuments) {
  const std::regex document(R"(\n\nDocument (\d+):\n([^:\n]+): ([^\n]+))");
  for (const char* task : {"qa_1", "qa_2"})
    for (int64_t index = 0; index < 5; ++index) {
      const RulerSample s = sample(task, 6000, index);
      std::map<std::string, std::string> by_term;
      int holding = 0;
      size_t number = 0;
      for (const auto& m : matches(s.context, document)) {
        EXPECT_EQ(std::stoul(m[1]), ++number);
        EXPECT_TRUE(by_term.emplace(m[2], m[3]).second) << "a document twice";
        holding += m[3].str().rfind(s.expected[0], 0) == 0;
      }
      EXPECT_EQ(int(by_term.size()), s.units);
      EXPECT_EQ(holding, 1) << "other documents have the answer too";
      std::smatch asked;
      ASSERT_TRUE(std::regex_search(s.question, asked, std::regex(R"((definition of|document on) (thing\d+))")));
      std::string term = asked[2];
      if (s.question.find("says to see?") != std::string::npos) {
        std::smatch see;
        const std::string& first = by_term.at(term);
        ASSERT_TRUE(std::regex_search(first, see, std::regex(R"(See (thing\d+)\.)")));
        term = see[1];
      }
      EXPECT_EQ(by_term.at(term).rfind(s.expected[0], 0), 0u);
    }
}

TEST(Ruler, ExamplesAreAnsweredAndOfOtherThings) {
  for (const RulerTask& task : ruler_tasks()) {
    const RulerSample bare = sample(task.name.c_str(), 7000, 0),
                      shown = sample(task.name.c_str(), 7000, 0, {.example = true});
    const std::string ask = task.kind == RulerTask::Kind::Question ? "Question: What is the definition of"
                                                                   : shown.question.substr(shown.question.size() - 10);
    const size_t at = shown.context.find(ask);
    EXPECT_NE(at, std::string::npos) << task.name;
    EXPECT_EQ(bare.context.find(ask) != std::string::npos, task.example) << task.name;
    // What is expected is no part of the example.
    for (const std::string& e : shown.expected)
      EXPECT_EQ(shown.context.substr(0, at).find(" " + e + " "), std::string::npos) << task.name << e;
  }
}

TEST(Ruler, SaysWhatIsMissing) {
  EXPECT_THROW(sample("niah_multikey_3", 300, 0), Error);
  const auto from = [&](const char* task, const RulerText& text) {
    ruler_sample(*ruler_task(task), bytes(), 6000, 0, 0, text, {});
  };
  RulerText few = book();
  few.entries.resize(3);
  EXPECT_THROW(from("qa_1", few), Error);
  for (DictionaryEntry& e : few.entries = book().entries) e.refers.clear();
  EXPECT_NO_THROW(from("qa_1", few));
  EXPECT_THROW(from("qa_2", few), Error);
  for (const RulerTask& task : ruler_tasks())
    if (task.name != "vt" && task.name != "fwe") {
      EXPECT_THROW(from(task.name.c_str(), RulerText()), Error) << task.name;
    }
  EXPECT_EQ(ruler_task("niah"), nullptr);
}

}  // namespace
}  // namespace heed
