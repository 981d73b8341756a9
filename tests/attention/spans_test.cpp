// Triangles on the diagonal of a map, and the spans that are cut out of it, against loops written out.
#include "attention/spans.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention/scores.h"
#include "backends.h"
#include "base/random.h"

namespace heed::test {
namespace {

class Spans : public testing::TestWithParam<const char*> {
 protected:
  Spans() : queue((guarded_kernels(), &kernels_named(GetParam())), *kernels_named(GetParam()).memory) {}
  std::vector<float> back(const Tensor& t) {
    const Buffer host = queue.read_back(t);
    return {host->as<float>(), host->as<float>() + host->numel()};
  }
  Queue queue;
};
INSTANTIATE_TEST_SUITE_P(All, Spans, testing::Values("reference", "guarded"));

// A signalling NaN to the power of 0 is no 1.
TEST(Ones, AreOnesWhateverLayThere) {
  constexpr int64_t n = 300;
  const std::vector<uint32_t> signalling(size_t(n), 0x7f800123u);
  for (const Kernels* run : cpu_kernels()) {
    Queue queue;
    queue.run = run;
    {
      const Scratch scratch(queue.scratch);
      std::memcpy(queue.scratch.take(Dtype::F32, {n}).data, signalling.data(), size_t(n) * 4);
    }
    const Scratch scratch(queue.scratch);
    const auto made = ones(queue, n).span<const float>();
    EXPECT_EQ(std::vector<float>(made.begin(), made.end()), std::vector<float>(size_t(n), 1.0f)) << run->name;
  }
}

/// Maps of the last part short, numbers on and before the diagonal alone.
Buffer maps(int64_t tokens, int stretch, uint64_t seed) {
  const int64_t parts = (tokens + stretch - 1) / stretch;
  Buffer out = Buffer::zeros(Dtype::F32, {parts * stretch, stretch});
  Random random(seed);
  for (int64_t r = 0; r < tokens; ++r)
    for (int64_t j = 0; j <= r % stretch; ++j) out->at<float>(r, j) = float(std::abs(random.normal())) * 0.1f;
  return out;
}

double triangle(const Buffer& map, int stretch, int64_t part, int64_t x, int64_t length, double baseline) {
  double sum = 0;
  for (int64_t i = x; i < x + length; ++i)
    for (int64_t j = x; j <= i; ++j) sum += double(map->at<float>(part * stretch + i, j)) - baseline;
  return sum;
}

/// Where spans begin: the best first, as long as it is more than nothing.
std::vector<int> greedy(const std::vector<std::vector<double>>& score, int64_t tokens) {
  std::vector<int> begins(size_t(tokens), 0), taken(size_t(tokens), 0);
  begins[0] = 1;
  for (;;) {
    double best = 0;
    int64_t from = 0, to = 0;
    for (int64_t x = 0; x < tokens; ++x)
      for (int64_t length = 2; length <= int64_t(score[size_t(x)].size()) && x + length <= tokens; ++length)
        if (score[size_t(x)][size_t(length - 1)] > best &&
            std::none_of(&taken[size_t(x)], &taken[size_t(x)] + length, [](int t) { return t != 0; }))
          best = score[size_t(x)][size_t(length - 1)], from = x, to = x + length;
    if (best <= 0) return begins;
    std::fill(begins.begin() + from, begins.begin() + to, 0);
    begins[size_t(from)] = 1;
    if (to < tokens) begins[size_t(to)] = 1;
    std::fill(taken.begin() + from, taken.begin() + to, 1);
  }
}

TEST_P(Spans, TrianglesAreTheDoubleSum) {
  for (const auto& [tokens, stretch, longest] :
       {std::tuple<int64_t, int, int>{50, 16, 5}, {1, 8, 3}, {24, 8, 20}, {7, 2, 2}}) {
    const Buffer map = maps(tokens, stretch, 3);
    const Ragged got = triangles(queue, queue.upload(map), tokens, stretch, longest, 0.07);
    const auto values = back(got.values);
    const int64_t parts = (tokens + stretch - 1) / stretch;
    ASSERT_EQ(got.segments(), parts);
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t x = 0; x < stretch; ++x)
        for (int64_t length = 1; length <= longest; ++length) {
          const float value = values[size_t((part * stretch + x) * longest + length - 1)];
          if (x + length > stretch || part * stretch + x + length > tokens) EXPECT_EQ(value, -INFINITY);
          else EXPECT_NEAR(value, triangle(map, stretch, part, x, length, 0.07), 1e-5);
        }
  }
}

TEST_P(Spans, TheBestComeFirstAndOverlapNothing) {
  for (const auto& [tokens, stretch, longest, baseline] : {std::tuple<int64_t, int, int, double>{90, 32, 9, 0.08},
                                                           {64, 16, 16, 0.06},
                                                           {33, 32, 5, 0.1},
                                                           {1, 4, 2, 0.0},
                                                           {40, 20, 4, 0.0},
                                                           {40, 20, 4, 1.0},
                                                           {15, 5, 3, 0.05}}) {
    const Buffer map = maps(tokens, stretch, 7);
    const auto got = back(
        span_begins(queue, triangles(queue, queue.upload(map), tokens, stretch, longest, baseline), stretch, longest));
    for (int64_t part = 0; part * stretch < tokens; ++part) {
      const int64_t there = std::min<int64_t>(stretch, tokens - part * stretch);
      std::vector<std::vector<double>> score(static_cast<size_t>(there));
      for (int64_t x = 0; x < there; ++x)
        for (int64_t length = 1; length <= std::min<int64_t>(longest, there - x); ++length)
          score[size_t(x)].push_back(triangle(map, stretch, part, x, length, baseline));
      const auto expected = greedy(score, there);
      for (int64_t x = 0; x < there; ++x)
        EXPECT_EQ(got[size_t(part * stretch + x)], float(expected[size_t(x)]))
            << tokens << " part " << part << " token " << x;
    }
  }
}

TEST_P(Spans, MeansAreThoseOfEachSpan) {
  const std::vector<int64_t> offsets{0, 1, 1, 40, 600};
  std::vector<float> begins(600), x(600);
  Random random(9);
  for (float& f : begins) f = random.below(6) == 0;
  for (float& f : x) f = float(100 * random.normal());
  begins[1] = 0;  // a segment begins a span in any case
  Ragged b, values;
  b.offsets = values.offsets = queue.upload(offsets), b.bound = values.bound = 600;
  b.values = queue.upload(begins), values.values = queue.upload(x);
  const auto got = back(span_means(queue, b, values).values);
  for (size_t s = 0; s + 1 < offsets.size(); ++s)
    for (int64_t from = offsets[s]; from < offsets[s + 1];) {
      int64_t to = from + 1;
      while (to < offsets[s + 1] && begins[size_t(to)] == 0) ++to;
      double sum = 0;
      for (int64_t j = from; j < to; ++j) sum += double(x[size_t(j)]);
      for (int64_t j = from; j < to; ++j) EXPECT_NEAR(got[size_t(j)], sum / double(to - from), 1e-4) << j;
      from = to;
    }
}

// A map of blocks of one weight, above the baseline, along the diagonal.
TEST_P(Spans, BlocksOfAMapAreItsSpans) {
  const std::vector<int64_t> blocks{5, 9, 2, 7, 12, 3, 2, 8};
  int64_t tokens = 0;
  for (int64_t size : blocks) tokens += size;
  Buffer map = Buffer::zeros(Dtype::F32, {tokens, tokens});
  std::vector<int> expected(static_cast<size_t>(tokens), 0);
  for (int64_t from = 0, b = 0; b < int64_t(blocks.size()); from += blocks[size_t(b++)]) {
    expected[size_t(from)] = 1;
    for (int64_t i = from; i < from + blocks[size_t(b)]; ++i)
      for (int64_t j = from; j <= i; ++j) map->at<float>(i, j) = 0.15f;
  }
  const auto got = back(
      span_begins(queue, triangles(queue, queue.upload(map), tokens, int(tokens), 16, 0.1), int(tokens), 16));
  for (size_t x = 0; x < expected.size(); ++x) EXPECT_EQ(got[x], float(expected[x])) << x;
}

}  // namespace
}  // namespace heed::test
