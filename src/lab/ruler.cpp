#include "lab/ruler.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "base/error.h"
#include "base/random.h"

namespace heed {
namespace {

using Kind = RulerTask::Kind;
using Haystack = RulerTask::Haystack;
using Item = RulerTask::Item;

constexpr const char* kNoise =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";
constexpr int kDepths = 40;  // needles lie at different ones of 40 evenly spread depths
constexpr int kHops = 4, kCommon = 10;
constexpr int64_t kShort = 4096;  // below, the word lists of cwe have fewer repetitions

RulerTask needles(const char* name, Haystack haystack, Item key, Item value, int keys, int values, int queries) {
  return {.haystack = haystack, .key = key, .value = value, .name = name, .keys = keys, .values = values, .queries = queries};
}

template <class T>
void shuffle(std::vector<T>& list, Random& random) {
  for (size_t i = list.size(); i > 1; --i) std::swap(list[i - 1], list[size_t(random.below(int64_t(i)))]);
}

/// `count` different numbers below `bound`, in the order drawn.
std::vector<int64_t> draw(int64_t count, int64_t bound, Random& random) {
  std::vector<int64_t> all(static_cast<size_t>(bound));
  std::iota(all.begin(), all.end(), int64_t(0));
  for (int64_t i = 0; i < count; ++i) std::swap(all[size_t(i)], all[size_t(i + random.below(bound - i))]);
  all.resize(size_t(count));
  return all;
}

std::string join(const std::vector<std::string>& parts, const char* between) {
  std::string out;
  for (size_t i = 0; i < parts.size(); ++i) out += (i ? between : "") + parts[i];
  return out;
}

/// Makes strings of a kind, none twice.
class Items {
 public:
  Items(const RulerText& text, Random& random) : text_(text), random_(random) {}

  std::string operator()(Item item) {
    return unused([&] {
      return item == Item::Number ? std::to_string(1000000 + random_.below(9000000))
             : item == Item::Uuid ? uuid()
                                  : pair();
    });
  }

  std::string letters(int count, char first) {
    return unused([&] {
      std::string made;
      for (int i = 0; i < count; ++i) made += char(first + random_.below(26));
      return made;
    });
  }

 private:
  template <class Make>
  std::string unused(Make make) {
    for (int tries = 0; tries < 10000; ++tries)
      if (std::string made = make(); used_.insert(made).second) return made;
    throw Error(Code::Invalid, "ruler", "the text has too few different words for a prompt of this length",
                "give a longer text");
  }

  const std::string& word() { return text_.vocabulary[size_t(random_.below(int64_t(text_.vocabulary.size())))]; }

  std::string pair() {
    const std::string first = word();
    return first + "-" + word();
  }

  /// Version 4: random but for version and variant.
  std::string uuid() {
    static constexpr char digits[] = "0123456789abcdef";
    std::string out;
    for (int i = 0; i < 32; ++i) {
      if (i == 8 || i == 12 || i == 16 || i == 20) out += '-';
      out += i == 12 ? '4' : i == 16 ? digits[8 + random_.below(4)] : digits[random_.below(16)];
    }
    return out;
  }

  const RulerText& text_;
  Random& random_;
  std::set<std::string> used_;
};

/// One sample in the making: `write` fills its texts with so many units of haystack.
class Maker {
 public:
  Maker(const RulerTask& task, const Tokenizer& words, int64_t length, uint64_t seed, int64_t index,
        const RulerText& text, const RulerOptions& options)
      : task_(task), words_(words), text_(text), length_(length), depth_(options.depth),
        shown_(options.example || task.example) {
    // Streams of neighbouring seeds are the same numbers one step apart: each part is mixed before the next is added.
    const uint64_t number = uint64_t(&task - ruler_tasks().data());
    seed_ = Random(Random(seed).next() + number).next() + uint64_t(index);
    seed_ = Random(seed_).next();
  }

  RulerSample make() const {
    switch (task_.kind) {
      case Kind::Needle: return fit(task_.haystack == Haystack::Essay ? 20 : std::max(2, needle_count()));
      case Kind::Chain: return fit(kHops + 1);
      case Kind::CommonWords: return fit(2 * kCommon);
      case Kind::FrequentWords: return fit(60);
      default: return fit(task_.hops + 1);
    }
  }

 private:
  int needle_count() const { return std::max(task_.keys, task_.queries) * task_.values; }

