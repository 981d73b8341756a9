// LongBench's data files (Bai et al., 2023, arXiv 2308.14508): a line of JSON for each example.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "lab/metrics.h"
#include "lab/questions.h"

namespace heed {

struct LongBenchItem {
  std::string input, context;
  std::vector<std::string> answers, classes;
};

/// Fields input, context, answers, and all_classes (may be null or missing). Errors name the line.
Result<std::vector<LongBenchItem>> read_longbench(std::string_view jsonl, const std::string& where);

/// The prompt that is used when none is given: "{context}" and "{input}" stand for the fields.
std::string longbench_template(const Metric& metric);

/// `form` as longbench_template(). What stands behind {context} is the question; it may not be empty. A prompt that with
/// its answer would take more than `length` tokens loses the middle of its context, as LongBench does.
/// Throws Error(Invalid) for a template without {context}, with nothing behind it, or too long in itself.
Question longbench_question(const LongBenchItem& item, const Metric& metric, const Tokenizer& words,
                            const std::string& form, int64_t length, int limit);

}  // namespace heed
