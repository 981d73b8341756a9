// Tokens per second of a model and a mechanism, measured as llama-bench does.
#pragma once
#include <functional>
#include <memory>
#include <vector>

#include "model/session.h"

namespace heed {

/// One test: `prompt` tokens at once, or `generate` tokens one at a time, behind `depth` tokens that are not timed.
struct BenchTest {
  int64_t prompt = 0, generate = 0, depth = 0;
};

struct BenchResult {
  BenchTest test;
  std::vector<double> seconds;  // of each repetition
  Times times;                  // where the last repetition's seconds went
  double density = 1;  // share of the causal pairs of prompts, the one before included, that is computed; over layers and heads
  double keys_read = 0;  // for a generated token, the same way
  double mean_ns() const;
  double deviation_ns() const;  // of the sample, as llama-bench gives it
  double mean_ts() const;
  double deviation_ts() const;
  std::vector<double> rates() const;  // tokens per second of each repetition
};

/// Random tokens of the vocabulary; one run that is not counted comes first. Every repetition starts from the same
/// cache, and generation two tokens behind it (which keys_read counts). Throws Error(Interrupted) when stopped.
BenchResult bench(std::shared_ptr<const Model> model, const SessionOptions& options, const BenchTest& test,
                  int repetitions, uint64_t seed = 0);

}  // namespace heed
