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

/// The same without causality: the output is attention over exactly what `sees` admits.
void expect_map(const Case& c, const std::string& spec, const std::string& backend, const Sees& sees) {
  ApplyInput in = c.input(backend);
  in.causal = false;
  const ApplyOutput out = Case::run(spec, in);
  double worst = 0;
  for (int64_t head = 0; head < c.shape.h; ++head)
    for (int64_t i = 0; i < c.shape.n; ++i) {
      const auto expected = c.output(head, c.weights(head, i, [&](int64_t j) { return sees(c.first() + i, j); }));
      for (int64_t x = 0; x < c.shape.d_v; ++x)
        worst = std::max(worst, std::abs(expected[size_t(x)] - double(out.find("out")->view().at<float>(head, i, x))));
    }
  EXPECT_LT(worst, kExact) << spec;
}

/// Both ways.
void expect_either(const Case& c, const std::string& spec, const std::string& backend, const Sees& sees) {
  expect_mask(c, spec, backend, sees);
  expect_map(c, spec, backend, sees);
}

TEST_P(Patterns, IdentityIsDense) {
  for (const Shape s : {shape(150, 150), shape(1, 1), shape(70, 200)}) {
    const Case c(s);
    for (const char* spec : {"a-shape(local=1000000000)",
                             "tri-shape(local=1000000000)",
                             "triangle-mix(local=1000000000)",
                             "triangle-mix(from=1)",
                             "power(local=1000000000)",
                             "star(block=1000000000)",
                             "gna(window=1000000000)",
                             "gna(window=300,stride=300)",
                             "stochastic-sa(window=1000000000)",
                             "stochastic-sa(window=400)",
                             "fna(width=32,window=1000000000)",
                             "fna(width=7,window=300)",
                             "freeswim(half_width=1000000,half_height=1000000)",
                             "freeswim(width=5,height=9,half_width=2,half_height=4)",
                             "halo(block=1000000000,halo=0)",
                             "halo(halo=200)",
                             "clear-disc(radius=1000000000)",
                             "clear-disc(text=200)",
                             "tkl(chunk=1000000000)",
                             "tkl(overlap=200)",
                             "radial(frame=1000000000)",
                             "radial(text=200)",
                             "block_attention(block=1000000000)",
                             "block_attention(query=200)",
                             "block_attention(segments=[200])",
                             "blockrank(block=1000000000)",
                             "blockrank(instruction=200)",
                             "sinklora(groups=1,shifted=0)",
                             "sinklora(sinks=200)",
                             "knot-forcing(window=1000000000)",
                             "knot-forcing(frame=3,reference=100)"})
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

TEST_P(Patterns, SinkLoraShiftsTheGroupsOfItsLastHeads) {
  for (const Shape s : {shape(200, 200), shape(90, 231), shape(64, 64)}) {
    const Case c(s, 12);
    for (const auto& [groups, sinks, shifted] :
         {std::tuple{4, 4, 0.5}, {3, 0, 1.0}, {7, 2, 0.34}, {5, 1, 0.0}, {1, 0, 1.0}}) {
      const int64_t size = ceil_of(s.m, groups);
      const ApplyOutput out = c.run("sinklora(groups=" + std::to_string(groups) + ",sinks=" + std::to_string(sinks) +
                                        ",shifted=" + std::to_string(shifted) + ")",
                                    backend());
      EXPECT_LT(c.error(out,
                        [&, sinks = sinks, shifted = shifted](int64_t head, int64_t i, int64_t j) {
                          // Rolled back by half a group, as LongLoRA does, but that the ends do not meet.
                          const bool later = head >= s.h - int64_t(shifted * double(s.h));
                          const int64_t half = later ? size / 2 : 0, x = c.first() + i - half, y = j - half;
                          return j < sinks || (x < 0 && y < 0) || (x >= 0 && y >= 0 && x / size == y / size);
                        }),
                kExact)
          << groups << " groups";
    }
  }
}

TEST_P(Patterns, KnotForcingSeesReferenceWindowAndChunk) {
  for (const Shape s : {shape(150, 150), shape(40, 171)}) {
    const Case c(s, 13);
    for (const auto& [frame, frames, reference, window] :
         {std::tuple{7, 3, 1, 2}, {16, 1, 0, 0}, {5, 4, 2, 3}, {64, 1, 1, 1}, {1, 1, 3, 9}})
      expect_either(c,
                    "knot-forcing(frame=" + std::to_string(frame) + ",frames=" + std::to_string(frames) +
                        ",reference=" + std::to_string(reference) + ",window=" + std::to_string(window) + ")",
                    backend(),
                    [frame = frame, frames = frames, reference = reference, window = window](int64_t i, int64_t j) {
                      const int64_t x = i / frame - reference, y = j / frame - reference;  // frames of the video
                      if (y < 0) return true;
                      if (x < 0) return false;
                      return y / frames == x / frames || (y < x / frames * frames && y >= x / frames * frames - window);
                    });
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

// Generalized neighbourhood attention's rule for an axis, with stride 1: exactly `window` places of the group, moved
// inward.
bool near(int64_t i, int64_t j, int64_t length, int64_t window, int64_t dilation) {
  if (i % dilation != j % dilation) return false;
  std::vector<int64_t> group;
  for (int64_t x = i % dilation; x < length; x += dilation) group.push_back(x);
  if (int64_t(group.size()) <= window) return true;
  int64_t start = 0;
  while (start + window < int64_t(group.size()) && i / dilation - start > window / 2) ++start;
  return j / dilation >= start && j / dilation < start + window;
}

TEST_P(Patterns, FnaSeesItsNeighbourhoodOnAMap) {
  for (const Shape s : {shape(156, 156), shape(60, 156), shape(1, 91)}) {
    const Case c(s, 7);
    for (const auto& [width, window, dilation, text] :
         {std::tuple{13, 3, 1, 0}, {12, 5, 2, 0}, {13, 4, 1, 26}, {17, 3, 3, 3}}) {
      const int64_t rows = (s.m - text + width - 1) / width;
      expect_either(c,
                    "fna(width=" + std::to_string(width) + ",window=" + std::to_string(window) +
                        ",dilation=" + std::to_string(dilation) + ",text=" + std::to_string(text) + ")",
                    backend(), [=, width = width, window = window, dilation = dilation, text = text](int64_t i, int64_t j) {
                      if (i < text || j < text) return true;
                      i -= text, j -= text;
                      return near(i / width, j / width, rows, window, dilation) &&
                             near(i % width, j % width, width, window, dilation);
                    });
    }
  }
}

TEST_P(Patterns, FreeSwimSeesItsWindowInEveryFrame) {
  for (const Shape s : {shape(150, 150), shape(70, 195)}) {
    const Case c(s, 8);
    for (const auto& [width, height, dx, dy] : {std::tuple{10, 5, 2, 1}, {13, 5, 3, 0}, {6, 4, 5, 9}})
      expect_either(c,
                    "freeswim(width=" + std::to_string(width) + ",height=" + std::to_string(height) +
                        ",half_width=" + std::to_string(dx) + ",half_height=" + std::to_string(dy) + ")",
                    backend(), [width = width, height = height, dx = dx, dy = dy](int64_t i, int64_t j) {
                      // The paper's own form: reach lost at one border is added at the other.
                      auto axis = [](int64_t q, int64_t k, int64_t n, int64_t d) {
                        const int64_t before = std::max<int64_t>(d - q, 0), behind = std::max<int64_t>(d + q - n + 1, 0);
                        return k >= q - d - behind && k <= q + d + before;
                      };
                      return axis(i / width % height, j / width % height, height, dy) &&
                             axis(i % width, j % width, width, dx);
                    });
  }
}

TEST_P(Patterns, HaloSeesItsSquareAndTheRim) {
  for (const Shape s : {shape(150, 150), shape(70, 181)}) {
    const Case c(s, 9);
    for (const auto& [width, block, rim] : {std::tuple{12, 4, 1}, {11, 3, 2}, {40, 8, 0}})
      expect_either(c,
                    "halo(width=" + std::to_string(width) + ",block=" + std::to_string(block) +
                        ",halo=" + std::to_string(rim) + ")",
                    backend(), [width = width, block = block, rim = rim](int64_t i, int64_t j) {
                      auto axis = [&](int64_t q, int64_t k) {
                        return k >= q / block * block - rim && k < (q / block + 1) * block + rim;
                      };
                      return axis(i / width, j / width) && axis(i % width, j % width);
                    });
  }
}

TEST_P(Patterns, ClearSeesADisc) {
  for (const Shape s : {shape(170, 170), shape(60, 203)}) {
    const Case c(s, 10);
    for (const auto& [width, radius, text] : {std::tuple{14, 3, 0}, {12, 5, 20}, {9, 1, 7}, {30, 13, 0}})
      expect_either(c,
                    "clear-disc(width=" + std::to_string(width) + ",radius=" + std::to_string(radius) +
                        ",text=" + std::to_string(text) + ")",
                    backend(), [width = width, radius = radius, text = text](int64_t i, int64_t j) {
                      if (i < text || j < text) return true;
                      const int64_t dy = (i - text) / width - (j - text) / width,
                                    dx = (i - text) % width - (j - text) % width;
                      return dy * dy + dx * dx < radius * radius;
                    });
  }
}

TEST_P(Patterns, TklSeesItsExtendedChunk) {
  for (const Shape s : {shape(170, 170), shape(60, 203)}) {
    const Case c(s, 11);
    for (const auto& [chunk, overlap] : {std::tuple{40, 5}, {7, 0}, {1, 3}, {64, 70}})
      expect_either(c, "tkl(chunk=" + std::to_string(chunk) + ",overlap=" + std::to_string(overlap) + ")", backend(),
                    [chunk = chunk, overlap = overlap](int64_t i, int64_t j) {
                      const int64_t first = i / chunk * chunk;
                      return j >= first - overlap && j < first + chunk + overlap;
                    });
  }
}

TEST_P(Patterns, SegmentsSeeThemselvesAndTheInstruction) {
  for (const Shape s : {shape(150, 150), shape(70, 181)}) {
    const Case c(s, 12);
    const int64_t query = s.m - 9;
    expect_mask(c, "block_attention(segments=[20,1,49,33])", backend(), [](int64_t i, int64_t j) {
      auto segment = [](int64_t x) { return x < 20 ? 0 : x < 21 ? 1 : x < 70 ? 2 : x < 103 ? 3 : 4; };
      return segment(i) == 4 || segment(i) == segment(j);
    });
    expect_mask(c, "block_attention(block=32,query=9)", backend(),
                [=](int64_t i, int64_t j) { return i >= query || i / 32 == j / 32; });
    expect_mask(c, "blockrank(instruction=11,segments=[20,1,49])", backend(), [](int64_t i, int64_t j) {
      auto segment = [](int64_t x) { return x < 11 ? 0 : x < 31 ? 1 : x < 32 ? 2 : x < 81 ? 3 : 4; };
      return segment(i) == 4 || segment(j) == 0 || segment(i) == segment(j);
    });
    expect_mask(c, "blockrank(instruction=10,block=24,query=9)", backend(),
                [=](int64_t i, int64_t j) { return i >= query || j < 10 || (i >= 10 && (i - 10) / 24 == (j - 10) / 24); });
  }
  EXPECT_FALSE(apply("block_attention(segments=[3,0.5])", Case(shape(20, 20)).input(backend())).has_value());
}

// Tiles that the published code keeps of whole videos.
TEST(RadialPattern, KeepsThePublishedNumberOfTiles) {
  for (const auto& [frames, decay, sink, kept] :
       {std::tuple{12, 1.0, "false", 432}, {33, 1.0, "false", 1908}, {12, 0.5, "true", 452}}) {
    const int64_t n = frames * 256, side = n / 128;
    const Case c({1, 1, n, n, 8, 8}, 13);
    ApplyInput in = c.input(backend_or("cpu"));
    in.causal = false;
    const ApplyOutput out = Case::run("radial(frame=256,decay=" + std::to_string(decay) + ",sink=" + sink + ")", in);
    EXPECT_NEAR(double(out.find("density")->view().at<float>(0)) * double(side * side), kept, 1e-2);
  }
}

// Its rule, query by query, on frames that are no multiple of a tile and a last one that is cut short.
TEST_P(Patterns, RadialSeesBandsInTiles) {
  for (const Shape s : {shape(300, 300), shape(90, 333)}) {
    const Case c(s, 14);
    for (const auto& [frame, block, decay, sink, text] :
         {std::tuple{50, 8, 1.0, false, 0}, {130, 16, 0.5, true, 9}, {24, 8, 0.3, true, 0}, {70, 16, 1.0, false, 40}}) {
      const int64_t video = s.m - text;
      std::set<std::pair<int64_t, int64_t>> tiles;
      for (int64_t a = 0; a * frame < video; ++a)
        for (int64_t b = 0; b * frame < video; ++b) {
          const int64_t far = std::abs(a - b);
          int64_t power = 1, bits = 0;
          while (power <= frame) power *= 2;
          for (int64_t x = far; x > 0; x /= 2) ++bits;
          const double base = double(power) / double(int64_t(1) << bits);
          const bool whole = b == 0 && sink;
          if (!whole && base < 128 && far % int64_t(128 / base) != 0) continue;
          const double width = whole || far <= 1 ? double(frame) : std::max(base * decay, double(block));
          for (int64_t i = 0; i * block < video; ++i)
            for (int64_t j = 0; j * block < video; ++j) {
              int64_t touched = 0, dense = 0, rows = std::min<int64_t>(block, video - i * block);
              for (int64_t key = j * block; key < std::min<int64_t>(video, (j + 1) * block); ++key) {
                if (key / frame != b) continue;
                int64_t seen = 0;
                for (int64_t query = i * block; query < i * block + rows; ++query)
                  seen += query / frame == a && std::abs(double(query % frame - key % frame)) <= width;
                touched += seen > 0, dense += seen * 3 > rows;
              }
              if (double(dense) > 0.6 * double(touched)) tiles.emplace(i, j);
            }
        }
      expect_either(c,
                    "radial(frame=" + std::to_string(frame) + ",block=" + std::to_string(block) +
                        ",decay=" + std::to_string(decay) + ",sink=" + (sink ? "true" : "false") +
                        ",text=" + std::to_string(text) + ")",
                    backend(), [&, block = block](int64_t i, int64_t j) {
                      return i >= video || j >= video || tiles.contains({i / block, j / block});
                    });
    }
  }
}

}  // namespace
}  // namespace heed::test
