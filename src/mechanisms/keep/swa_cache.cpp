#include <algorithm>

#include "attention/scores.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// The window cache of llama.cpp: a layer whose model sees only the latest w positions holds no more than the next token
// can see, so nothing changes but the memory; other layers hold all. llama.cpp keeps a ring; here the oldest entries go
// every few tokens, which costs up to a page for each KV head and moves entries that much more seldom. A prompt's part
// sees what was held before it, so parts of any size do. Tokens taken back (truncate) leave the window short of as
// many entries, but for `spare`.
struct SwaCache final : KeepPolicy {
  int64_t spare;

  static std::vector<ParamInfo> params() {
    using M = SwaCache;
    return {
        param(&M::when, "when", "when", "every(64)", "prompt, chunk, every(n)", "when what the window has left goes"),
        param(&M::spare, "spare", 0, 0, 1000000000,
              "entries before the window that stay: as many tokens can be taken back exactly"),
    };
  }

  Ragged score(LayerView& at) const override { return by_age(at, 0); }

  int64_t entries(const Budget&, const ModelInfo& m, int layer, int64_t) const override {
    constexpr int64_t kAll = 1 << 30;
    return m.window(layer) > 0 ? std::min(kAll, m.window(layer) - 1 + spare) : kAll;
  }
};

}  // namespace

Entry swa_cache() {
  Entry e = entry<SwaCache>("swa-cache", "Sliding-window attention caches", "ggml-org, llama.cpp", 2025, uint8_t(Role::Keep));
  e.equation = "of a layer with window w keep the last w − 1 entries: a query at i sees j > i − w";
  e.needs = "nothing";
  e.identity = "swa-cache";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
