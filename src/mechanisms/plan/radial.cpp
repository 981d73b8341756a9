#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>

#include "attention/patterns.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Radial Attention (Li et al., 2025): in frames farther away a token sees a band that halves with every doubling of the
// distance, and frames whose band has become thin are seen once in a while. Bands are rounded to tiles: a tile is read
// whole where most of the keys it touches are in the band of more than a third of its queries. Every tile that a pair of
// frames touches is looked at (the released code drops the last one of some frames that do not begin with a tile). Of text
// frames are stretches of `frame` tokens: our extension, not the paper's.
struct Radial final : Mechanism {
  int64_t frame, block, text;
  double decay;
  bool sink;

  static std::vector<ParamInfo> params() {
    using M = Radial;
    return {
        param<M, int64_t>(&M::frame, "frame", 1560, 1, 1000000000, "tokens of a frame"),
        param<M, int64_t>(&M::block, "block", 128, 1, 1 << 16, "queries and keys of a tile"),
        param(&M::decay, "decay", 1, 1e-6, 1e6, "factor of the bands' width in frames that are no neighbours"),
        param(&M::sink, "sink", false, "the first frame is seen whole"),
        param<M, int64_t>(&M::text, "text", 0, 0, 1 << 30, "last tokens, which lie behind the frames and see all"),
    };
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = true;
    return n;
  }

  /// Tokens r, c of frames `distance` apart see each other iff |r − c| ≤ width; −1: none do.
  double width(int64_t distance) const {
    const int bands = int(std::bit_width(uint64_t(distance)));
    const double base = std::ldexp(1.0, int(std::bit_width(uint64_t(frame))) - bands);
    if (base < 128 && distance % int64_t(128 / base) != 0) return -1;
    return distance <= 1 ? double(frame) : std::max(base * decay, double(block));
  }

  /// The tiles of tokens 0 … m − 1, row by row.
  std::vector<bool> tiles(int64_t m) const {
    const int64_t side = (m + block - 1) / block, video = std::max<int64_t>(0, m - text);
    std::vector<bool> read(size_t(side * side), false);
    for (int64_t q0 = 0; q0 < video; q0 += frame)
      for (int64_t k0 = 0; k0 < video; k0 += frame) {
        const double band = k0 == 0 && sink ? double(frame) : width(std::abs(q0 - k0) / frame);
        const int64_t q1 = std::min(q0 + frame, video), k1 = std::min(k0 + frame, video);
        for (int64_t i = q0 / block; band >= 0 && i * block < q1; ++i)
          for (int64_t j = k0 / block; j * block < k1; ++j) {
            int64_t touched = 0, dense = 0;
            for (int64_t key = std::max(k0, j * block); key < std::min(k1, (j + 1) * block); ++key) {
              // Queries of tile and frame within the band around the key's place in its frame.
              const int64_t low = std::max({q0, i * block, q0 + int64_t(std::ceil(double(key - k0) - band))}),
                            high = std::min({q1, (i + 1) * block, q0 + int64_t(std::floor(double(key - k0) + band)) + 1});
              touched += high > low;
              dense += (high - low) * 3 > std::min(block, video - i * block);
            }
            if (double(dense) > 0.6 * double(touched)) read[size_t(i * side + j)] = true;
          }
      }
    return read;
  }

  Plan plan(LayerView& at) const override {
    std::vector<bool> read;
    int64_t of = -1;  // the number of keys that `read` is for
    return pattern_plan(at, [&](int64_t i, int64_t m, const AddKeys& add) {
      if (of != m) read = tiles(m), of = m;
      add(i >= m - text ? 0 : m - text, m);
      const int64_t side = (m + block - 1) / block;
      for (int64_t j = 0; j < side; ++j)
        if (read[size_t(i / block * side + j)]) add(j * block, (j + 1) * block);
    });
  }
};

}  // namespace

Entry radial() {
  Entry e = entry<Radial>("radial",
                          "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation",
                          "Li et al., 2025, arXiv 2506.19852", 2025, uint8_t(Role::Plan));
  e.equation =
      "frames D apart: |r − c| ≤ decay · 2^(bits(T) − bits(D)), at least a tile; where that is less than 128, only "
      "every (128 / it)-th D";
  e.needs = "the whole prompt";
  e.identity = "radial(frame=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
