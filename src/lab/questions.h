// A task of many questions, each put to a session of its own, scored, and kept.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "lab/ask.h"
#include "lab/interval.h"
#include "lab/samples.h"

namespace heed {

struct Question {
  std::vector<int32_t> context, question;
  std::string prompt;  // both as text, for the samples' file
  std::vector<std::string> expected;
  int limit = 32;  // tokens of the answer
  bool one_line = true;
  double chance = 0;
  std::function<double(const std::string& answer)> score;
};

/// What a task came to.
struct TaskRow {
  std::string task, metric;
  Query query = Query::Blind;
  int64_t length = 0;
  double depth = -1;                           // of the needle grid
  std::vector<double> scores;                  // of the samples that were finished
  double chance = 0, density = 1, tokens = 0;  // means
  bool interrupted = false;

  double score() const;
  Interval interval() const { return score_interval(scores); }
  /// A random answer could have done as well: the interval reaches down to it.
  bool at_chance() const { return interval().low <= chance; }
};

/// Puts question 0 … count − 1 to the model. `row` says task, query and length; `key` identifies the run in the file,
/// to which those and the number are added. Finished samples are taken from the file. When interrupted, the row has
/// what was finished. `done(share)` is called as work goes on.
TaskRow run_task(std::shared_ptr<const Model> model, const SessionOptions& options, TaskRow row, int64_t count,
                 SampleFile& file, const SampleFile::Json& key, const std::function<Question(int64_t index)>& make,
                 const std::function<void(double share)>& done = {});

}  // namespace heed
