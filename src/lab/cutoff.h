// A probe for context-cutoff, learnt from sentences planted in a text.
#pragma once
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <vector>

#include "attention/spec.h"
#include "model/session.h"

namespace heed {

/// Logistic regression: P(y = 1) = σ(weights · x + bias).
struct Logistic {
  std::vector<double> weights;
  double bias = 0;
  double probability(std::span<const double> x) const;
};
/// Fits rows x of one width to labels, both classes weighing alike, with a penalty of `ridge` / 2 times the squared
/// weights of standardised columns: gradient descent, `rounds` steps. Columns that do not vary weigh nothing.
Logistic fit_logistic(std::span<const std::vector<double>> x, std::span<const int> labels, double ridge = 0.1,
                      int rounds = 1000);
/// Of the label 1: 2 · hits / (2 · hits + misses + false alarms), 0 without hits.
double f1(std::span<const int> said, std::span<const int> labels);

struct CutoffOptions {
  SessionOptions session;
  int64_t length = 2048;  // tokens of a prompt
  int prompts = 32;       // half of them teach, a quarter picks heads, a quarter tests
  int heads = 5;          // that the probe looks at
  double piece = 0.1;     // share of a prompt between two looks
  uint64_t seed = 0;
};
struct CutoffProbe {
  std::vector<int> heads;  // layer · h + head, ascending
  Logistic probe;          // of the means of their outputs, head by head
  double f1 = 0;           // on the prompts that neither taught nor picked, at a probability of one half
  double f1_always = 0;    // there, of one who always says that enough has been read
};

/// Reads prompts with a sentence planted at different depths in pieces; what has been read is enough once the sentence lies
/// in it as a whole. The heads whose own probes have the best F1 are looked at together. progress(share) may be empty. Throws
/// Error: a text too short, no tokenizer, fewer than 8 prompts, whatever Session throws.
CutoffProbe learn_cutoff(std::shared_ptr<const Model>, std::span<const int32_t> text, const CutoffOptions&,
                         const std::function<void(double)>& progress = {});

/// The profile of a spec of context-cutoff with what was learnt. Throws Error(Invalid) when the spec sets what is learnt.
nlohmann::ordered_json cutoff_profile(const Spec&, const ModelInfo&, const CutoffProbe&);

}  // namespace heed
