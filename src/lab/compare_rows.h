// Runs of a comparison as lines of a SampleFile, so that long work can be taken up again.
#pragma once
#include "lab/compare.h"
#include "lab/samples.h"

namespace heed {

/// One run of a mechanism over the passage.
struct TimedRow {
  Row row;                         // of a run for its times alone: nothing but these
  double prefill = 0, decode = 0;  // seconds
};

SampleFile::Json to_json(const TimedRow& run);
/// Throws what nlohmann::json does.
TimedRow timed_row(const SampleFile::Json& line);
/// The key's fields: what `CompareOptions::key` has, the mechanism and the number of the repetition.
const SampleFile::Form& compare_lines();

}  // namespace heed
