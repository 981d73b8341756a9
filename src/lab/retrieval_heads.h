// Which heads copy from far away (Wu et al., 2024, arXiv 2404.15574): heads whose strongest attention lies on the very
// needle token that the model is about to say.
#pragma once
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "model/session.h"

namespace heed {

/// A prompt whose tokens begin … end − 1 are the needle that its question asks for.
struct RetrievalPrompt {
  std::vector<int32_t> tokens;
  int64_t begin = 0, end = 0;
};

struct RetrievalOptions {
  int limit = 50;             // tokens to answer with, at most
  std::vector<int32_t> stop;  // tokens that end an answer (a newline, an end of text)
  /// A token that is copied twice counts twice, each time 1 / needle length, as in the released code; else the share of
  /// the needle's distinct tokens that the head copied, as in the paper.
  bool repeats = false;
  double least_recall = 0.5;  // prompts whose answer recalls no more of the needle's tokens do not count
  std::string backend = "auto";
  int device = 0;
};

struct RetrievalScores {
  int layers = 0, heads = 0;
  std::vector<double> score;  // [layers · heads]: mean over the prompts that counted; 0 when none did
  int counted = 0;
  double at(int layer, int head) const { return score[size_t(layer) * size_t(heads) + size_t(head)]; }
};

/// The first window of the needle's length that holds more than 90 % of its distinct tokens: [begin, end), or (−1, −1).
std::pair<int64_t, int64_t> find_needle(std::span<const int32_t> tokens, std::span<const int32_t> needle);

/// The score of one head on one prompt: at step i it looked most at position looked[i] while the model said said[i].
double copy_score(const RetrievalPrompt&, std::span<const int32_t> looked, std::span<const int32_t> said, bool repeats);

/// Share of the needle's tokens, each as often as it stands there, that the answer holds (ROUGE-1 recall over tokens).
double recall(const RetrievalPrompt&, std::span<const int32_t> answer);

/// Greedy answers to all prompts, dense. progress(done, prompts) may be empty. Throws Error: prompts that are empty or
/// whose needle lies outside them, whatever Session throws.
RetrievalScores retrieval_heads(std::shared_ptr<const Model>, std::span<const RetrievalPrompt>, const RetrievalOptions&,
                                const std::function<void(int64_t done, int64_t prompts)>& progress = {});

}  // namespace heed
