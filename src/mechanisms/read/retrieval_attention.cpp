#include "attention/reads.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// RetrievalAttention (Liu et al., 2024): first and latest entries are read whole, and of the rest each query head
// retrieves the keys of largest inner product. Retrieval is exact, as in the vector retrieval of MInference's
// repository (which takes 2000): what a search of the paper's graph, whose degree and width are not given,
// approaches. What was generated counts as latest, as there.
struct RetrievalAttention final : Mechanism {
  int64_t topk, sinks, recent;
  int first_dense;

  static std::vector<ParamInfo> params() {
    using M = RetrievalAttention;
    return {
        param<M, int64_t>(&M::topk, "topk", 100, 0, 1000000000, "entries that a query head retrieves"),
        param<M, int64_t>(&M::sinks, "sinks", 128, 0, 1 << 30, "first entries, which are always read"),
        param<M, int64_t>(&M::recent, "recent", 512, 0, 1 << 30, "latest entries of the prompt, which are always read"),
        dense_layers_param(&M::first_dense, 0),
    };
  }

  Read read(LayerView& at) const override {
    if (reads_all(at, first_dense)) return {};
    const int64_t latest = recent + at.step() + 1;
    const std::vector<int64_t> counts(at.prompt.size(), sinks + latest + topk);
    return best_entries(at, Plan::Scope::QueryHead, force(at.queue, last_logits(at, at.q), sinks, latest), counts);
  }
};

}  // namespace

Entry retrieval_attention() {
  Entry e = entry<RetrievalAttention>(
      "retrieval-attention", "RetrievalAttention: Accelerating Long-Context LLM Inference via Vector Retrieval",
      "Liu et al., 2024, arXiv 2409.10516", 2024, uint8_t(Role::Read));
  e.equation = "read {0 … s − 1}, the last w and what was generated, and the top K of q · k_j over the rest";
  e.needs = "nothing";
  e.identity = "retrieval-attention(topk=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
