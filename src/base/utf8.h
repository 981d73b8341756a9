// UTF-8: telling whole characters from broken ones.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace heed {

/// Bytes of the well-formed character that `text` begins with (Unicode 15, table 3-7: no overlong forms, surrogates or
/// numbers past U+10FFFF); 0 when there is none.
size_t utf8_length(std::string_view text);

/// Whether `text`, not empty, is the beginning of a well-formed character whose end is missing.
bool utf8_unfinished(std::string_view text);

/// `text` with every byte that belongs to no well-formed character replaced by U+FFFD.
std::string valid_utf8(std::string_view text);

/// The UTF-8 form of a code point up to U+10FFFF.
std::string utf8_of(uint32_t code);

/// Text that arrives in pieces which may end inside a character, as tokens do: passes on whole characters only.
class Utf8Stream {
 public:
  /// What of everything given so far has become whole; bytes that can never be are U+FFFD.
  std::string push(std::string_view piece);
  /// The end: an unfinished character is U+FFFD (one for each byte).
  std::string finish();

 private:
  std::string held_;
};

}  // namespace heed
