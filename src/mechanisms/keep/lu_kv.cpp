#include <algorithm>
#include <cmath>
#include <numeric>

#include "attention/number_list.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// LU-KV (2026): what each head can do without is a matter of the model and the budget, measured once; a layer's heads
// lose what the curve of the budget says, rounded so that the layer's total holds. The curve is given, its row for
// the budget at hand alone. Entries of a head go by the inner score, expected-attention(eps=0.02) in the paper.
struct LuKv final : KeepWrapper {
  NumberList lost;
  int sinks, recent;

  static std::vector<ParamInfo> params() {
    using M = LuKv;
    return {
        param(&M::lost, "lost", "list", "", "[x,…], 0…1",
              "share of its entries that each KV head loses, layer by layer; what the budget leaves out if empty"),
        param(&M::sinks, "sinks", 4, 0, 1 << 20, "first entries that always stay"),
        param(&M::recent, "recent", 1, 0, 1 << 20, "latest entries that always stay"),
    };
  }
  std::string check() const override {
    for (double x : lost.values)
      if (x > 1) return "lost=" + detail::number_text(x) + " is more than all: shares are 0 to 1";
    return inner->check();
  }

  Ragged score(LayerView& at) const override { return force(at.queue, inner->score(at), sinks, recent); }

  /// Entries of the heads of a layer, for a prompt of `length`.
  std::vector<int64_t> granted_to(const Allocation& a, int64_t layer, int64_t length) const {
    const size_t g = size_t(a.model.g), all = g * size_t(a.model.layers);
    if (!lost.values.empty() && lost.values.size() != all)
      throw Error(Code::Invalid, "lu-kv",
                  "lost has " + std::to_string(lost.values.size()) + " shares, but the model has " +
                      std::to_string(all) + " KV heads",
                  "give one for each, layer by layer");
    const double own = double(std::min(length, a.budget.entries(length)));
    std::vector<double> wanted;
    for (size_t head = 0; head < g; ++head)
      wanted.push_back(lost.values.empty() ? own : (1 - lost.values[size_t(layer) * g + head]) * double(length));
    const double sum = std::accumulate(wanted.begin(), wanted.end(), 0.0);
    int64_t over = std::clamp<int64_t>(std::llrint(sum), int64_t(g), int64_t(g) * length);
    std::vector<int64_t> out;
    for (double x : wanted) out.push_back(int64_t(std::floor(x + 1e-9))), over -= out.back();
    std::vector<size_t> order(g);
    std::iota(order.begin(), order.end(), size_t(0));
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t x, size_t y) { return wanted[x] - double(out[x]) > wanted[y] - double(out[y]) + 1e-9; });
    for (size_t i = 0; i < g && over > 0; ++i, --over) ++out[order[i]];
    for (int64_t& x : out) x = std::clamp<int64_t>(x, 1, std::max<int64_t>(1, length));
    return out;
  }

  bool unbounded() const override { return true; }
  Tensor allocate(const Allocation& a) const override {
    const int64_t layers = int64_t(a.scores.size());
    std::vector<int32_t> counts;
    for (int64_t l = 0; l < layers; ++l)
      for (const int64_t length : a.prompt)
        for (const int64_t count : granted_to(a, a.first_layer + l, length)) counts.push_back(int32_t(count));
    return a.queue.upload(counts).reshape({layers, int64_t(counts.size()) / layers});
  }
};

}  // namespace

Entry lu_kv() {
  Entry e = entry<LuKv>(
      "lu-kv", "Predicting Future Utility: Global Combinatorial Optimization for Task-Agnostic KV Cache Eviction",
      "2026, arXiv 2602.08585", 2026, uint8_t(Role::Keep));
  e.equation = "n_h = ⌊(1 − lost_h) L⌋, and 1 more for the largest remainders until Σ n_h = round(Σ (1 − lost_h) L)";
  e.needs = "a keep policy inside, and a calibrated curve (lost=) for the budget";
  e.identity = "lu-kv(expected-attention(budget=1.0))";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
