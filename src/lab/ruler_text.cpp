#include "lab/ruler_text.h"

#include <algorithm>
#include <cctype>
#include <map>
#include <set>
#include <utility>

namespace heed {
namespace {

bool space(char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r' || c == '\f' || c == '\v'; }
bool letter(char c) { return std::isalpha(static_cast<unsigned char>(c)) != 0; }

std::vector<std::string> split_words(std::string_view text) {
  std::vector<std::string> out;
  for (size_t i = 0; i < text.size();) {
    while (i < text.size() && space(text[i])) ++i;
    const size_t begin = i;
    while (i < text.size() && !space(text[i])) ++i;
    if (i > begin) out.emplace_back(text.substr(begin, i - begin));
  }
  return out;
}

/// Whether a word ends a sentence: . ! or ? before closing quotes and brackets.
bool ends_sentence(std::string_view word) {
  static constexpr std::string_view closing[] = {"\"", "'", ")", "]", "}", "\xe2\x80\x9d", "\xe2\x80\x99"};
  for (bool again = true; again;) {
    again = false;
    for (std::string_view c : closing)
      if (word.size() > c.size() && word.ends_with(c)) word.remove_suffix(c.size()), again = true;
  }
  return !word.empty() && (word.back() == '.' || word.back() == '!' || word.back() == '?');
}

std::vector<std::string_view> paragraphs(std::string_view text) {
  std::vector<std::string_view> out;
  size_t begin = std::string_view::npos, end = 0;
  for (size_t i = 0; i < text.size();) {
    const size_t stop = std::min(text.find('\n', i), text.size());
    const std::string_view line = text.substr(i, stop - i);
    const bool blank = std::all_of(line.begin(), line.end(), space);
    if (!blank && begin == std::string_view::npos) begin = i;
    if (!blank) end = stop;
    if (blank && begin != std::string_view::npos)
      out.push_back(text.substr(begin, end - begin)), begin = std::string_view::npos;
    i = stop + 1;
  }
  if (begin != std::string_view::npos) out.push_back(text.substr(begin, end - begin));
  return out;
}

std::string join(const std::vector<std::string>& words, size_t begin, size_t end) {
  std::string out;
  for (size_t i = begin; i < end; ++i) out += (i > begin ? " " : "") + words[i];
  return out;
}

std::string lower(std::string text) {
  for (char& c : text) c = char(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

/// Takes off what stands before a definition: pronunciations /…/, remarks [ … ] and ( … ), numbers "1." and parts of speech.
void strip_grammar(std::vector<std::string>& words) {
  static const std::set<std::string> grammar = {"n",     "n.",   "n.,",     "v.",    "v.,",   "vt.",   "vt.,",
                                                "vi.",   "vi.,", "vt./vi.", "adj.",  "adj.,", "adv.",  "adv.,",
                                                "obs.",  "syn.", "interj.", "prov.", "pref.", "suff.", "quant.",
                                                "excl.", "imp.", "pl.",     "1.",    "1"};
  size_t i = 0;
  while (i < words.size()) {
    const std::string& w = words[i];
    size_t next = i;
    if (grammar.contains(w)) next = i + 1;
    for (const auto& [open, close] : {std::pair{'/', '/'}, {'[', ']'}, {'(', ')'}})
      if (w[0] == open)
        for (size_t j = i; j < words.size() && next == i; ++j) {
          const size_t at = words[j].rfind(close);
          if (at != std::string::npos && (j > i || at > 0)) next = j + 1;
        }
    if (next == i) break;
    i = next;
  }
  words.erase(words.begin(), words.begin() + std::ptrdiff_t(i));
}

/// Terms in braces are references: "{magic}" → "magic".
std::string without_braces(std::string text) {
  std::erase_if(text, [](char c) { return c == '{' || c == '}'; });
  return text;
}

/// "   :term: n. …" → the term; empty when the paragraph begins no entry.
std::string head_term(std::string_view paragraph) {
  size_t i = 0;
  while (i < paragraph.size() && space(paragraph[i])) ++i;
  if (i >= paragraph.size() || paragraph[i] != ':') return {};
  const size_t end = paragraph.find(": ", i + 1), other = paragraph.find(":\n", i + 1);
  const size_t stop = std::min({end, other, paragraph.size()});
  if (stop > paragraph.size() - 1 || stop <= i + 1 || stop - i > 32) return {};
  const std::string term(paragraph.substr(i + 1, stop - i - 1));
  const auto good = [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == ' ' || c == '-' || c == '\'';
  };
  return std::all_of(term.begin(), term.end(), good) && std::count_if(term.begin(), term.end(), letter) >= 4
             ? term
             : std::string();
}

void close_entry(const std::string& term, const std::string& body, std::vector<DictionaryEntry>& out) {
  std::vector<std::string> words = split_words(body);
  strip_grammar(words);
  size_t end = 0;
  while (end < words.size() && !(ends_sentence(words[end]) &&
                                 (end + 1 == words.size() || !std::islower(static_cast<unsigned char>(words[end + 1][0])))))
    ++end;
  if (end == words.size() || end + 1 < 5 || end + 1 > 40 ||
      !(letter(words[0][0]) && std::isupper(static_cast<unsigned char>(words[0][0]))))
    return;
  DictionaryEntry entry{term, without_braces(join(words, 0, end + 1)), {}};
  if (lower(entry.definition).find(lower(term)) != std::string::npos || entry.definition.find('"') != std::string::npos)
    return;
  for (size_t i = 0; i < body.size(); ++i) {  // all references; settle_references leaves one
    if (body[i] != '{') continue;
    const size_t stop = body.find('}', i);
    if (stop == std::string::npos || stop - i > 32) continue;
    const std::vector<std::string> name = split_words(std::string_view(body).substr(i + 1, stop - i - 1));
    entry.refers += join(name, 0, name.size()) + "\n";
  }
  out.push_back(std::move(entry));
}

/// Of the references of each entry, the first that names another entry and says nothing of it yet.
void settle_references(std::vector<DictionaryEntry>& entries) {
  std::set<std::string> terms;
  std::erase_if(entries, [&](const DictionaryEntry& e) { return !terms.insert(lower(e.term)).second; });
  std::map<std::string, std::string> by_name;
  for (const DictionaryEntry& e : entries) by_name[lower(e.term)] = e.term;
  for (DictionaryEntry& e : entries) {
    const std::string all = std::exchange(e.refers, {});
    for (size_t i = 0; i < all.size() && e.refers.empty();) {
      const size_t stop = std::min(all.find('\n', i), all.size());
      const auto found = by_name.find(lower(all.substr(i, stop - i)));
      if (found != by_name.end() && found->second != e.term) e.refers = found->second;
      i = stop + 1;
    }
  }
}

}  // namespace

RulerText RulerText::from(std::string_view text) {
  RulerText out;
  std::map<std::string, int> seen;
  std::string term, body;
  for (std::string_view paragraph : paragraphs(text)) {
    const size_t first = paragraph.find_first_not_of(" \t");
    if (first < paragraph.size() && paragraph[first] == ':') {
      if (!term.empty()) close_entry(term, body, out.entries);
      term = head_term(paragraph);
      body = term.empty() ? "" : std::string(paragraph.substr(first + term.size() + 2));
    } else {
      body += '\n', body += paragraph;
    }
    const std::vector<std::string> words = split_words(paragraph);
    if (words.size() < 8 || !ends_sentence(words.back())) continue;
    for (const std::string& w : words) {
      out.words.push_back(w);
      out.sentence_end.push_back(ends_sentence(w));
      if (w.size() >= 4 && w.size() <= 9 && std::all_of(w.begin(), w.end(), [](char c) { return c >= 'a' && c <= 'z'; }))
        ++seen[w];
    }
    out.sentence_end.back() = true;
  }
  if (!term.empty()) close_entry(term, body, out.entries);
  settle_references(out.entries);
  for (const auto& [word, count] : seen)
    if (count >= 2) out.vocabulary.push_back(word);
  return out;
}

}  // namespace heed
