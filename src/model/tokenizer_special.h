// Finding tokens that are matched literally, before anything else looks at the text.
#pragma once
#include <bitset>
#include <cstdint>
#include <string_view>
#include <vector>

#include "model/tokenizer_vocabulary.h"

namespace heed {

class SpecialTokens {
 public:
  /// A token, or text that holds none (token −1).
  struct Fragment {
    std::string_view text;
    int32_t token = -1;
  };

  /// Matches user-defined tokens, and with `control` also control and unknown ones. `vocabulary` must outlive this.
  SpecialTokens(const Vocabulary& vocabulary, bool control);

  /// Longer tokens are taken first wherever they stand, so "<a><b>" beats "<a>" and the longest run of spaces wins.
  std::vector<Fragment> split(std::string_view text) const;

 private:
  struct Length {
    size_t length = 0;
    std::bitset<65536> starts;  // by the first two bytes: rules nearly every position out without a look-up
    TokenMap ids;
  };
  void take(const Length& length, std::string_view text, std::vector<Fragment>& out) const;

  std::vector<Length> lengths_;  // longest first
};

}  // namespace heed
