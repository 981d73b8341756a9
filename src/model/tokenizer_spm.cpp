#include "model/tokenizer_spm.h"

#include <algorithm>
#include <limits>
#include <string>

namespace heed {
namespace {

/// Bytes of a character by its first byte alone: what is cut short or malformed still makes progress and falls back
/// to bytes.
size_t character_length(char first) {
  const auto byte = uint8_t(first);
  return byte < 0xc0 ? 1 : byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : 4;
}

struct Link {
  uint32_t begin, size;  // bytes of the escaped text; size 0: swallowed by the link to its left
  int32_t previous, next;
};

struct Merge {
  float score;
  int32_t left;
  uint32_t size;  // of the merged text: tells whether either side has changed since
  bool operator<(const Merge& other) const { return score != other.score ? score < other.score : left > other.left; }
};

}  // namespace

int Spm::byte_of(std::string_view text) {
  const auto digit = [](char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1; };
  if (text.size() != 6 || !text.starts_with("<0x") || text[5] != '>' || digit(text[3]) < 0 || digit(text[4]) < 0)
    return -1;
  return digit(text[3]) * 16 + digit(text[4]);
}

Spm::Spm(const Vocabulary& vocabulary) : vocabulary_(&vocabulary) {
  std::fill(std::begin(byte_token_), std::end(byte_token_), vocabulary.unknown);
  ids_.reserve(vocabulary.size());
  for (size_t i = 0; i < vocabulary.size(); ++i) {
    const std::string_view text = vocabulary.text[i];
    if (text.size() == 1 && vocabulary.plain(i)) byte_token_[uint8_t(text[0])] = int32_t(i);
    if (!vocabulary.plain(i) || text.empty()) continue;
    ids_.try_emplace(text, int32_t(i));
    longest_ = std::max(longest_, text.size());
  }
  for (size_t i = 0; i < vocabulary.size(); ++i) {
    if (const int byte = byte_of(vocabulary.text[i]); byte >= 0) byte_token_[byte] = int32_t(i);
  }
}

void Spm::encode(std::string_view text, bool space_before, std::vector<int32_t>& out) const {
  std::string escaped(space_before ? kSpaceMark : "");
  for (const char c : text) {
    if (c == ' ') escaped += kSpaceMark;
    else escaped += c;
  }
  require(escaped.size() < size_t(std::numeric_limits<int32_t>::max()), "Tokenizer::encode", "text of 2 GiB or more",
          "give it in parts");
  std::vector<Link> links;
  for (size_t at = 0; at < escaped.size();) {
    const size_t size = std::min(character_length(escaped[at]), escaped.size() - at);
    links.push_back({uint32_t(at), uint32_t(size), int32_t(links.size()) - 1, int32_t(links.size()) + 1});
    at += size;
  }
  if (links.empty()) return;
  links.back().next = -1;

  const auto find = [&](uint32_t begin, uint32_t size) {
    const auto found = size <= longest_ ? ids_.find(std::string_view(escaped).substr(begin, size)) : ids_.end();
    return found == ids_.end() ? -1 : found->second;
  };
  std::vector<Merge> queue;
  const auto offer = [&](int32_t left) {
    const Link& a = links[size_t(left)];
    if (a.next < 0) return;
    const uint32_t size = a.size + links[size_t(a.next)].size;
    const int32_t token = find(a.begin, size);
    if (token < 0) return;
    queue.push_back({vocabulary_->score[size_t(token)], left, size});
    std::push_heap(queue.begin(), queue.end());
  };
  for (size_t i = 0; i + 1 < links.size(); ++i) offer(int32_t(i));
  while (!queue.empty()) {
    std::pop_heap(queue.begin(), queue.end());
    const Merge best = queue.back();
    queue.pop_back();
    Link& left = links[size_t(best.left)];
    if (left.size == 0 || left.next < 0) continue;
    Link& right = links[size_t(left.next)];
    if (left.size + right.size != best.size) continue;
    left.size = best.size;
    left.next = right.next;
    right.size = 0;
    if (left.next >= 0) links[size_t(left.next)].previous = best.left;
    if (left.previous >= 0) offer(left.previous);
    offer(best.left);
  }
  for (int32_t i = 0; i >= 0; i = links[size_t(i)].next) {
    const Link& link = links[size_t(i)];
    if (const int32_t token = find(link.begin, link.size); token >= 0) {
      out.push_back(token);
      continue;
    }
    for (uint32_t at = link.begin; at < link.begin + link.size; ++at) {
      if (const int32_t token = byte_token_[uint8_t(escaped[at])]; token >= 0) out.push_back(token);
    }
  }
}

}  // namespace heed
