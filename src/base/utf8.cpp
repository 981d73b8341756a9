#include "base/utf8.h"

#include <algorithm>

namespace heed {
namespace {

/// Bytes that a character with this first byte takes; 0 when none begins so.
size_t length_from(uint8_t first) {
  if (first < 0x80) return 1;
  if (first >= 0xc2 && first <= 0xdf) return 2;
  if (first >= 0xe0 && first <= 0xef) return 3;
  if (first >= 0xf0 && first <= 0xf4) return 4;
  return 0;
}

/// How many of the first `length` bytes of `text` agree with a well-formed character of that length.
size_t agreeing(std::string_view text, size_t length) {
  const auto byte = [&](size_t i) { return uint8_t(text[i]); };
  for (size_t i = 1; i < length; ++i) {
    if (i >= text.size()) return i;
    // The second byte is narrower after E0 and F0 (overlong), ED (surrogates) and F4 (past U+10FFFF).
    const uint8_t low = i > 1 ? 0x80 : byte(0) == 0xe0 ? 0xa0 : byte(0) == 0xf0 ? 0x90 : 0x80;
    const uint8_t high = i > 1 ? 0xbf : byte(0) == 0xed ? 0x9f : byte(0) == 0xf4 ? 0x8f : 0xbf;
    if (byte(i) < low || byte(i) > high) return i;
  }
  return length;
}

}  // namespace

size_t utf8_length(std::string_view text) {
  if (text.empty()) return 0;
  const size_t length = length_from(uint8_t(text[0]));
  return length != 0 && agreeing(text, length) == length ? length : 0;
}

bool utf8_unfinished(std::string_view text) {
  const size_t length = length_from(uint8_t(text[0]));
  return text.size() < length && agreeing(text, length) == text.size();
}

std::string valid_utf8(std::string_view text) {
  Utf8Stream stream;
  std::string out = stream.push(text);
  return out += stream.finish();
}

std::string utf8_of(uint32_t code) {
  if (code < 0x80) return {char(code)};
  if (code < 0x800) return {char(0xc0 | code >> 6), char(0x80 | (code & 63))};
  if (code < 0x10000) return {char(0xe0 | code >> 12), char(0x80 | (code >> 6 & 63)), char(0x80 | (code & 63))};
  return {char(0xf0 | code >> 18), char(0x80 | (code >> 12 & 63)), char(0x80 | (code >> 6 & 63)), char(0x80 | (code & 63))};
}

std::string Utf8Stream::push(std::string_view piece) {
  held_ += piece;
  std::string out;
  out.reserve(held_.size());
  std::string_view rest = held_;
  while (!rest.empty()) {
    if (const size_t length = utf8_length(rest)) {
      out += rest.substr(0, length);
      rest.remove_prefix(length);
    } else if (utf8_unfinished(rest)) {
      break;
    } else {
      out += "\uFFFD";
      rest.remove_prefix(1);
    }
  }
  held_ = std::string(rest);
  return out;
}

std::string Utf8Stream::finish() {
  std::string out;
  for (size_t i = 0; i < held_.size(); ++i) out += "\uFFFD";
  held_.clear();
  return out;
}

}  // namespace heed
