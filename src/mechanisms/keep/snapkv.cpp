#include "mechanisms/keep/snapkv.h"

#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

std::vector<ParamInfo> SnapKV::params() {
  using M = SnapKV;
  return keep_params<M>(
      "1024", "prompt",
      {
          param(&M::window, "window", 32, 1, 4096, "last queries, which vote and whose keys stay"),
          param(&M::kernel, "kernel", 5, 1, 63, "width of the smoothing over keys, odd"),
          param(&M::pool, "pool", {"avg", "max"}, 0, "how votes are smoothed (the authors' long runs: max, kernel 7)"),
          param(&M::group, "group", {"mean", "max"}, 0, "over the query heads that share a KV head"),
      });
}

std::string SnapKV::check() const {
  if (kernel % 2 == 0) return "kernel=" + std::to_string(kernel) + " is even: a smoothing width has a middle";
  return too_small(budget, window, "window");
}

Ragged SnapKV::score(LayerView& at) const {
  Observe how;
  how.rows = rows;
  how.heads = group.value ? Observe::Heads::GroupMax : Observe::Heads::GroupMean;
  const Ragged votes = at.observe(at.last_queries(window + look), how);
  // Only keys before the window compete, and the smoothing ends where they end.
  std::vector<int64_t> recent = affordable(at, budget, window);
  for (int64_t& count : recent) count += look;
  Ragged smoothed = at.per_entry();
  at.run().smooth(at.queue, without_last(at.queue, votes, recent), pool.value ? PoolKind::Max : PoolKind::Mean, kernel,
                  smoothed.values);
  force_last(at.queue, smoothed, recent);
  if (look > 0)
    compute(at.queue, smoothed, pick(place() >= length() - look, -kInfinity, load(smoothed.values, index())), smoothed.values);
  return smoothed;
}

Entry snapkv() {
  Entry e = entry<SnapKV>("snapkv", "SnapKV: LLM Knows What You are Looking for Before Generation",
                          "Li et al., 2024, arXiv 2404.14469", 2024, uint8_t(Role::Keep));
  e.equation =
      "s_j = pool_k(mean over the last w rows i and the group of P_ij); keep top (C − w) of j < L − w, and the last w";
  e.needs = "nothing";
  e.identity = "snapkv(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
