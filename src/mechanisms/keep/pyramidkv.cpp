#include <cmath>

#include "attention/select.h"
#include "mechanisms/entries.h"
#include "mechanisms/keep/snapkv.h"

namespace heed::mechanisms {

namespace {

// PyramidKV (Cai et al., 2024): SnapKV's scores, and budgets that fall from layer to layer around the same mean. The
// library's rule (kvpress) counts the window inside a layer's entries and keeps the mean; the authors' adds it on top.
struct PyramidKV final : SnapKV {
  double beta;
  Choice rule;

  static std::vector<ParamInfo> params() {
    using M = PyramidKV;
    std::vector<ParamInfo> all = SnapKV::params();
    all.push_back(
        param(&M::beta, "beta", 20, 1, 1e6, "the last layer gets about 1 / beta of the mean; 1: all layers alike"));
    all.push_back(param(&M::rule, "rule", {"library", "authors"}, 0, "how layer budgets are rounded and bounded"));
    return all;
  }

  int64_t entries(const Budget& budget, const ModelInfo& m, int layer, int64_t length) const override {
    const int layers = m.layers;
    const double w = window, l = double(length), mean = budget.fraction ? l * budget.amount : budget.amount;
    if (rule.value) {  // the authors': budget is C, the window comes on top of the prefix keys
      const double t = mean - w;
      if (l < mean || layers < 2) return int64_t(mean);
      if (l < 2 * t) return int64_t(t + w);
      double low = std::floor(t / beta), high = 2 * t - low;
      if (high >= l - w) high = l - w, low = 2 * t - high;
      return int64_t(high - layer * std::floor((high - low) / (layers - 1)) + w);
    }
    double low = mean / beta, high = 2 * mean - low;
    if (high >= l - w) high = l - w, low = 2 * mean - high;
    if (!(l >= high && high >= low && low >= w) || layers < 2)
      return std::max<int64_t>(1, int64_t(std::nearbyint(mean)));
    return int64_t(std::nearbyint(high - layer * (high - low) / (layers - 1)));
  }
};

}  // namespace

Entry pyramidkv() {
  Entry e = entry<PyramidKV>("pyramidkv",
                             "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
                             "Cai et al., 2024, arXiv 2406.02069", 2024, uint8_t(Role::Keep));
  e.equation = "snapkv, with n_l = round(hi − l (hi − lo) / (N − 1)), lo = B / β, hi = 2 B − lo";
  e.needs = "nothing";
  e.identity = "pyramidkv(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
