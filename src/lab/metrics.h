// How an answer is scored against what was expected: RULER's string match, and LongBench's metrics (Bai et al., 2023,
// arXiv 2308.14508). All scores lie in [0, 1]; texts are UTF-8, any bytes are accepted.
#pragma once
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace heed {

/// The share of `expected` that the answer holds, letters of either case alike (A to Z; RULER).
double string_match_all(std::string_view answer, std::span<const std::string> expected);
/// 1 when the answer holds any of them (RULER).
double string_match_part(std::string_view answer, std::span<const std::string> expected);

/// F1 of the words in common, in lower case, without punctuation and articles (SQuAD's normalisation).
double qa_f1(std::string_view answer, std::string_view expected);
/// F1 of the longest common subsequence of words: runs of a–z and 0–9 in lower case (Lin, 2004; as rouge-score's rougeL
/// without stemming).
double rouge_l(std::string_view answer, std::string_view expected);
/// 1 / (number of class names in the answer) when the expected one is among them, names inside the expected name left
/// out as LongBench does.
double classification(std::string_view answer, std::string_view expected, std::span<const std::string> classes);
/// The share of the answer's numbers that are the one of "Paragraph N" in `expected`.
double retrieval(std::string_view answer, std::string_view expected);
/// The share of the answer's numbers that are `expected`.
double count(std::string_view answer, std::string_view expected);
/// Of the answer's first line without ` # or //: 2 · (longest common subsequence of characters) / (characters of both),
/// rounded to a percent, as fuzz.ratio does.
double code_similarity(std::string_view answer, std::string_view expected);

/// LongBench's metrics by name.
struct Metric {
  const char* name;
  int limit;      // tokens of an answer, unless said otherwise
  bool one_line;  // only the first line that says something counts
  double (*score)(std::string_view answer, std::string_view expected, std::span<const std::string> classes);
};
std::span<const Metric> longbench_metrics();
const Metric* longbench_metric(std::string_view name);

}  // namespace heed
