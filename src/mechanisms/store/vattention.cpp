#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// vAttention (Prabhu et al., 2024): a request's entries lie end to end in address space that is reserved once, and memory is
// mapped behind them as they come. Attention is what it was. heed reserves a slot for every (sequence, layer, KV head), since
// heads may hold unequal numbers of entries, and keys and values of 64 entries lie side by side in it; the authors have one
// for each layer's keys and one for its values, all heads together. Of the slots that ended texts left, one is taken
// whose mapping suffices with the least, as the paper says (the released code starts from the first free slot, and leaves
// it only for a smaller one). A fork has slots of its own and copies what is held. What a cut leaves unused is unmapped.
struct VAttention final : Mechanism {
  int page, context, ahead, pool;

  static std::vector<ParamInfo> params() {
    using M = VAttention;
    return {
        param(&M::page, "page", 2048, 4, 1 << 20, "KiB that are mapped at a time: a multiple of the device's own pages"),
        param(&M::context, "context", 0, 0, 1 << 26,
              "entries that a KV head may come to hold; 0: the model's context, or 131072"),
        param(&M::ahead, "ahead", 1, 0, 9,
              "decode steps whose memory is mapped beforehand; beyond the next one until two groups are"),
        param(&M::pool, "pool", 0, 0, 1 << 30, "MiB that may be mapped at once; 0: what the machine has"),
    };
  }
  std::string check() const override {
    if (page % 4 != 0) return "page=" + std::to_string(page) + " is no multiple of 4 KiB";
    if (pool > 0 && int64_t(pool) * 1024 < page) return "pool=" + std::to_string(pool) + " is less than one page";
    return heads.all() ? "" : "heads=" + heads.text + ": a layer's heads have slots together";
  }

  Needs needs(const ModelInfo& m) const override {
    Needs n;
    n.slots.group = int64_t(page) * 1024;
    n.slots.entries = context > 0 ? context : m.context > 0 ? m.context : 131072;
    n.slots.ahead = ahead;
    n.slots.most = int64_t(pool) * 1024 * 1024;
    return n;
  }
};

}  // namespace

Entry vattention() {
  Entry e = entry<VAttention>("vattention",
                              "vAttention: Dynamic Memory Management for Serving LLMs without PagedAttention",
                              "Prabhu et al., 2024, arXiv 2405.04437", 2024, uint8_t(Role::Store));
  e.equation = "a KV head of t entries holds ⌈bytes(t) / page⌉ · page bytes, end to end in a range reserved once";
  e.needs = "memory whose address space can be reserved";
  e.identity = "vattention";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
