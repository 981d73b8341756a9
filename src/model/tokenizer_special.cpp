#include "model/tokenizer_special.h"

#include <functional>
#include <map>

namespace heed {
namespace {

size_t start_of(const char* text, size_t length) {
  return size_t(uint8_t(text[0])) << 8 | (length > 1 ? uint8_t(text[1]) : 0);
}

}  // namespace

SpecialTokens::SpecialTokens(const Vocabulary& vocabulary, bool control) {
  std::map<size_t, std::vector<int32_t>, std::greater<>> by_length;
  for (size_t i = 0; i < vocabulary.size(); ++i) {
    const TokenKind kind = vocabulary.kind[i];
    const bool wanted = kind == TokenKind::User || (control && (kind == TokenKind::Control || kind == TokenKind::Unknown));
    if (wanted && !vocabulary.text[i].empty()) by_length[vocabulary.text[i].size()].push_back(int32_t(i));
  }
  lengths_.reserve(by_length.size());
  for (const auto& [length, ids] : by_length) {
    Length& entry = lengths_.emplace_back();
    entry.length = length;
    for (const int32_t id : ids) {
      const std::string_view text = vocabulary.text[size_t(id)];
      entry.starts.set(start_of(text.data(), length));
      entry.ids.emplace(text, id);
    }
  }
}

std::vector<SpecialTokens::Fragment> SpecialTokens::split(std::string_view text) const {
  std::vector<Fragment> out, next;
  if (!text.empty()) out.push_back({text});
  for (const Length& length : lengths_) {
    next.clear();
    for (const Fragment& fragment : out) {
      if (fragment.token >= 0 || fragment.text.size() < length.length) {
        next.push_back(fragment);
      } else {
        take(length, fragment.text, next);
      }
    }
    out.swap(next);
  }
  return out;
}

void SpecialTokens::take(const Length& length, std::string_view text, std::vector<Fragment>& out) const {
  size_t begin = 0;
  for (size_t at = 0; at + length.length <= text.size();) {
    if (length.starts[start_of(text.data() + at, length.length)]) {
      if (const auto found = length.ids.find(text.substr(at, length.length)); found != length.ids.end()) {
        if (at > begin) out.push_back({text.substr(begin, at - begin)});
        out.push_back({text.substr(at, length.length), found->second});
        begin = at += length.length;
        continue;
      }
    }
    ++at;
  }
  if (begin < text.size()) out.push_back({text.substr(begin)});
}

}  // namespace heed
