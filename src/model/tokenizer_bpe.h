// Byte-level BPE (Sennrich et al., 2016; bytes as in GPT-2, Radford et al., 2019).
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/error.h"
#include "model/gguf.h"
#include "model/tokenizer_split.h"
#include "model/tokenizer_vocabulary.h"

namespace heed {

class Bpe {
 public:
  /// Reads the merges. `vocabulary` is not kept.
  static Result<Bpe> from(const Gguf& file, const Vocabulary& vocabulary, Splitter splitter);

  /// Appends the tokens of plain text; bytes that are not UTF-8 count as U+FFFD.
  void encode(std::string_view text, std::vector<int32_t>& out) const;

  /// The bytes that a token's text stands for: every byte is written as a printable character. False when the text
  /// has characters that stand for no byte (added tokens, written plainly).
  static bool bytes_of(std::string_view text, std::string& bytes);

 private:
  // Symbols are what merging works on: tokens, by their id, and after them parts of merges that are no tokens.
  struct Merge {
    int32_t rank = 0, result = 0;
  };
  struct Pair {
    int32_t left, right;
    bool operator==(const Pair&) const = default;
  };
  struct PairHash {
    size_t operator()(const Pair& pair) const {
      return (uint64_t(uint32_t(pair.left)) << 32 | uint32_t(pair.right)) * 0x9e3779b97f4a7c15ull >> 16;
    }
  };
  struct Link {
    int32_t symbol, previous, next;
  };
  struct Candidate {
    int32_t rank, at;
    Pair pair;
    int32_t result;
  };
  /// What merging one word after the other needs, kept so that it is allocated once.
  struct Work {
    std::vector<Link> links;
    std::vector<Candidate> queue;
  };

  int32_t symbol(const std::string& bytes);
  void merge(std::string_view word, Work& work, std::vector<int32_t>& out) const;
  void offer(int32_t at, Work& work) const;
  void emit(int32_t symbol, std::vector<int32_t>& out) const;

  Splitter splitter_;
  int32_t tokens_ = 0;
  std::unordered_map<std::string, int32_t> symbols_;
  std::vector<std::string> part_bytes_;  // of symbols past the tokens
  int32_t byte_symbol_[256];
  std::unordered_map<Pair, Merge, PairHash> merges_;
};

}  // namespace heed
