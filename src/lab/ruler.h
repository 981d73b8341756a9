// RULER's 13 tasks (Hsieh et al., 2024, arXiv 2404.06654), made from any text at any length.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "lab/ruler_text.h"
#include "model/tokenizer.h"

namespace heed {

struct RulerTask {
  enum class Kind : uint8_t { Needle, Chain, CommonWords, FrequentWords, Question } kind = Kind::Needle;
  enum class Haystack : uint8_t { Noise, Essay, Needles } haystack = Haystack::Essay;
  enum class Item : uint8_t { Number, Word, Uuid } key = Item::Word, value = Item::Number;
  std::string name;
  int keys = 1, values = 1, queries = 1;  // needles: keys in the text, values of each, keys asked for
  int hops = 0;                           // Question: references to follow
  int limit = 128;                        // tokens of an answer
  /// string_match_all: the share of the expected strings that the answer holds; else string_match_part: 1 when it
  /// holds any of them.
  bool all = true;
  bool example = false;  // RULER itself puts an answered example before the prompt
};

const std::vector<RulerTask>& ruler_tasks();
/// Null when there is none of that name.
const RulerTask* ruler_task(const std::string& name);

struct RulerSample {
  std::string context;   // what a query-blind mechanism has when it cuts
  std::string question;  // the question, and the answer's beginning
  std::vector<std::string> expected;
  std::string solution;  // of qa: a whole answer
  double chance = 0;     // score of an answer that names things of the asked kind in the context at random
  int units = 0;         // of the haystack: words, lines, needles, words, draws, documents
  std::vector<int32_t> context_tokens, question_tokens;  // the context with BOS where the model expects it

  int64_t tokens() const { return int64_t(context_tokens.size() + question_tokens.size()); }
};

struct RulerOptions {
  bool example = false;  // an answered example, short and of other things, before the prompt of every task
  double depth = -1;     // 0 … 1 puts the needle of a task with one needle there; negative: drawn by RULER's rule
};

/// Sample `index`: the same arguments give the same sample, whatever others were made. Prompt and answer limit together
/// take at most `length` tokens, as in RULER, and the haystack is as long as that allows.
/// Throws Error(Invalid) when the length leaves no room or the text has too few words, or, for qa, dictionary entries.
RulerSample ruler_sample(const RulerTask& task, const Tokenizer& words, int64_t length, uint64_t seed, int64_t index,
                         const RulerText& text, const RulerOptions& options = {});

}  // namespace heed
