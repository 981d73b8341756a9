// KVQuant's code books and QJL's signs, from the papers' words.
#include <array>
#include <cmath>
#include <numeric>

#include "session_case.h"
#include "stores_case.h"

namespace heed::test {
namespace {

class CodePages : public Mechanisms {};
HEED_ON_ALL_SETTINGS(CodePages);

// KVQuant's numbers from its words: of a channel's 64 entries (a key) or an entry's channels (a value) the farthest from the
// mean exactly, the others the nearest point between the ends of what is left.
TEST_P(CodePages, KvquantKeepsOutliersAndRoundsTheRest) {
  Case c(shape(1, 64 * 3 + 5, 64, 96), 3);
  for (int64_t r = 0; r < c.shape.g * c.shape.m; r += 7) c.k->as<float>()[r * 64 + r % 64] *= 20;
  double before = INFINITY;
  for (const auto& [bits, outliers, group_outliers] : {std::tuple{3, 0, 0}, {3, 1, 2}, {2, 1, 2}, {4, 4, 6}}) {
    const std::string spec = "kvquant(bits=" + std::to_string(bits) + ",outliers=" + std::to_string(outliers) + ")";
    SCOPED_TRACE(spec);
    ModelInfo model;
    model.layers = 1, model.h = int(c.shape.h), model.g = int(c.shape.g), model.d = 64, model.d_v = 96;
    const Needs needs = value_or_throw(make_mechanism(value_or_throw(parse_spec(spec))[0], registry()))->needs(model);
    const Settled kept(c, spec, backend());
    double error = 0;
    const auto check = [&](const std::vector<double>& x, const std::vector<double>& there, size_t apart,
                           const std::array<float, 16>& points) {
      std::vector<size_t> order(x.size());
      std::iota(order.begin(), order.end(), size_t(0));
      const double mean = std::accumulate(x.begin(), x.end(), 0.0) / double(x.size());
      std::stable_sort(order.begin(), order.end(),
                       [&](size_t a, size_t b) { return std::abs(x[a] - mean) > std::abs(x[b] - mean); });
      double low = INFINITY, high = -INFINITY;
      for (size_t i = apart; i < order.size(); ++i)
        low = std::min(low, x[order[i]]), high = std::max(high, x[order[i]]);
      for (size_t i = 0; i < order.size(); ++i) {
        const double value = x[order[i]], got = there[order[i]];
        error += std::pow(value - got, 2);
        if (i < apart) {
          ASSERT_NEAR(got, value, 0x1p-11 * std::abs(value)) << "an outlier is as exact as f16";
          continue;
        }
        double nearest = INFINITY;
        for (int p = 0; p < 1 << bits; ++p)
          nearest = std::min(nearest, std::abs(value - (low + high) / 2 - double(points[size_t(p)]) * (high - low) / 2));
        ASSERT_NEAR(std::abs(value - got), nearest, (std::abs(low) + std::abs(high)) * 0x1p-10);
      }
    };
    for (size_t kv = 0; kv < size_t(c.shape.g); ++kv) {
      for (int64_t j = 0; j < c.shape.m; ++j)
        for (int64_t x = 0; x < 64 && (j < 64 || j >= 192); ++x)
          ASSERT_EQ(kept.k[kv][size_t(j)][size_t(x)], double(c.k->at<float>(int64_t(kv), j, x)))
              << "the first page, and what fills none";
      for (int64_t first = 64; first < 192; first += 64) {
        for (int64_t x = 0; x < 64; ++x) {
          std::vector<double> channel, there;
          for (int64_t j = first; j < first + 64; ++j)
            channel.push_back(double(c.k->at<float>(int64_t(kv), j, x))), there.push_back(kept.k[kv][size_t(j)][size_t(x)]);
          check(channel, there, size_t(outliers), needs.quantised_k.points);
        }
        for (int64_t j = first; j < first + 64; ++j) {
          std::vector<double> entry;
          for (int64_t x = 0; x < 96; ++x) entry.push_back(double(c.v->at<float>(int64_t(kv), j, x)));
          check(entry, kept.v[kv][size_t(j)], size_t(group_outliers), needs.quantised_v.points);
        }
      }
    }
    if (bits == 3) {
      EXPECT_LT(error, before) << "outliers narrow the range of the rest";
      before = error / 2;
    }
  }
  const Settled all(c, "kvquant(first=0)", backend()), none(c, "kvquant(first=129)", backend());
  EXPECT_NE(all.k[0][5], none.k[0][5]);
  for (size_t j = 0; j < 192; ++j)
    for (size_t x = 0; x < 64; ++x) ASSERT_EQ(none.k[0][j][x], double(c.k->at<float>(0, int64_t(j), int64_t(x))));
}

/// Rows of a block of QJL's projections, from the definition that pages.h gives: H D1 H D0.
Rows projections(uint32_t seed, size_t n, int block) {
  const auto h = [&](size_t i, size_t j) {
    int parity = 0;
    for (size_t both = i & j; both; both /= 2) parity ^= int(both & 1);
    return (parity ? -1 : 1) / std::sqrt(double(n));
  };
  const auto sign = [&](int round, size_t i) {
    return sketch_signs(seed, block, round, int(i / 32)) >> i % 32 & 1 ? -1 : 1;
  };
  Rows out(n, std::vector<double>(n, 0.0));
  for (size_t i = 0; i < n; ++i)
    for (size_t c = 0; c < n; ++c)
      for (size_t j = 0; j < n; ++j) out[i][c] += h(i, j) * sign(1, j) * h(j, c) * sign(0, c);
  return out;
}

// What a key stands for, from the paper's estimator: √(π/2) ‖k‖ / m Σ ± s_i, s_i of length √n, for its outlier channels and for
// the others.
TEST_P(CodePages, QjlKeysAreTheirSigns) {
  for (const auto& [d, bits, outliers, outlier_bits, group] :
       {std::tuple{64, 2, 8, 64, 32}, {48, 1, 3, 32, 16}, {128, 1, 0, 64, 64}, {16, 4, 5, 96, 8}}) {
    Case c(shape(1, 128 + 70, d, 64), 3);
    for (int64_t r = 0; r < c.shape.g * c.shape.m; ++r) c.k->as<float>()[r * d + 5] *= 12;
    const std::string spec = "qjl(residual=64,bits=" + std::to_string(bits) + ",outliers=" + std::to_string(outliers) +
                             ",outlier_bits=" + std::to_string(outlier_bits) + ",group=" + std::to_string(group) +
                             ",seed=7)";
    SCOPED_TRACE(spec + " d=" + std::to_string(d));
    const Settled kept(c, spec, backend());
    size_t n = 32;
    while (n < size_t(d)) n *= 2;
    std::vector<Rows> blocks;
    for (int b = 0; b < 4; ++b) blocks.push_back(projections(7, n, b));
    const size_t signs = size_t(bits * d + 31) / 32 * 32;
    for (int64_t kv = 0; kv < c.shape.g; ++kv)
      for (int64_t j = 0; j < c.shape.m; ++j) {
        if (j >= 128) {
          for (int64_t x = 0; x < d; ++x)
            ASSERT_EQ(kept.k[size_t(kv)][size_t(j)][size_t(x)], double(c.k->at<float>(kv, j, x)));
          continue;
        }
        std::vector<std::pair<double, int64_t>> squares;
        for (int64_t x = 0; x < d; ++x) {
          squares.emplace_back(0.0, x);
          for (int64_t i = j / group * group; i < (j / group + 1) * group; ++i)
            squares.back().first -= std::pow(double(c.k->at<float>(kv, i, x)), 2);
        }
        std::sort(squares.begin(), squares.end());
        std::vector<double> wanted(size_t(d), 0.0);
        for (const bool outlier : {false, true}) {
          std::vector<double> part(n, 0.0);
          for (size_t i = outlier ? 0 : size_t(outliers); i < (outlier ? size_t(outliers) : size_t(d)); ++i)
            part[size_t(squares[i].second)] = double(c.k->at<float>(kv, j, squares[i].second));
          const double norm = std::sqrt(std::inner_product(part.begin(), part.end(), part.begin(), 0.0));
          const size_t m = outlier ? size_t(outlier_bits) : signs;
          std::vector<double> sum(n, 0.0);
          for (size_t i = 0; i < m; ++i) {
            const auto& row = blocks[i / n][i % n];
            const double way = std::inner_product(row.begin(), row.end(), part.begin(), 0.0) > 0 ? 1 : -1;
            for (size_t x = 0; x < n; ++x) sum[x] += way * row[x] * std::sqrt(double(n));
          }
          for (size_t i = outlier ? 0 : size_t(outliers); i < (outlier ? size_t(outliers) : size_t(d)); ++i)
            wanted[size_t(squares[i].second)] = std::sqrt(M_PI / 2) / double(m) * norm * sum[size_t(squares[i].second)];
        }
        for (int64_t x = 0; x < d; ++x)
          ASSERT_NEAR(kept.k[size_t(kv)][size_t(j)][size_t(x)], wanted[size_t(x)], 2e-3 * (1 + std::abs(wanted[size_t(x)])))
              << "entry " << j << ", channel " << x;
      }
  }
}

// Over the projections the estimate's mean is the product, but for 1 / 4n of the norms that orthogonal rows differ from normal
// ones by, and its deviation √(π/2 − 1) of them over √m.
TEST(Qjl, IsUnbiased) {
  const int64_t d = 64;
  Case c({2, 1, 1, 64, d, 64}, 11);
  for (int64_t x = 0; x < d; ++x) c.k->as<float>()[3 * d + x] = x == 9 ? 5.0f : 0.0f;  // all of a key in one channel
  for (const auto& [bits, outliers] : {std::pair{1, 0}, {4, 0}, {2, 6}}) {
    std::vector<double> sum(64, 0.0), squares(64, 0.0), norms(64, 0.0);
    const int seeds = 300;
    for (int seed = 0; seed < seeds; ++seed) {
      const Settled kept(c,
                         "qjl(residual=0,bits=" + std::to_string(bits) + ",outliers=" + std::to_string(outliers) +
                             ",seed=" + std::to_string(seed) + ")",
                         "auto");
      for (int64_t j = 0; j < 64; ++j) {
        double product = 0, exact = 0, q2 = 0, k2 = 0;
        for (int64_t x = 0; x < d; ++x) {
          const double q = double(c.q->at<float>(0, 0, x)), k = double(c.k->at<float>(0, j, x));
          product += q * kept.k[0][size_t(j)][size_t(x)], exact += q * k, q2 += q * q, k2 += k * k;
        }
        const double away = (product - exact) / std::sqrt(q2 * k2);
        sum[size_t(j)] += away / seeds, squares[size_t(j)] += away * away / seeds;
      }
    }
    double spread = 0;
    for (size_t j = 0; j < 64; ++j) {
      EXPECT_LT(std::abs(sum[j]), 4.5 * std::sqrt(squares[j] / seeds) + 1.0 / (4 * d)) << "key " << j << ", bits " << bits;
      spread += squares[j] / 64;
    }
    if (outliers == 0) EXPECT_NEAR(std::sqrt(spread * bits * d), std::sqrt(M_PI / 2 - 1), 0.04);
    else EXPECT_LT(std::sqrt(spread * bits * d), std::sqrt(M_PI / 2 - 1) + 0.3);
  }
}

}  // namespace
}  // namespace heed::test
