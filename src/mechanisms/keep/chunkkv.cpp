#include "attention/scores.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// ChunkKV (Liu et al., 2025): entries stay or go by chunks, which share the mean over their entries of the inner score
// summed over KV heads; all heads keep the same. The best chunks fill the budget, of the last one its first entries (the
// library counts whole chunks). The paper's reuse of choices by the next layer is left out, as in kvpress.
struct ChunkKV final : KeepWrapper {
  int chunk;

  static std::vector<ParamInfo> params() {
    return {param(&ChunkKV::chunk, "chunk", 20, 1, 1 << 20,
                  "entries that stay or go together; the last chunk may be shorter")};
  }

  Ragged score(LayerView& at) const override {
    const Ragged heads = spread(at.queue, inner->score(at), {.of = Spread::Of::Sum, .over = Spread::Over::Heads});
    return spread(at.queue, heads, {.of = Spread::Of::Mean, .block = chunk});
  }
};

}  // namespace

Entry chunkkv() {
  Entry e = entry<ChunkKV>("chunkkv",
                           "ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference",
                           "Liu et al., 2025, arXiv 2502.00299", 2025, uint8_t(Role::Keep));
  e.equation = "s(chunk) = mean over its entries of Σ over KV heads of the inner score; keep the best chunks";
  e.needs = "a keep policy inside";
  e.identity = "chunkkv(snapkv(budget=1.0))";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
