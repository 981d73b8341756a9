#include <cmath>

#include "attention/patterns.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// CLEAR (Liu et al., 2024): image tokens see those within a circle around them, and text. The pooled keys of its variant
// have learned weights and belong to the model.
struct ClearDisc final : Mechanism {
  int64_t width, radius, text;

  static std::vector<ParamInfo> params() {
    using M = ClearDisc;
    return {
        param<M, int64_t>(&M::width, "width", 64, 1, 1 << 30, "tokens of a row of the map"),
        param<M, int64_t>(&M::radius, "radius", 8, 1, 1000000000, "of the circle; what lies on it is not seen"),
        param<M, int64_t>(&M::text, "text", 512, 0, 1 << 30, "first tokens, which lie before the map and see all"),
    };
  }

  Plan plan(LayerView& at) const override {
    return pattern_plan(at, [this](int64_t i, int64_t m, const AddKeys& add) {
      const TokenMap map{text, width};
      add(0, i < text ? m : text);
      if (i < text) return;
      const int64_t y = map.row(i), x = map.column(i);
      for (int64_t row = std::max<int64_t>(0, y - radius + 1); row < std::min(y + radius, map.rows(m)); ++row) {
        const int64_t left = radius * radius - (row - y) * (row - y);  // dx² < left
        int64_t reach = int64_t(std::sqrt(double(left)));
        while (reach * reach >= left) --reach;
        map.add(add, row, x - reach, x + reach + 1);
      }
    });
  }
};

}  // namespace

Entry clear_disc() {
  Entry e = entry<ClearDisc>("clear-disc", "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up",
                             "Liu et al., 2024, arXiv 2412.16112", 2024, uint8_t(Role::Plan));
  e.equation = "(y, x) sees (y', x') iff (y − y')² + (x − x')² < r²; text sees all and is seen by all";
  e.needs = "nothing";
  e.identity = "clear-disc(radius=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
