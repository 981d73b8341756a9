// Needle in a haystack, in the form that base models can take: a fact is put somewhere into a long text, and the model
// continues a sentence that asks for it.
#pragma once
#include <memory>
#include <span>
#include <vector>

#include "model/session.h"

namespace heed {

struct NiahOptions {
  SessionOptions session;
  /// The mechanism sees the question before it cuts, or (false) only afterwards: scores of the two do not compare.
  bool question_first = false;
  int depths = 5;  // needles at depths 0 … 1, one a run
  uint64_t seed = 0;
};

struct NiahScore {
  double accuracy = 0;  // share of runs whose greedy answer is the value
  double recall = 0;    // share of the value's tokens that are the most probable one, given those before
  double nll = 0;       // mean loss of the value's tokens, nats
  int runs = 0;
};

/// `haystack` gives the text around the needle and the length of the prompt. Throws Error(Interrupted) when stopped.
NiahScore niah(std::shared_ptr<const Model> model, std::span<const int32_t> haystack, const NiahOptions& options);

}  // namespace heed
