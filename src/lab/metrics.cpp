#include "lab/metrics.h"

#include <utf8proc.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <map>

namespace heed {
namespace {

std::string ascii_lower(std::string_view text) {
  std::string out(text);
  for (char& c : out) c = c >= 'A' && c <= 'Z' ? char(c + 32) : c;
  return out;
}

/// Code points; a byte that belongs to no character is U+FFFD.
std::vector<int32_t> code_points(std::string_view text) {
  std::vector<int32_t> out;
  const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
  for (size_t i = 0; i < text.size();) {
    utf8proc_int32_t code = -1;
    const auto taken = utf8proc_iterate(bytes + i, utf8proc_ssize_t(text.size() - i), &code);
    out.push_back(taken > 0 ? code : 0xfffd);
    i += taken > 0 ? size_t(taken) : 1;
  }
  return out;
}

/// Code points in lower case. İ is the one character whose lower case is two: i and a dot above.
std::vector<int32_t> lowered(std::string_view text) {
  std::vector<int32_t> out;
  for (int32_t c : code_points(text)) {
    if (c == 0x130) out.insert(out.end(), {'i', 0x307});
    else out.push_back(utf8proc_tolower(c));
  }
  return out;
}

bool is_space(int32_t c) {
  const auto kind = utf8proc_category(c);
  return (c >= 9 && c <= 13) || (c >= 28 && c <= 31) || c == 0x85 || kind == UTF8PROC_CATEGORY_ZS ||
         kind == UTF8PROC_CATEGORY_ZL || kind == UTF8PROC_CATEGORY_ZP;
}

/// A letter, number or underscore, as a regular expression's \w.
bool is_word(int32_t c) {
  const auto kind = utf8proc_category(c);
  return c == '_' || (kind >= UTF8PROC_CATEGORY_LU && kind <= UTF8PROC_CATEGORY_LO) ||
         (kind >= UTF8PROC_CATEGORY_ND && kind <= UTF8PROC_CATEGORY_NO);
}

bool is_punctuation(int32_t c) { return c < 128 && std::ispunct(int(c)); }

using Word = std::vector<int32_t>;

std::vector<Word> normal_words(std::string_view text) {
  std::vector<int32_t> kept;
  for (int32_t c : lowered(text))
    if (!is_punctuation(c)) kept.push_back(c);
  static const Word articles[] = {{'a'}, {'a', 'n'}, {'t', 'h', 'e'}};
  std::vector<Word> out(1);
  for (size_t i = 0; i < kept.size();) {
    size_t end = i;
    while (end < kept.size() && is_word(kept[end])) ++end;
    const Word run(kept.begin() + std::ptrdiff_t(i), kept.begin() + std::ptrdiff_t(end));
    if (std::find(std::begin(articles), std::end(articles), run) != std::end(articles)) {
      out.emplace_back();
    } else if (end > i) {
      out.back().insert(out.back().end(), run.begin(), run.end());
    } else {
      if (is_space(kept[i])) out.emplace_back();
      else out.back().push_back(kept[i]);
      ++end;
    }
    i = end;
  }
  std::erase_if(out, [](const Word& w) { return w.empty(); });
  return out;
}

double f1(double common, double said, double expected) { return common > 0 ? 2 * common / (said + expected) : 0; }

template <class T>
int64_t common_subsequence(const std::vector<T>& a, const std::vector<T>& b) {
  std::vector<int64_t> row(b.size() + 1, 0);
  for (const T& x : a) {
    int64_t diagonal = 0;
    for (size_t j = 0; j < b.size(); ++j) {
      const int64_t above = row[j + 1];
      row[j + 1] = x == b[j] ? diagonal + 1 : std::max(above, row[j]);
      diagonal = above;
    }
  }
  return row.back();
}

std::vector<std::string> numbers_in(std::string_view text) {
  std::vector<std::string> out;
  for (size_t i = 0; i < text.size();) {
    size_t end = i;
    while (end < text.size() && text[end] >= '0' && text[end] <= '9') ++end;
    if (end > i) out.emplace_back(text.substr(i, end - i));
    i = std::max(end, i + 1);
  }
  return out;
}

double share_of(std::string_view number, std::string_view answer) {
  const auto all = numbers_in(answer);
  return all.empty() ? 0 : double(std::count(all.begin(), all.end(), number)) / double(all.size());
}

std::vector<std::string> plain_words(std::string_view text) {
  std::vector<std::string> out(1);
  for (int32_t c : lowered(text)) {
    if ((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9')) out.back() += char(c);
    else if (!out.back().empty()) out.emplace_back();
  }
  if (out.back().empty()) out.pop_back();
  return out;
}

}  // namespace

double string_match_all(std::string_view answer, std::span<const std::string> expected) {
  if (expected.empty()) return 0;
  const std::string said = ascii_lower(answer);
  double found = 0;
  for (const std::string& e : expected) found += said.find(ascii_lower(e)) != std::string::npos;
  return found / double(expected.size());
}

double string_match_part(std::string_view answer, std::span<const std::string> expected) {
  const std::string said = ascii_lower(answer);
  return std::any_of(expected.begin(), expected.end(),
                     [&](const std::string& e) { return said.find(ascii_lower(e)) != std::string::npos; });
}

double qa_f1(std::string_view answer, std::string_view expected) {
  const auto said = normal_words(answer), right = normal_words(expected);
  std::map<Word, int64_t> there;
  for (const Word& w : right) ++there[w];
  int64_t common = 0;
  for (const Word& w : said) common += there[w]-- > 0;
  return f1(double(common), double(said.size()), double(right.size()));
}

double rouge_l(std::string_view answer, std::string_view expected) {
  const auto said = plain_words(answer), right = plain_words(expected);
  return f1(double(common_subsequence(said, right)), double(said.size()), double(right.size()));
}

double classification(std::string_view answer, std::string_view expected, std::span<const std::string> classes) {
  std::vector<std::string> named;
  for (const std::string& c : classes)
    if (answer.find(c) != std::string_view::npos) named.push_back(c);
  // LongBench takes names out of the list it walks through, so the one behind each is not looked at.
  for (size_t i = 0; i < named.size(); ++i)
    if (named[i] != expected && expected.find(named[i]) != std::string_view::npos)
      named.erase(std::find(named.begin(), named.end(), named[i]));
  return std::find(named.begin(), named.end(), expected) == named.end() ? 0 : 1.0 / double(named.size());
}

double retrieval(std::string_view answer, std::string_view expected) {
  constexpr std::string_view before = "Paragraph ";
  for (size_t at = 0; (at = expected.find(before, at)) != std::string_view::npos; at += before.size()) {
    std::string_view rest = expected.substr(at + before.size());
    size_t digits = 0;
    while (digits < rest.size() && rest[digits] >= '0' && rest[digits] <= '9') ++digits;
    if (digits > 0) return share_of(rest.substr(0, digits), answer);
  }
  return 0;
}

double count(std::string_view answer, std::string_view expected) { return share_of(expected, answer); }

double code_similarity(std::string_view answer, std::string_view expected) {
  answer.remove_prefix(std::min(answer.find_first_not_of('\n'), answer.size()));
  std::string_view line;
  for (size_t at = 0; at <= answer.size();) {
    const size_t end = std::min(answer.find('\n', at), answer.size());
    const std::string_view next = answer.substr(at, end - at);
    at = end + 1;
    if (next.find('`') != std::string_view::npos || next.find('#') != std::string_view::npos ||
        next.find("//") != std::string_view::npos)
      continue;
    line = next;
    break;
  }
  const auto a = code_points(line), b = code_points(expected);
  if (a.empty() || b.empty()) return 0;
  return std::round(100 * f1(double(common_subsequence(a, b)), double(a.size()), double(b.size()))) / 100;
}

std::span<const Metric> longbench_metrics() {
  using View = std::string_view;
  using Classes = std::span<const std::string>;
  static const Metric metrics[] = {
      {"qa_f1", 128, true, [](View a, View e, Classes) { return qa_f1(a, e); }},
      {"rouge_l", 512, false, [](View a, View e, Classes) { return rouge_l(a, e); }},
      {"classification", 64, true, [](View a, View e, Classes c) { return classification(a, e, c); }},
      {"retrieval", 32, true, [](View a, View e, Classes) { return retrieval(a, e); }},
      {"count", 32, true, [](View a, View e, Classes) { return count(a, e); }},
      {"code_similarity", 64, false, [](View a, View e, Classes) { return code_similarity(a, e); }},
  };
  return metrics;
}

const Metric* longbench_metric(std::string_view name) {
  for (const Metric& m : longbench_metrics())
    if (name == m.name) return &m;
  return nullptr;
}

}  // namespace heed
