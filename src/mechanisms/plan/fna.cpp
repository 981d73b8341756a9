#include <algorithm>

#include "attention/patterns.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

/// A window of w of n places around place i, moved inward at the borders: Generalized Neighborhood Attention's axis with
/// stride 1. Even windows lean left.
std::pair<int64_t, int64_t> inward(int64_t i, int64_t n, int64_t w) {
  const int64_t start = std::clamp<int64_t>(i - w / 2, 0, std::max<int64_t>(0, n - w));
  return {start, std::min(start + w, n)};
}

// Faster Neighborhood Attention (Hassani et al., 2024) on the rows and columns of a map: a token sees the window × window
// tokens around it. With a dilation an axis falls into groups of every so many places, which see only their own.
struct Fna final : Mechanism {
  int64_t width, window, dilation, text;

  static std::vector<ParamInfo> params() {
    using M = Fna;
    return {
        param<M, int64_t>(&M::width, "width", 32, 1, 1 << 30, "tokens of a row of the map"),
        param<M, int64_t>(&M::window, "window", 7, 1, 1 << 30, "rows, and columns, that a token sees"),
        param<M, int64_t>(&M::dilation, "dilation", 1, 1, 1 << 20, "groups of places, on either axis"),
        param<M, int64_t>(&M::text, "text", 0, 0, 1 << 30, "first tokens, which lie before the map and see all"),
    };
  }

  Plan plan(LayerView& at) const override {
    return pattern_plan(at, [this](int64_t i, int64_t m, const AddKeys& add) {
      const TokenMap map{text, width};
      add(0, i < text ? m : text);
      if (i < text) return;
      const auto [top, bottom] = axis(map.row(i), map.rows(m));
      const auto [left, right] = axis(map.column(i), width);
      for (int64_t y = top; y < bottom; y += dilation) {
        if (dilation == 1) map.add(add, y, left, right);
        else
          for (int64_t x = left; x < right; x += dilation) map.add(add, y, x, x + 1);
      }
    });
  }

  /// The places that place i of n sees, `dilation` apart.
  std::pair<int64_t, int64_t> axis(int64_t i, int64_t n) const {
    const int64_t group = i % dilation, length = n / dilation + (group < n % dilation);
    const auto [start, end] = inward(i / dilation, length, window);
    return {start * dilation + group, (end - 1) * dilation + group + 1};
  }
};

// FreeSwim (Wu et al., 2025), the mask of its window branch: height and width of the trained size around a token, moved
// inward at the borders, in all frames. Its sharper softmax, and what it takes from a pass with full attention, belong to
// the pipeline.
struct FreeSwim final : Mechanism {
  int64_t width, height, half_width, half_height, text;

  static std::vector<ParamInfo> params() {
    using M = FreeSwim;
    return {
        param<M, int64_t>(&M::width, "width", 104, 1, 1 << 30, "tokens of a row of a frame"),
        param<M, int64_t>(&M::height, "height", 60, 1, 1 << 30, "rows of a frame"),
        param<M, int64_t>(&M::half_width, "half_width", 26, 0, 1 << 30, "columns seen on either side"),
        param<M, int64_t>(&M::half_height, "half_height", 15, 0, 1 << 30, "rows seen on either side"),
        param<M, int64_t>(&M::text, "text", 0, 0, 1 << 30, "first tokens, which lie before the frames and see all"),
    };
  }

  Plan plan(LayerView& at) const override {
    return pattern_plan(at, [this](int64_t i, int64_t m, const AddKeys& add) {
      const TokenMap map{text, width};
      add(0, i < text ? m : text);
      if (i < text) return;
      const auto [top, bottom] = inward(map.row(i) % height, height, 2 * half_height + 1);
      const auto [left, right] = inward(map.column(i), width, 2 * half_width + 1);
      for (int64_t frame = 0; frame < map.rows(m); frame += height)
        for (int64_t y = top; y < bottom; ++y) map.add(add, frame + y, left, right);
    });
  }
};

}  // namespace

Entry fna() {
  Entry e = entry<Fna>(
      "fna", "Faster Neighborhood Attention: Reducing the O(n²) Cost of Self Attention at the Threadblock Level",
      "Hassani et al., 2024, arXiv 2403.04690", 2024, uint8_t(Role::Plan));
  e.equation = "on each axis of the map: start = clamp(i − ⌊w / 2⌋, 0, L − w); i sees start … start + w − 1";
  e.needs = "nothing";
  e.identity = "fna(width=32,window=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

Entry freeswim() {
  Entry e = entry<FreeSwim>("freeswim",
                            "FreeSwim: Revisiting Sliding-Window Attention Mechanisms for Training-Free "
                            "Ultra-High-Resolution Video Generation",
                            "Wu et al., 2025, arXiv 2511.14712", 2025, uint8_t(Role::Plan));
  e.equation =
      "(t, y, x) sees (t', y', x') in the window of (2 d_h + 1) × (2 d_w + 1) around it, moved inward; every t'";
  e.needs = "nothing";
  e.identity = "freeswim(half_width=1000000,half_height=1000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
