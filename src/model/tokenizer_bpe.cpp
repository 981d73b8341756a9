#include "model/tokenizer_bpe.h"

#include <algorithm>
#include <array>
#include <limits>

#include "base/utf8.h"

namespace heed {
namespace {

/// The byte that each character below U+0144 stands for, or −1: printable bytes stand for themselves, the others are
/// the characters from U+0100 on, in order.
const std::array<int16_t, 324>& character_bytes() {
  static const auto table = [] {
    std::array<int16_t, 324> out;
    out.fill(-1);
    size_t next = 256;
    for (int byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte != 0xad);
      out[printable ? size_t(byte) : next++] = int16_t(byte);
    }
    return out;
  }();
  return table;
}

}  // namespace

bool Bpe::bytes_of(std::string_view text, std::string& bytes) {
  bytes.clear();
  while (!text.empty()) {
    const size_t length = utf8_length(text);
    if (length != 1 && length != 2) return false;
    const size_t code = length == 1 ? uint8_t(text[0]) : size_t(text[0] & 0x1f) << 6 | size_t(text[1] & 0x3f);
    if (code >= character_bytes().size() || character_bytes()[code] < 0) return false;
    bytes += char(character_bytes()[code]);
    text.remove_prefix(length);
  }
  return true;
}

int32_t Bpe::symbol(const std::string& bytes) {
  const auto [place, is_new] = symbols_.try_emplace(bytes, tokens_ + int32_t(part_bytes_.size()));
  if (is_new) part_bytes_.push_back(bytes);
  return place->second;
}

Result<Bpe> Bpe::from(const Gguf& file, const Vocabulary& vocabulary, Splitter splitter) {
  const auto merges = file.strings("tokenizer.ggml.merges");
  if (!merges) return tl::unexpected<Failure>(merges.error());
  // Each merge may bring three symbols of its own.
  if (merges->size() > size_t(std::numeric_limits<int32_t>::max() - 256) / 3 - vocabulary.size() / 3) {
    return fail(Code::Corrupt, file.name(), "tokenizer.ggml.merges has too many entries", "convert the model again");
  }
  Bpe out;
  out.splitter_ = std::move(splitter);
  out.tokens_ = int32_t(vocabulary.size());
  out.symbols_.reserve(vocabulary.size());
  std::string bytes, right;
  for (size_t i = 0; i < vocabulary.size(); ++i) {
    if (vocabulary.plain(i) && bytes_of(vocabulary.text[i], bytes) && !bytes.empty())
      out.symbols_.emplace(bytes, int32_t(i));
  }
  for (int byte = 0; byte < 256; ++byte) out.byte_symbol_[byte] = out.symbol(std::string(1, char(byte)));
  out.merges_.reserve(merges->size());
  for (size_t rank = 0; rank < merges->size(); ++rank) {
    const std::string_view line = (*merges)[rank];
    const size_t space = line.find(' ', 1);
    if (space == line.npos || !bytes_of(line.substr(0, space), bytes) || !bytes_of(line.substr(space + 1), right))
      continue;
    if (bytes.empty() || right.empty()) continue;
    const Pair pair{out.symbol(bytes), out.symbol(right)};
    out.merges_.try_emplace(pair, Merge{int32_t(rank), out.symbol(bytes + right)});
  }
  return out;
}

void Bpe::encode(std::string_view text, std::vector<int32_t>& out) const {
  const std::string valid = valid_utf8(text);
  // Words repeat: a word seen before is copied from where its tokens stand in `out`.
  struct Seen {
    size_t begin, count;
  };
  std::unordered_map<std::string_view, Seen> seen;
  constexpr size_t kLongestKept = 64;
  Work work;
  splitter_.split(valid, [&](std::string_view word) {
    if (word.size() > kLongestKept) return merge(word, work, out);
    const auto [place, is_new] = seen.try_emplace(word);
    if (is_new) {
      const size_t begin = out.size();
      merge(word, work, out);
      place->second = {begin, out.size() - begin};
    } else {
      const Seen tokens = place->second;
      out.resize(out.size() + tokens.count);
      std::copy_n(out.begin() + std::ptrdiff_t(tokens.begin), tokens.count, out.end() - std::ptrdiff_t(tokens.count));
    }
  });
}

void Bpe::merge(std::string_view word, Work& work, std::vector<int32_t>& out) const {
  if (splitter_.whole_words()) {
    const auto whole = symbols_.find(std::string(word));
    if (whole != symbols_.end() && whole->second < tokens_) return out.push_back(whole->second);
  }
  // One link for each byte, merged in order of rank, the leftmost first of equal ranks.
  auto& links = work.links;
  const auto count = int32_t(word.size());
  links.resize(word.size());
  for (int32_t i = 0; i < count; ++i) {
    links[size_t(i)] = {byte_symbol_[uint8_t(word[size_t(i)])], i - 1, i + 1 < count ? i + 1 : -1};
  }
  constexpr auto later = [](const Candidate& a, const Candidate& b) {
    return a.rank != b.rank ? a.rank > b.rank : a.at > b.at;
  };
  work.queue.clear();
  for (int32_t i = 0; i + 1 < count; ++i) offer(i, work);
  std::make_heap(work.queue.begin(), work.queue.end(), later);
  const auto offer_now = [&](int32_t at) {
    const size_t before = work.queue.size();
    offer(at, work);
    if (work.queue.size() > before) std::push_heap(work.queue.begin(), work.queue.end(), later);
  };
  while (!work.queue.empty()) {
    std::pop_heap(work.queue.begin(), work.queue.end(), later);
    const Candidate best = work.queue.back();
    work.queue.pop_back();
    Link& left = links[size_t(best.at)];
    // Either side may have been merged with another since: a link that was swallowed has symbol −1.
    if (left.symbol != best.pair.left || left.next < 0 || links[size_t(left.next)].symbol != best.pair.right) continue;
    Link& right = links[size_t(left.next)];
    left.symbol = best.result;
    left.next = right.next;
    right.symbol = -1;
    if (left.next >= 0) links[size_t(left.next)].previous = best.at;
    if (left.previous >= 0) offer_now(left.previous);
    offer_now(best.at);
  }
  for (int32_t i = 0; i >= 0 && count > 0; i = links[size_t(i)].next) emit(links[size_t(i)].symbol, out);
}

void Bpe::offer(int32_t at, Work& work) const {
  const Link& left = work.links[size_t(at)];
  if (left.next < 0) return;
  const Pair pair{left.symbol, work.links[size_t(left.next)].symbol};
  if (const auto found = merges_.find(pair); found != merges_.end()) {
    work.queue.push_back({found->second.rank, at, pair, found->second.result});
  }
}

void Bpe::emit(int32_t symbol, std::vector<int32_t>& out) const {
  if (symbol < tokens_) return out.push_back(symbol);
  // A byte without a token has no place in the output: an unknown token there would end the text for many models.
  for (const char byte : part_bytes_[size_t(symbol - tokens_)]) {
    if (const int32_t token = byte_symbol_[uint8_t(byte)]; token < tokens_) out.push_back(token);
  }
}

}  // namespace heed