  /// The longest haystack whose prompt has room for the answer. Tokens grow almost in proportion with units, so the next
  /// guess lies on the line between the best that fits and the least that does not.
  RulerSample fit(int least) const {
    const int64_t budget = length_ - task_.limit;
    const auto made = [&](int units) {
      RulerSample s = write(units);
      s.units = units;
      s.context_tokens = words_.encode(s.context, {.special = false, .bos = words_.add_bos()});
      s.question_tokens = words_.encode(s.question);
      return s;
    };
    need_words(task_.kind == Kind::Needle || task_.kind == Kind::CommonWords ? 100 : 0);
    RulerSample best = made(least);
    require(best.tokens() <= budget, task_.name.c_str(),
            std::to_string(length_) + " tokens are too few: the shortest prompt and its answer take " +
                std::to_string(best.tokens() + task_.limit),
            "ask for a greater length");
    int low = least, high = -1;
    int64_t low_tokens = best.tokens(), high_tokens = 0;
    int next = least * 2;
    while (high < 0 || high - low > 1) {
      RulerSample s = made(next);
      const int64_t tokens = s.tokens();
      if (tokens <= budget) low = next, low_tokens = tokens, best = std::move(s);
      else high = next, high_tokens = tokens;
      if (high < 0) {
        next = low + std::max(1, int(double(budget - low_tokens) * 1.02 * low / double(std::max<int64_t>(1, low_tokens)))) +
               low / 16;
      } else {
        next = low +
               int(double(budget - low_tokens) * (high - low) / double(std::max<int64_t>(1, high_tokens - low_tokens)));
        next = std::clamp(next, low + 1, std::max(low + 1, high - 1));
      }
    }
    return best;
  }

  void need_words(size_t count) const {
    require(text_.vocabulary.size() >= count, task_.name.c_str(),
            "the text has " + std::to_string(text_.vocabulary.size()) + " different common words; " +
                std::to_string(count) + " are needed",
            "give a longer text");
  }

  /// What the parts of one prompt share: nothing named in the example is named again.
  struct Draws {
    Draws(const RulerText& text, uint64_t seed) : random(seed), items(text, random) {}
    Random random;
    Items items;
    std::set<size_t> entries;        // asked about
    std::vector<std::string> words;  // of cwe, shuffled; those not yet used
  };

  RulerSample write(int units) const {
    Draws draws(text_, seed_);
    std::string example;
    if (shown_) {
      const RulerSample e = part(draws, example_units(), true);
      example = e.context + e.question + answered(e) + "\n\n";
    }
    RulerSample s = part(draws, units, false);
    s.context.insert(0, example);
    return s;
  }

  /// Examples are short; those that RULER has itself are as long as there: vt's up to 500 tokens, cwe's 40 words.
  int example_units() const {
    const bool small = length_ < kShort;
    switch (task_.kind) {
      case Kind::Needle: return task_.haystack == Haystack::Essay ? 60 : 2;
      case Kind::Chain: return length_ < 2048 ? kHops + 1 : 15;
      case Kind::CommonWords: return small ? 20 : 40;
      case Kind::FrequentWords: return 60;
      default: return task_.hops + 2;
    }
  }

  std::string answered(const RulerSample& s) const {
    if (task_.kind == Kind::Chain) return " " + join(s.expected, " ");
    if (task_.kind == Kind::Question) return " " + s.solution;
    if (task_.kind != Kind::CommonWords) return " " + join(s.expected, ", ") + ".";
    std::string out;
    for (size_t i = 0; i < s.expected.size(); ++i) out += " " + std::to_string(i + 1) + ". " + s.expected[i];
    return out;
  }

  RulerSample part(Draws& draws, int units, bool example) const {
    switch (task_.kind) {
      case Kind::Needle: return needle(draws, units, example);
      case Kind::Chain: return chain(draws, units, example);
      case Kind::CommonWords: return common_words(draws, units, example);
      case Kind::FrequentWords: return frequent_words(draws, units, example);
      default: return documents(draws, units);
    }
  }

