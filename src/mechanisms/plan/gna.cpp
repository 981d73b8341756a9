#include "attention/patterns.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Generalized Neighborhood Attention (Hassani et al., 2025) on one causal axis. Positions of equal remainder by `dilation`
// form a group; inside it the `stride` queries of a stretch share where their window starts. stride 1 is (dilated)
// neighbourhood attention, stride = window blocked attention.
struct Gna final : Mechanism {
  int64_t window, stride, dilation;

  static std::vector<ParamInfo> params() {
    using M = Gna;
    return {
        param<M, int64_t>(&M::window, "window", 1024, 1, 1000000000, "keys of a group that a stretch's last query sees"),
        param<M, int64_t>(&M::stride, "stride", 1, 1, 1000000000, "queries that share a window's start"),
        param<M, int64_t>(&M::dilation, "dilation", 1, 1, 1 << 20, "groups of positions that see only their own"),
    };
  }
  std::string check() const override {
    return stride <= window ? "" : "stride=" + std::to_string(stride) + " is more than window=" + std::to_string(window);
  }

  Plan plan(LayerView& at) const override {
    return pattern_plan(at, [this](int64_t i, int64_t m, const AddKeys& add) {
      const int64_t group = i % dilation, place = i / dilation, length = m / dilation + (group < m % dilation);
      const int64_t leader = std::min(place / stride * stride + stride - 1, length - 1),
                    start = std::max<int64_t>(0, leader - window + 1);
      if (dilation == 1) return add(start, i + 1);
      for (int64_t j = start; j <= place; ++j) add(group + j * dilation, group + j * dilation + 1);
    });
  }
};

}  // namespace

Entry gna() {
  Entry e = entry<Gna>("gna",
                       "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
                       "Hassani et al., 2025, arXiv 2504.16922", 2025, uint8_t(Role::Plan));
  e.equation = "in a dilation group: c = min(s ⌊i / s⌋ + s − 1, L − 1), i sees max(c − w + 1, 0) … i";
  e.needs = "nothing";
  e.identity = "gna(window=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
