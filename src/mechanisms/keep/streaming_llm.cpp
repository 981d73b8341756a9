#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// StreamingLLM (Xiao et al., 2023): the first `sinks` and the latest entries stay, and keys are read at their place in the
// cache. While decoding the cut comes before the new token, so a query never sees more than the budget (the released
// perplexity script cuts behind the step and sees one more).
struct StreamingLLM final : KeepPolicy {
  int sinks;
  int64_t window;

  static std::vector<ParamInfo> params() {
    using M = StreamingLLM;
    return keep_params<M>("1024", "every(1)",
                          {
                              param(&M::sinks, "sinks", 4, 0, 1 << 20, "first entries that always stay"),
                              param(&M::window, "window", 0, 0, 1000000000,
                                    "latest entries that stay; 0: what the budget leaves beside the sinks"),
                          });
  }
  std::string check() const override { return window > 0 ? "" : too_small(budget, sinks + 1, "sinks + 1"); }

  bool makes_room() const override { return true; }

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.plain_keys = true;
    n.positions = Read::Positions::Cache;
    return n;
  }

  // Age itself is the score.
  Ragged score(LayerView& at) const override { return by_age(at, sinks); }

  int64_t entries(const Budget& kept, const ModelInfo&, int, int64_t length) const override {
    return window > 0 ? sinks + window : kept.entries(length);
  }
};

}  // namespace

Entry streaming_llm() {
  Entry e = entry<StreamingLLM>("streaming-llm", "Efficient Streaming Language Models with Attention Sinks",
                                "Xiao et al., 2023, arXiv 2309.17453", 2023, uint8_t(Role::Keep));
  e.equation = "keep {0 … s − 1} ∪ the last r entries; key i of the cache is rotated at i";
  e.needs = "keys kept before rotation";
  e.identity = "streaming-llm(window=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
