// SentencePiece BPE (Kudo and Richardson, 2018): characters are merged to the token of the highest score.
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "model/gguf.h"
#include "model/tokenizer_vocabulary.h"

namespace heed {

class Spm {
 public:
  /// `vocabulary` must outlive this.
  explicit Spm(const Vocabulary& vocabulary);

  /// Appends the tokens of plain text, with a space before it if asked. Spaces become U+2581; characters without a
  /// token become the tokens of their bytes, or the unknown token where a byte has none.
  void encode(std::string_view text, bool space_before, std::vector<int32_t>& out) const;

  /// The byte that a token like <0x0A> stands for; −1 when the text is no such token's.
  static int byte_of(std::string_view text);

 private:
  const Vocabulary* vocabulary_;
  TokenMap ids_;
  size_t longest_ = 0;  // bytes of the longest token
  int32_t byte_token_[256];
};

/// U+2581, which stands for a space.
inline constexpr std::string_view kSpaceMark = "\u2581";

}  // namespace heed
