#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// DuoAttention (Xiao et al., 2024): streaming KV heads hold sinks and the latest entries, at their true positions; the
// others hold all. Which heads stream is given: heads= names them, and a profile a list for each layer. A cut comes behind
// every part of a prompt and every token, so a prompt fed at once is read densely.
struct DuoAttention final : KeepPolicy {
  int sinks, recent;

  static std::vector<ParamInfo> params() {
    using M = DuoAttention;
    return {
        param(&M::sinks, "sinks", 64, 0, 1 << 20, "first entries that a streaming head holds"),
        param(&M::recent, "recent", 256, 1, 1000000000, "latest entries that a streaming head holds"),
    };
  }
  const When& timing() const override {
    static const When each{When::At::Every, 1};
    return each;
  }

  Ragged score(LayerView& at) const override { return by_age(at, sinks); }

  int64_t entries(const Budget&, const ModelInfo&, int, int64_t) const override { return int64_t(sinks) + recent; }
};

}  // namespace

Entry duo_attention() {
  Entry e = entry<DuoAttention>("duo-attention",
                                "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
                                "Xiao et al., 2024, arXiv 2410.10819", 2024, uint8_t(Role::Keep));
  e.equation = "streaming heads keep {0 … s − 1} ∪ the last r entries; the others keep all";
  e.needs = "which heads stream (heads=, a profile): `heed heads` finds those that retrieve";
  e.identity = "duo-attention(recent=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