  RulerSample needle(Draws& draws, int units, bool example) const {
    Random& random = draws.random;
    Items& items = draws.items;
    const std::string kind = task_.value == Item::Uuid ? "uuids" : "numbers";
    const auto sentence = [&](const std::string& key, const std::string& value) {
      return "One of the special magic " + kind + " for " + key + " is: " + value + ".";
    };
    std::vector<std::string> keys, sentences;
    std::vector<std::vector<std::string>> values;
    for (int k = 0; k < std::max(task_.keys, task_.queries); ++k) {
      keys.push_back(items(task_.key));
      values.emplace_back();
      for (int v = 0; v < task_.values; ++v)
        values.back().push_back(items(task_.value)), sentences.push_back(sentence(keys.back(), values.back().back()));
    }
    shuffle(sentences, random);

    std::string context;
    if (task_.haystack == Haystack::Essay) {
      context = into_essay(units, sentences, random, example);
    } else {
      std::vector<int64_t> lines = draw(int64_t(sentences.size()), units, random);
      if (depth_ >= 0 && !example) lines[0] = std::llround(depth_ * units);
      std::sort(lines.begin(), lines.end());
      std::vector<std::string> all;
      size_t put = 0;
      for (int i = 0; i <= units; ++i) {
        for (; put < lines.size() && lines[put] == i; ++put) all.push_back(sentences[put]);
        if (i == units) break;
        if (task_.haystack == Haystack::Noise) {
          all.push_back(kNoise);
        } else {
          const std::string key = items(task_.key);
          all.push_back(sentence(key, items(task_.value)));
        }
      }
      context = join(all, "\n");
    }

    std::vector<std::string> asked;
    RulerSample s;
    for (int64_t k : draw(task_.queries, int64_t(keys.size()), random)) {
      asked.push_back(keys[size_t(k)]);
      s.expected.insert(s.expected.end(), values[size_t(k)].begin(), values[size_t(k)].end());
    }
    std::string query = asked.back();
    if (asked.size() > 1) query = join({asked.begin(), asked.end() - 1}, ", ") + ", and " + query;
    const bool one = s.expected.size() == 1;
    const std::string what = one ? kind.substr(0, kind.size() - 1) : kind;
    s.context = (one ? "A special magic " + what + " is" : "Some special magic " + what + " are") +
                " hidden within the following text. Make sure to memorize it. I will quiz you about the " + what +
                " afterwards.\n" + context;
    const std::string of = "special magic " + what + " for " + query + " mentioned in the provided text";
    s.question = one ? "\nWhat is the " + of + "? The " + of + " is"
                     : "\nWhat are all the " + of + "? The " + of + " are";
    // Others in the text are values of keys not asked for.
    const double others = task_.haystack == Haystack::Needles ? units : double(sentences.size() - s.expected.size());
    s.chance = others > 0 ? double(s.expected.size()) / (others + double(s.expected.size())) : 0;
    return s;
  }

  /// The first `units` words of the prose, from the start again when it ends, with the sentences put between its own.
  std::string into_essay(int units, const std::vector<std::string>& sentences, Random& random, bool example) const {
    require(text_.words.size() >= 20, task_.name.c_str(), "the text has no prose: paragraphs of whole sentences",
            "give a book or the like");
    std::vector<std::string> prose(1);
    for (int i = 0; i < units; ++i) {
      const size_t at = size_t(i) % text_.words.size();
      std::string& s = prose.back();
      s += (s.empty() ? "" : " ") + text_.words[at];
      if (text_.sentence_end[at] && i + 1 < units) prose.emplace_back();
    }
    std::vector<int64_t> places;
    for (int64_t d : draw(int64_t(sentences.size()), kDepths, random))
      places.push_back(int64_t(std::round(100.0 * double(d) / (kDepths - 1))) * int64_t(prose.size()) / 100);
    if (depth_ >= 0 && !example) places[0] = std::llround(depth_ * double(prose.size()));
    std::sort(places.begin(), places.end());
    std::vector<std::string> all;
    size_t put = 0;
    for (size_t i = 0; i <= prose.size(); ++i) {
      for (; put < places.size() && places[put] == int64_t(i); ++put) all.push_back(sentences[put]);
      if (i < prose.size()) all.push_back(prose[i]);
    }
    return join(all, " ");
  }

