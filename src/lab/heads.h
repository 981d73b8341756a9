// What kind of head each one is: where it looks on a text.
#pragma once
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "lab/retrieval_heads.h"
#include "model/session.h"

namespace heed {

/// Of the last `queries` queries of a text, under dense attention: mean shares of the softmax mass, and distances.
struct HeadView {
  double sink = 0;      // on the first 4 tokens
  double local = 0;     // on the last `window` tokens
  double distance = 0;  // mean distance in tokens, weighted by the mass
  double entropy = 0;   // nats
};

struct HeadOptions {
  SessionOptions session;
  int queries = 64;
  int window = 256;
};

/// [layers][h]. Throws Error(Invalid) for a text that the window would cover whole.
std::vector<std::vector<HeadView>> head_views(std::shared_ptr<const Model> model, std::span<const int32_t> tokens,
                                              const HeadOptions& options);

/// Prompts for retrieval_heads: a fact at different depths of a text of `length` tokens, and the beginning of the
/// sentence that repeats it.
std::vector<RetrievalPrompt> retrieval_prompts(const Tokenizer& words, std::span<const int32_t> text, int64_t length,
                                               int count, uint64_t seed);

/// Where heads look, and which of them retrieve.
struct HeadStudy {
  std::vector<std::vector<HeadView>> views;
  RetrievalScores retrieval;  // counted is 0 when nobody looked, or no needle was found
};

/// head_views of the first `length` tokens, and retrieval_heads over `prompts` of that length (0: do not look). progress(share)
/// may be empty. Throws Error(Invalid) when the text is too short, or Error(Unsupported) without a tokenizer.
HeadStudy study_heads(std::shared_ptr<const Model> model, std::span<const int32_t> text, int64_t length, int prompts,
                      uint64_t seed, const SessionOptions& session, const std::function<void(double)>& progress = {});

}  // namespace heed
