#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// FINCH (Corallo and Papotti, 2024): the prompt ends in the question, and its tokens vote; a row's weights count as many
// times as it sees keys before it, so that late rows do not count less for seeing more. The paper reads the context part by
// part with the question behind each; here the question is where it is, behind all. rerotate(finch) closes the gaps as the
// paper does.
struct Finch final : KeepPolicy {
  int window;
  bool weighted;

  static std::vector<ParamInfo> params() {
    using M = Finch;
    return keep_params<M>("1024", "prompt",
                          {
                              param(&M::window, "window", 32, 1, 4096, "tokens of the question, which stay"),
                              param(&M::weighted, "weighted", true, "rows times the keys they see; false: all alike"),
                          });
  }
  std::string check() const override {
    if (when.decodes()) return "when=every(n): a decoded token has no question behind it; when=prompt or chunk";
    return too_small(budget, window, "window");
  }

  Ragged score(LayerView& at) const override {
    const Ragged rows = row_weights(at, window);
    const Num before = length() - window + mod(segment(), window);
    if (weighted) compute(at.queue, rows, load(rows.values, index()) * max(0, before), rows.values);
    return force_last(at.queue, over_runs(at, rows, Spread::Of::Mean), affordable(at, budget, window));
  }
};

}  // namespace

Entry finch() {
  Entry e = entry<Finch>("finch", "FINCH: Prompt-guided Key-Value Cache Compression for Large Language Models",
                         "Corallo and Papotti, 2024, arXiv 2408.00167", 2024, uint8_t(Role::Keep));
  e.equation = "s_j = mean over the question's rows i and the group of i P_ij, i the keys before the row";
  e.needs = "the question at the prompt's end, `window` tokens of it";
  e.identity = "finch(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