  /// One chain of four hops in noise; the example's variables have shorter names.
  RulerSample chain(Draws& draws, int lines, bool example) const {
    RulerSample s;
    for (int i = 0; i <= kHops; ++i) s.expected.push_back(draws.items.letters(example ? 3 : 5, 'A'));
    const std::string value = std::to_string(10000 + draws.random.below(90000));
    std::vector<int64_t> places = draw(kHops + 1, lines, draws.random);
    std::sort(places.begin(), places.end());
    std::vector<std::string> all;
    for (int i = 0, put = 0; i < lines; ++i) {
      if (put <= kHops && places[size_t(put)] == i) {
        all.push_back("VAR " + s.expected[size_t(put)] + " = " + (put ? "VAR " + s.expected[size_t(put) - 1] : value));
        ++put;
      }
      all.push_back(kNoise);
    }
    s.context = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n" +
                join(all, "\n");
    s.question = "\nQuestion: Find all variables that are assigned the value " + value +
                 " in the text above. Answer: According to the chain(s) of variable assignment in the text above, " +
                 std::to_string(kHops + 1) + " variables are assigned the value " + value + ", they are:";
    return s;
  }

  /// A numbered list of `units` different words; ten of them are repeated more often.
  RulerSample common_words(Draws& draws, int units, bool example) const {
    std::vector<std::string>& left = draws.words;
    if (left.empty()) {
      left = text_.vocabulary;
      shuffle(left, draws.random);
    }
    const bool small = length_ < kShort;
    const int common = example ? (small ? 3 : 10) : small ? 6 : 30, uncommon = small ? 1 : 3;
    RulerSample s;
    std::vector<std::string> words;
    for (int i = 0; i < units; ++i) {
      // Long prompts ask for more words than there are.
      const std::string word = left.empty() ? draws.items(Item::Word) : left.back();
      if (!left.empty()) left.pop_back();
      if (i < kCommon) s.expected.push_back(word);
      words.insert(words.end(), size_t(i < kCommon ? common : uncommon), word);
    }
    shuffle(words, draws.random);
    s.context =
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n";
    for (size_t i = 0; i < words.size(); ++i) s.context += (i ? " " : "") + std::to_string(i + 1) + ". " + words[i];
    s.question =
        "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most "
        "often in the list are:";
    s.chance = double(kCommon) / units;
    return s;
  }

  /// Made-up words, the r-th most frequent `units` · r^−2 / ζ(2) times; the most frequent one is "...", which does not count.
  RulerSample frequent_words(Draws& draws, int units, bool example) const {
    Items& items = draws.items;
    const int64_t kinds = std::max<int64_t>(8, example ? 0 : (length_ - task_.limit) / 50);
    std::vector<std::string> all;
    RulerSample s;
    const double zeta = 3.14159265358979323846 * 3.14159265358979323846 / 6;
    int64_t there = 0;
    for (int64_t r = 1; r <= kinds; ++r) {
      const std::string word = r == 1 ? "..." : items.letters(6, 'a');
      const int64_t times = int64_t(units / double(r * r) / zeta);
      if (r >= 2 && r <= 4) s.expected.push_back(word);
      all.insert(all.end(), size_t(times), word);
      there += times > 0 && r > 1;
    }
    shuffle(all, draws.random);
    s.context =
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. " +
        join(all, " ");
    s.question =
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text? "
        "Answer: According to the coded text above, the three most frequently appeared words are:";
    s.chance = 3.0 / double(there);
    return s;
  }

