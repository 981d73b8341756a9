#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Chunk-local eviction (kvpress, after Corallo and Papotti, 2024): every chunk of the text keeps the same share of its own
// entries, so that no part of it is lost. Scores are those of the whole text (kvpress scores every chunk alone). A
// budget of entries is the share of the length that it is.
struct ChunkLocal final : KeepWrapper {
  int chunk;

  static std::vector<ParamInfo> params() {
    return {param(&ChunkLocal::chunk, "chunk", 1024, 1, 1 << 20, "entries of a chunk; the last may be shorter")};
  }

  // 1 for what stays.
  Ragged score(LayerView& at) const override {
    const Ragged ranks = spread(at.queue, inner->score(at), {.of = Spread::Of::Rank, .block = chunk});
    const Num begin = place() - mod(place(), chunk), size = min(chunk, length() - begin);
    const Budget& b = inner->kept();
    const Num kept = b.fraction ? granted(b, size) : max(1, floor(size * min(1, b.amount / length()) + 1e-9));
    compute(at.queue, ranks, load(ranks.values, index()) >= size - kept, ranks.values);
    return ranks;
  }
  bool unbounded() const override { return true; }
  Tensor allocate(const Allocation& a) const override { return passing(a, 1); }
};

}  // namespace

Entry chunk_local() {
  Entry e = entry<ChunkLocal>("chunk-local", "Chunk-wise eviction, as in kvpress",
                              "Corallo and Papotti, 2024, arXiv 2408.00167", 2024, uint8_t(Role::Keep));
  e.equation =
      "of every chunk of c entries keep the top max(1, ⌊c r⌋) by the inner score, r the budget's share of the text";
  e.needs = "a keep policy inside";
  e.identity = "chunk-local(snapkv(budget=1.0))";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
