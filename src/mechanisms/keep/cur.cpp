#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// CurDKV (2025) as in kvpress: the share that a key's and a value's squared norm have in their block stand for leverage. A
// short last block is divided by fewer terms, as there; an all-zero block scores 0 (NaN there).
struct Cur final : KeepPolicy {
  int sinks, block;
  Choice leverage;

  static std::vector<ParamInfo> params() {
    using M = Cur;
    return keep_params<M>(
        "1024", "prompt",
        {
            param(&M::sinks, "sinks", 4, 0, 1 << 20, "first entries that always stay"),
            param(&M::block, "block", 16, 0, 1 << 20, "entries whose norms are compared; 0: all"),
            param(&M::leverage, "leverage", {"product", "key", "value", "mean"}, 0, "of the two shares"),
        });
  }
  std::string check() const override { return too_small(budget, sinks, "sinks"); }

  Ragged score(LayerView& at) const override {
    Spread local;
    local.block = block;
    const Ragged keys = stored_keys(at), values = stored_values(at);
    const Ragged k = shares(at.queue, row_dots(at.queue, keys, keys), local),
                 v = shares(at.queue, row_dots(at.queue, values, values), local);
    const Ragged both = leverage.value == 1 ? k
                        : leverage.value == 2
                            ? v
                            : combine(at.queue, k, v, leverage.value == 3 ? Combine::Add : Combine::Multiply);
    return force(at.queue, shares(at.queue, both), sinks, 0);
  }
};

}  // namespace

Entry cur() {
  Entry e = entry<Cur>("cur", "Value-Guided KV Compression for LLMs via Approximated CUR Decomposition",
                       "2025, arXiv 2509.15038", 2025, uint8_t(Role::Keep));
  e.equation = "keep the top B of (‖k_j‖² / Σ_block ‖k‖²) (‖v_j‖² / Σ_block ‖v‖²)";
  e.needs = "nothing";
  e.identity = "cur(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
