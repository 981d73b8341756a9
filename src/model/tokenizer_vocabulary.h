// The tokens of a vocabulary: texts, kinds, scores, and which of them mean something special.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/error.h"
#include "model/gguf.h"

namespace heed {

/// Many short strings end to end: views into it stay valid once it is complete.
class Strings {
 public:
  void add(std::string_view text) {
    bytes_ += text;
    ends_.push_back(bytes_.size());
  }
  std::string_view operator[](size_t i) const {
    const size_t begin = i == 0 ? 0 : ends_[i - 1];
    return std::string_view(bytes_).substr(begin, ends_[i] - begin);
  }
  size_t size() const { return ends_.size(); }

 private:
  std::string bytes_;
  std::vector<size_t> ends_;
};

/// Token kinds as GGUF numbers them.
enum class TokenKind : uint8_t { Undefined, Normal, Unknown, Control, User, Unused, Byte };

struct Vocabulary {
  Strings text;  // as in the file
  std::vector<TokenKind> kind;
  std::vector<float> score;
  int32_t bos = -1, eos = -1, eot = -1, unknown = -1;
  bool add_bos = false, add_eos = false, add_space_prefix = false;
  std::vector<bool> end;  // generation stops at these

  size_t size() const { return text.size(); }
  /// Whether plain text may become this token: not its name, when it is a control token, nor that of a byte.
  bool plain(size_t id) const {
    return kind[id] != TokenKind::Control && kind[id] != TokenKind::Unknown && kind[id] != TokenKind::Byte;
  }

  /// `sentencepiece` and `add_bos` say what holds when the file leaves ids and flags out.
  static Result<Vocabulary> read(const Gguf& file, bool sentencepiece, bool add_bos);
};

using TokenMap = std::unordered_map<std::string_view, int32_t>;

}  // namespace heed
