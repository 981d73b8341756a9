// Plans known from shapes alone, against their masks written out.
#include <bit>

#include "harness.h"

namespace heed::test {
namespace {

class Patterns : public Mechanisms {};
HEED_ON_ALL_SETTINGS(Patterns);

using Sees = std::function<bool(int64_t i, int64_t j)>;  // key numbers; j ≤ i besides

/// The output is that of the mask, and the density its share of pairs.
void expect_mask(const Case& c, const std::string& spec, const std::string& backend, const Sees& sees) {
  const ApplyOutput out = c.run(spec, backend);
  EXPECT_LT(c.error(out, [&](int64_t, int64_t i, int64_t j) { return sees(c.first() + i, j); }), kExact) << spec;
}

TEST_P(Patterns, IdentityIsDense) {
  for (const Shape s : {shape(150, 150), shape(1, 1), shape(70, 200)}) {
    const Case c(s);
    for (const char* spec :
         {"a-shape(local=1000000000)", "tri-shape(local=1000000000)", "triangle-mix(local=1000000000)",
          "triangle-mix(from=1)", "power(local=1000000000)", "star(block=1000000000)", "gna(window=1000000000)",
          "gna(window=300,stride=300)", "stochastic-sa(window=1000000000)", "stochastic-sa(window=400)"})
      EXPECT_LT(c.dense_error(c.run(spec, backend())), kExact) << spec;
  }
}

TEST_P(Patterns, ShapesAreSinksAndAWindow) {
  for (const Shape s : {shape(200, 200), shape(90, 231), shape(64, 64)}) {
    const Case c(s, 2);
    for (const auto& [sinks, local, last] : {std::tuple{4, 20, 0}, {0, 1, 0}, {70, 64, 10}, {8, 100, 65}}) {
      auto sees = [&, sinks = sinks, local = local](int64_t i, int64_t j) { return j < sinks || i - j < local; };
      const std::string range = "(sinks=" + std::to_string(sinks) + ",local=" + std::to_string(local);
      expect_mask(c, "a-shape" + range + ")", backend(), sees);
      auto tri = [&, last = last](int64_t i, int64_t j) { return sees(i, j) || i >= s.m - last; };
      expect_mask(c, "tri-shape" + range + ",last=" + std::to_string(last) + ")", backend(), tri);
      expect_mask(c, "triangle-mix" + range + ",from=0,last=" + std::to_string(last) + ")", backend(), tri);
    }
  }
}

TEST_P(Patterns, PowerSeesPowersOfTwo) {
  for (const Shape s : {shape(300, 300), shape(50, 260)}) {
    const Case c(s, 3);
    for (const auto& [block, local, sinks] : {std::tuple{16, 2, 1}, {7, 1, 0}, {1, 3, 2}})
      expect_mask(c,
                  "power(block=" + std::to_string(block) + ",local=" + std::to_string(local) +
                      ",sinks=" + std::to_string(sinks) + ")",
                  backend(), [block = block, local = local, sinks = sinks](int64_t i, int64_t j) {
                    const int64_t x = i / block - j / block;
                    return x == 0 || std::has_single_bit(uint64_t(x)) || x < local || j / block < sinks;
                  });
  }
}

TEST_P(Patterns, StarSeesAnchorAndBlock) {
  for (const Shape s : {shape(210, 210), shape(33, 150)}) {
    const Case c(s, 4);
    for (const auto& [block, anchor, query] : {std::tuple{50, 0, 0}, {50, 9, 20}, {64, 64, 1}})
      expect_mask(c,
                  "star(block=" + std::to_string(block) + ",anchor=" + std::to_string(anchor) +
                      ",query=" + std::to_string(query) + ")",
                  backend(), [&s, block = block, anchor = anchor ? anchor : block, query = query](int64_t i, int64_t j) {
                    return j < anchor || j >= i / block * block || i >= s.m - query;
                  });
  }
}

TEST_P(Patterns, GnaIsItsCausalAxis) {
  for (const Shape s : {shape(200, 200), shape(40, 171)}) {
    const Case c(s, 5);
    for (const auto& [window, stride, dilation] : {std::tuple{16, 1, 1}, {16, 16, 1}, {20, 6, 1}, {9, 1, 3}, {8, 3, 5}})
      expect_mask(c,
                  "gna(window=" + std::to_string(window) + ",stride=" + std::to_string(stride) +
                      ",dilation=" + std::to_string(dilation) + ")",
                  backend(), [&s, window = window, stride = stride, dilation = dilation](int64_t i, int64_t j) {
                    if (i % dilation != j % dilation) return false;
                    int64_t length = 0;  // of the group, counted
                    for (int64_t x = i % dilation; x < s.m; x += dilation) ++length;
                    // The last query of i's stretch that exists, and the window that ends there.
                    int64_t leader = i / dilation;
                    while ((leader + 1) % stride != 0 && leader + 1 < length) ++leader;
                    return j / dilation > leader - window;
                  });
  }
}

TEST_P(Patterns, StochasticSeesWithinAWindowOfAShuffledOrder) {
  for (const Shape s : {shape(130, 130), shape(40, 90)}) {
    const Case c(s, 6);
    for (const auto& [window, seed, left, circular] :
         {std::tuple{20, 0, false, false}, {20, 3, false, false}, {20, 0, false, true}, {11, 0, true, false}, {11, 5, true, true}}) {
      std::vector<int64_t> order(size_t(s.m)), rank(size_t(s.m));
      std::iota(order.begin(), order.end(), 0);
      Random random(uint64_t(seed) * 1000003u);  // of layer 0; a Fisher–Yates shuffle from the end
      for (int64_t i = s.m; i > 1; --i) std::swap(order[size_t(i - 1)], order[size_t(random.below(i))]);
      for (int64_t r = 0; r < s.m; ++r) rank[size_t(order[size_t(r)])] = r;
      const std::string spec = "stochastic-sa(window=" + std::to_string(window) + ",seed=" + std::to_string(seed) +
                               (left ? ",side=left" : "") + (circular ? ",circular=true)" : ")");
      expect_mask(c, spec, backend(), [&, window = window, left = left, circular = circular](int64_t i, int64_t j) {
        const int64_t behind = rank[size_t(i)] - rank[size_t(j)], around = ((behind % s.m) + s.m) % s.m;
        if (left) return circular ? around < window : behind >= 0 && behind < window;
        return circular ? std::min(around, s.m - around) <= window / 2 : std::abs(behind) <= window / 2;
      });
    }
  }
}

}  // namespace
}  // namespace heed::test
