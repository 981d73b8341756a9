#include <algorithm>

#include "attention/number_list.h"
#include "attention/patterns.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// A prompt in segments: an instruction that all see, documents that see the instruction and themselves, and behind them a
// query that sees all. Where documents begin is given; without a list they have one length.
struct Segmented : Mechanism {
  NumberList lengths;
  int64_t block, query, instruction = 0;

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = true;
    return n;
  }
  std::string check() const override {
    for (double x : lengths.values)
      if (x != double(int64_t(x)) || x < 1 || x > 1e9) return "segments are whole numbers of tokens";
    return {};
  }

  /// The first token of the document that token i is in, −1 for the query.
  int64_t document(int64_t i, int64_t m) const {
    int64_t first = instruction;
    if (i < first) return 0;
    if (lengths.values.empty()) return i >= m - query ? -1 : first + (i - first) / block * block;
    for (double length : lengths.values) {
      if (i < first + int64_t(length)) return first;
      first += int64_t(length);
    }
    return -1;
  }

  Plan plan(LayerView& at) const override {
    return pattern_plan(at, [this](int64_t i, int64_t m, const AddKeys& add) {
      add(0, instruction);
      add(std::max<int64_t>(0, document(i, m)), i + 1);
    });
  }

  template <class M>
  static std::vector<ParamInfo> documents(int64_t block) {
    return {
        param(&M::lengths, "segments", "list", "", "[x,…] whole numbers",
              "tokens of each document; what comes behind them is the query"),
        param<M, int64_t>(&M::block, "block", block, 1, 1000000000, "without a list: tokens of every document"),
        param<M, int64_t>(&M::query, "query", 64, 0, 1 << 30, "without a list: last tokens, which are the query"),
    };
  }
};

// Block-Attention (2024), the mask that its separately computed blocks amount to: positions are those of the whole text,
// as with keys rotated to where a block is used.
struct BlockAttention final : Segmented {
  static std::vector<ParamInfo> params() { return documents<BlockAttention>(512); }
};

// BlockRank (2025), its mask: documents see the instruction as well. Documents that share positions, and ranking by one
// layer's attention, belong to its fine-tuned model.
struct BlockRank final : Segmented {
  static std::vector<ParamInfo> params() {
    auto all = documents<BlockRank>(160);
    all.push_back(param<BlockRank, int64_t>(&BlockRank::instruction, "instruction", 160, 0, 1 << 30,
                                            "first tokens, which every document sees"));
    return all;
  }
};

}  // namespace

Entry block_attention() {
  Entry e = entry<BlockAttention>("block_attention", "Block-Attention for Efficient RAG", "2024, arXiv 2409.15355",
                                  2024, uint8_t(Role::Plan));
  e.equation = "a token of document D sees D's tokens before it; the query sees all";
  e.needs = "the whole prompt, and where documents begin";
  e.identity = "block_attention(block=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

Entry blockrank() {
  Entry e = entry<BlockRank>("blockrank", "Scalable In-context Ranking with Generative Models",
                             "2025, arXiv 2510.05396", 2025, uint8_t(Role::Plan));
  e.equation = "a token of document D sees the instruction and D's tokens before it; the query sees all";
  e.needs = "the whole prompt, and where documents begin";
  e.identity = "blockrank(block=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
