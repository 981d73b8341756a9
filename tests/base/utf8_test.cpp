// UTF-8 against the definition: every code point, and every way to break one.
#include "base/utf8.h"

#include <gtest/gtest.h>

#include "base/random.h"

namespace heed {
namespace {

TEST(Utf8, EveryCodePointIsWholeAndItsPartsAreNot) {
  for (uint32_t code = 0; code <= 0x10ffff; ++code) {
    const std::string text = utf8_of(code);
    if (code >= 0xd800 && code <= 0xdfff) {
      ASSERT_EQ(utf8_length(text), 0u) << code;
      continue;
    }
    ASSERT_EQ(utf8_length(text + "x"), text.size()) << code;
    for (size_t n = 1; n < text.size(); ++n) {
      ASSERT_EQ(utf8_length(text.substr(0, n)), 0u) << code;
      ASSERT_TRUE(utf8_unfinished(text.substr(0, n))) << code;
    }
  }
  EXPECT_EQ(utf8_length(""), 0u);
}

TEST(Utf8, BrokenBytesAreReplaced) {
  const std::string r = "\uFFFD";
  EXPECT_EQ(valid_utf8("aé漢😀"), "aé漢😀");
  EXPECT_EQ(valid_utf8("\x80"), r);
  EXPECT_EQ(valid_utf8("\xc0\x80"), r + r);                         // overlong
  EXPECT_EQ(valid_utf8("\xe0\x80\x80"), r + r + r);                 // overlong
  EXPECT_EQ(valid_utf8("\xed\xa0\x80"), r + r + r);                 // a surrogate
  EXPECT_EQ(valid_utf8("\xf4\x90\x80\x80x"), r + r + r + r + "x");  // past U+10FFFF
  EXPECT_EQ(valid_utf8("\xff\xfe"), r + r);
  EXPECT_EQ(valid_utf8("a\xe2\x82"), "a" + r + r);
  EXPECT_EQ(valid_utf8("\xe2\x82(x"), r + r + "(x");
  EXPECT_EQ(valid_utf8(std::string("\0a", 2)), std::string("\0a", 2));
  EXPECT_FALSE(utf8_unfinished("\xf5"));
  EXPECT_FALSE(utf8_unfinished("\xed\xa0"));
}

TEST(Utf8, StreamsGiveTheSameHoweverCut) {
  Random random(2);
  for (int round = 0; round < 500; ++round) {
    std::string text;
    for (int i = 0; i < 12; ++i) {
      if (random.below(4) == 0) {
        text += char(random.below(256));
      } else {
        const auto code = uint32_t(random.below(i % 2 ? 0x110000 : 0x300));
        text += utf8_of(code >= 0xd800 && code < 0xe000 ? 'x' : code);
      }
    }
    Utf8Stream stream;
    std::string got;
    for (size_t at = 0; at < text.size();) {
      const auto n = size_t(1 + random.below(5));
      const std::string part = stream.push(std::string_view(text).substr(at, n));
      for (std::string_view rest = part; !rest.empty(); rest.remove_prefix(utf8_length(rest)))
        ASSERT_NE(utf8_length(rest), 0u);
      got += part;
      at += n;
    }
    got += stream.finish();
    EXPECT_EQ(got, valid_utf8(text));
  }
}

}  // namespace
}  // namespace heed
