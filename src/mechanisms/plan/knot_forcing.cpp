#include <algorithm>

#include "attention/patterns.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Knot Forcing (Xiao et al., 2025), what a chunk of a growing video sees: a reference that never leaves, the latest
// frames before the chunk, and the chunk itself as a whole (without causality; a text's tokens see those before
// them). The knot, the frames that two chunks denoise both, and the reference's place ahead of the video are the
// sampler's and the encoder's business. Sizes are ours: no code is released.
struct KnotForcing final : Mechanism {
  int64_t frame, frames, reference, window;

  static std::vector<ParamInfo> params() {
    using M = KnotForcing;
    return {
        param<M, int64_t>(&M::frame, "frame", 1560, 1, 1000000000, "tokens of a frame"),
        param<M, int64_t>(&M::frames, "frames", 3, 1, 1 << 20, "frames of a chunk"),
        param<M, int64_t>(&M::reference, "reference", 1, 0, 1 << 20,
                          "first frames, which all see; chunks begin behind them"),
        param<M, int64_t>(&M::window, "window", 6, 0, 1000000000,
                          "latest frames before its own chunk that a chunk sees"),
    };
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = true;
    return n;
  }

  Plan plan(LayerView& at) const override {
    return pattern_plan(at, [this](int64_t i, int64_t, const AddKeys& add) {
      const int64_t from = reference * frame, chunk = frame * frames;
      add(0, from);
      if (i < from) return;
      const int64_t first = from + (i - from) / chunk * chunk;
      add(std::max(from, first - window * frame), first + chunk);
    });
  }
};

}  // namespace

Entry knot_forcing() {
  Entry e = entry<KnotForcing>("knot-forcing",
                               "Knot Forcing: Taming Autoregressive Video Diffusion Models for Real-time Infinite "
                               "Interactive Portrait Animation",
                               "Xiao et al., 2025, arXiv 2512.21734", 2025, uint8_t(Role::Plan));
  e.equation = "a token of chunk u sees the reference, the last w frames before u, and u";
  e.needs = "the whole prompt";
  e.identity = "knot-forcing(window=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
