// Pre-tokenizers: how byte-level BPE cuts text into words before it merges inside them.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/threads.h"

namespace heed {

class Splitter {
 public:
  /// The pre-tokenizer of that name (tokenizer.ggml.pre; empty means "default"), or Unsupported with what there is.
  static Result<Splitter> named(std::string_view name);

  /// Whether a word that is itself a token is taken whole, without merging, and whether BOS is expected by default.
  bool whole_words() const { return whole_words_; }
  bool add_bos() const { return add_bos_; }

  /// Calls word(piece) for each piece of `text`, which must be valid UTF-8; the pieces end to end are the text.
  void split(std::string_view text, FunctionRef<void(std::string_view)> word) const;

 private:
  struct Pattern;
  void split(size_t stage, std::string_view text, void* scratch, FunctionRef<void(std::string_view)> word) const;

  std::vector<std::shared_ptr<const Pattern>> stages_;  // each cuts the pieces of the one before it
  bool whole_words_ = false, add_bos_ = false;
};

}  // namespace heed