  /// Dictionary entries as documents. One hop: the definition of a term. Two: of the term that another document refers to.
  RulerSample documents(Draws& draws, int units) const {
    const auto& entries = text_.entries;
    require(
        entries.size() >= 20, task_.name.c_str(),
        "the text has " + std::to_string(entries.size()) + " dictionary entries (':term: A definition.'); 20 are needed",
        "give a dictionary, or choose other tasks");
    const auto at = [&](const std::string& term) {
      return size_t(std::find_if(entries.begin(), entries.end(), [&](const DictionaryEntry& e) { return e.term == term; }) -
                    entries.begin());
    };
    // The first entry from a random one on that can be asked about.
    const size_t first = size_t(draws.random.below(int64_t(entries.size())));
    std::vector<size_t> chosen;
    for (size_t i = 0; i < entries.size() && chosen.empty(); ++i) {
      const size_t asked = (first + i) % entries.size();
      if (draws.entries.contains(asked) || (task_.hops > 1 && entries[asked].refers.empty())) continue;
      chosen.push_back(asked);
      if (task_.hops > 1) chosen.push_back(at(entries[asked].refers));
    }
    require(!chosen.empty(), task_.name.c_str(), "no dictionary entry refers to another as {term}",
            "choose other tasks");
    draws.entries.insert(chosen.begin(), chosen.end());
    const size_t asked = chosen.front(), target = chosen.back();
    // The definition's first four words are what is expected: no other document has them.
    std::string start;
    for (char c : entries[target].definition) {
      if (c == ' ' && std::count(start.begin(), start.end(), ' ') == 3) break;
      start += c;
    }
    std::vector<size_t> others;
    for (size_t i = 0; i < entries.size(); ++i)
      if (!draws.entries.contains(i) && entries[i].definition.find(start) == std::string::npos) others.push_back(i);
    shuffle(others, draws.random);
    require(!others.empty(), task_.name.c_str(), "all dictionary entries begin alike", "choose other tasks");
    for (size_t i = 0; chosen.size() < size_t(units); ++i)
      chosen.push_back(others[i % others.size()]);  // again from the first when there are too few
    shuffle(chosen, draws.random);
    RulerSample s;
    const std::string order =
        "Answer the question based on the given documents. Only give me the answer and do not output any other "
        "words.\n\n";
    s.context = order + "The following are given documents.";
    for (size_t i = 0; i < chosen.size(); ++i) {
      const DictionaryEntry& e = entries[chosen[i]];
      s.context += "\n\nDocument " + std::to_string(i + 1) + ":\n" + e.term + ": " + e.definition +
                   (e.refers.empty() ? "" : " See " + e.refers + ".");
    }
    s.question = "\n\n" + order + "Question: ";
    const std::string& subject = entries[asked].term;
    s.question += task_.hops > 1 ? "What is the definition of the term that the document on " + subject +
                                       " says to see? Answer: The document on " + subject + " says to see"
                                 : "What is the definition of " + subject + "? Answer: " + subject + ":";
    s.expected = {start};
    s.solution = (task_.hops > 1 ? entries[target].term + ": " : "") + entries[target].definition;
    s.chance = 1.0 / double(chosen.size());
    return s;
  }

  const RulerTask& task_;
  const Tokenizer& words_;
  const RulerText& text_;
  int64_t length_;
  double depth_;
  bool shown_;
  uint64_t seed_ = 0;
};

}  // namespace

const std::vector<RulerTask>& ruler_tasks() {
  static const std::vector<RulerTask> tasks = {
      needles("niah_single_1", Haystack::Noise, Item::Word, Item::Number, 1, 1, 1),
      needles("niah_single_2", Haystack::Essay, Item::Word, Item::Number, 1, 1, 1),
      needles("niah_single_3", Haystack::Essay, Item::Word, Item::Uuid, 1, 1, 1),
      needles("niah_multikey_1", Haystack::Essay, Item::Word, Item::Number, 4, 1, 1),
      needles("niah_multikey_2", Haystack::Needles, Item::Word, Item::Number, 1, 1, 1),
      needles("niah_multikey_3", Haystack::Needles, Item::Uuid, Item::Uuid, 1, 1, 1),
      needles("niah_multivalue", Haystack::Essay, Item::Word, Item::Number, 1, 4, 1),
      needles("niah_multiquery", Haystack::Essay, Item::Word, Item::Number, 1, 1, 4),
      {.kind = Kind::Chain, .haystack = Haystack::Noise, .name = "vt", .limit = 30, .example = true},
      {.kind = Kind::CommonWords, .name = "cwe", .limit = 120, .example = true},
      {.kind = Kind::FrequentWords, .name = "fwe", .limit = 50},
      {.kind = Kind::Question, .name = "qa_1", .hops = 1, .limit = 32, .all = false},
      {.kind = Kind::Question, .name = "qa_2", .hops = 2, .limit = 32, .all = false},
  };
  return tasks;
}

const RulerTask* ruler_task(const std::string& name) {
  for (const RulerTask& task : ruler_tasks())
    if (task.name == name) return &task;
  return nullptr;
}

RulerSample ruler_sample(const RulerTask& task, const Tokenizer& words, int64_t length, uint64_t seed, int64_t index,
                         const RulerText& text, const RulerOptions& options) {
  const RulerTask* known = ruler_task(task.name);
  require(known != nullptr, "ruler", "'" + task.name + "' is none of the 13 tasks");
  require(options.depth < 0 || (known->kind == Kind::Needle && known->keys * known->values * known->queries == 1),
          known->name.c_str(), "has no single needle whose depth could be chosen");
  return Maker(*known, words, length, seed, index, text, options).make();
}

}  // namespace heed
