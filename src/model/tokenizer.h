// Text to token ids and back, with the vocabulary of a GGUF file.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "model/gguf.h"

namespace heed {

/// Byte-level BPE (tokenizer.ggml.model = gpt2) and SentencePiece BPE (llama). Gives the ids that llama.cpp gives.
/// Immutable: any number of threads may share one. Copies share the vocabulary.
class Tokenizer {
 public:
  /// NotFound or Invalid for a missing or malformed vocabulary; Unsupported, with what there is, for another kind.
  /// Nothing of the file is kept.
  static Result<Tokenizer> from(const Gguf& file);

  struct Options {
    bool special = false;  // the text may name control tokens (<|im_end|>); else such text is plain
    bool bos = false;      // begin with the BOS token, if there is one
  };
  /// Any bytes at all are accepted. Byte-level BPE reads bytes that are not UTF-8 as U+FFFD; SentencePiece keeps them.
  /// n log n in the length.
  std::vector<int32_t> encode(std::string_view text, Options options) const;
  std::vector<int32_t> encode(std::string_view text) const { return encode(text, {}); }

  /// The bytes a token stands for, which may be part of a character (see Utf8Stream); of a control token, its name.
  /// Empty for an id outside the vocabulary.
  std::string_view piece(int32_t id) const;
  /// The bytes of all tokens, without control tokens unless `special`.
  std::string decode(std::span<const int32_t> ids, bool special = false) const;

  int64_t size() const;
  int32_t bos() const;  // −1: none, as below
  int32_t eos() const;
  int32_t eot() const;  // end of a turn
  int32_t unknown() const;
  bool add_bos() const;  // the model expects prompts to begin with BOS
  bool add_eos() const;
  bool is_end(int32_t id) const;  // generation stops here
  bool is_control(int32_t id) const;
  /// The id of a token by its text as in the file (control tokens included); −1 when there is none.
  int32_t find(std::string_view text) const;
  /// A Jinja template; empty when the file has none.
  const std::string& chat_template() const;

 private:
  struct State;
  std::shared_ptr<const State> state_;
};

}  // namespace heed
