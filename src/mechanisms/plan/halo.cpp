#include <algorithm>

#include "attention/patterns.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// HaloNet (Vaswani et al., 2021): the queries of a square of a map share the square's keys and those of a rim around
// it. What the rim lacks at a border is hidden (the authors pad with keys of zero). Relative embeddings belong to the
// model.
struct Halo final : Mechanism {
  int64_t width, block, halo;

  static std::vector<ParamInfo> params() {
    using M = Halo;
    return {
        param<M, int64_t>(&M::width, "width", 32, 1, 1 << 30, "tokens of a row of the map"),
        param<M, int64_t>(&M::block, "block", 8, 1, 1 << 30, "side of a square"),
        param<M, int64_t>(&M::halo, "halo", 3, 0, 1 << 30, "width of the rim"),
    };
  }

  Plan plan(LayerView& at) const override {
    return pattern_plan(at, [this](int64_t i, int64_t m, const AddKeys& add) {
      const TokenMap map{0, width};
      const int64_t top = map.row(i) / block * block - halo, left = map.column(i) / block * block - halo;
      const int64_t side = block + 2 * halo;
      for (int64_t y = std::max<int64_t>(0, top); y < std::min(top + side, map.rows(m)); ++y)
        map.add(add, y, left, left + side);
    });
  }
};

}  // namespace

Entry halo() {
  Entry e = entry<Halo>("halo", "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
                        "Vaswani et al., 2021, arXiv 2103.12731", 2021, uint8_t(Role::Plan));
  e.equation = "(y, x) sees b ⌊y / b⌋ − h ≤ y' < b ⌊y / b⌋ + b + h, and likewise in x";
  e.needs = "nothing";
  e.identity = "halo(block=1000000000,halo=0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
