// Choosing the next token from logits.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "base/random.h"

namespace heed {

/// In this order: the top_k likeliest tokens, of them the fewest whose probability together reaches top_p, of them those
/// at least min_p times as likely as the likeliest; then temperature flattens or sharpens what remains. Probabilities
/// that the filters look at are those of temperature 1.
/// Top-p: Holtzman et al., 2020; min-p: Nguyen et al., 2024.
struct Sampling {
  float temperature = 0;  // 0: always the likeliest token
  int top_k = 0;          // 0: all
  float top_p = 1;        // 1: all
  float min_p = 0;        // 0: all
  uint64_t seed = 0;
};

class Sampler {
 public:
  /// Throws Error(Invalid) for a number out of range.
  explicit Sampler(const Sampling& sampling = {});

  /// The next token. The same seed and logits give the same tokens. Of equal logits the lower id counts as likelier;
  /// NaN and −∞ are never chosen. Throws Error(Invalid) when nothing can be.
  int32_t operator()(std::span<const float> logits);

  struct Candidate {
    int32_t id;
    float logit;
    double probability;
  };
  /// What operator() draws from: what the filters leave, likeliest first, with probabilities that sum to 1.
  std::vector<Candidate> candidates(std::span<const float> logits) const;

  const Sampling& sampling() const { return sampling_; }

 private:
  /// candidates() in any order that depends on the logits alone.
  std::vector<Candidate> filtered(std::span<const float> logits) const;

  Sampling sampling_;
  Random random_;
};

}  // namespace heed
