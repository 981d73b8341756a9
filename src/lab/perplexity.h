// Perplexity as llama-perplexity defines it, so that the two can be compared.
#pragma once
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "model/session.h"

namespace heed {

/// The text is cut into chunks of `context` tokens, each run on its own; where the model expects BOS it takes the place
/// of the chunk's first token. Losses of the tokens context/2 + 1 … context − 1 of a chunk count, given all before.
struct Perplexity {
  int64_t chunks = 0;           // done
  int64_t tokens = 0;           // scored
  double sum = 0, squares = 0;  // of losses, nats

  double nll() const { return tokens ? sum / double(tokens) : 0; }
  double ppl() const;
  /// Standard error of ppl.
  double error() const;
};

/// `from` is what an earlier run had done: its chunks are skipped. Ends early, with what is done, when interrupted.
/// chunks < 0: all there are. `done` is called behind every chunk. A cache policy cuts behind the chunk, so it changes
/// nothing here: measure those with compare() or `kld`.
Perplexity perplexity(std::shared_ptr<const Model> model, const SessionOptions& options,
                      std::span<const int32_t> tokens, int64_t context, int64_t chunks, Perplexity from = {},
                      const std::function<void(const Perplexity&, double share)>& done = {});

}  // namespace heed
