// What RULER's prompts are made of, taken from one text by rule.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace heed {

/// An entry of a dictionary, as in the Jargon File: a paragraph that begins with ":term:".
struct DictionaryEntry {
  std::string term;
  std::string definition;  // the first sentence of the first sense, 5 to 40 words, without the term itself
  std::string refers;      // a term that is referred to as {term} and has an entry of its own; may be empty
};

struct RulerText {
  /// The prose in order: paragraphs of a sentence or more (lists, headings and tables are no prose), words apart.
  std::vector<std::string> words;
  std::vector<bool> sentence_end;  // of each word
  /// Different words of the prose, sorted: a to z alone, 4 to 9 letters, found at least twice.
  std::vector<std::string> vocabulary;
  std::vector<DictionaryEntry> entries;  // in the text's order, terms unique

  /// Any bytes at all; what is no UTF-8 stays as it is.
  static RulerText from(std::string_view text);
};

}  // namespace heed
