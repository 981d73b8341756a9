// Policies that score entries by statistics, against their formulas in f64.
#include "attention/spec.h"
#include "keep_case.h"
#include "kernels/kernels.h"
#include "mechanisms/registry.h"

namespace heed::test {
namespace {

class KeepScores : public Mechanisms {};
HEED_ON_ALL_SETTINGS(KeepScores);

const char* kIdentities[] = {"a2sf(budget=1.0)",
                             "observed-attention(budget=1.0)",
                             "keydiff(budget=1.0)",
                             "cur(budget=1.0)",
                             "lagkv(budget=1.0)",
                             "noncausal(budget=1.0)",
                             "expected-attention(budget=1.0)",
                             "random(budget=1.0)",
                             "duo-attention(recent=100000)",
                             "simlayerkv(threshold=1)",
                             "chunkkv(snapkv(budget=1.0))",
                             "entropy-chunk(snapkv(budget=1.0))",
                             "think(share=0)",
                             "think(window=1000)",
                             "trimmed-llama(budget=1.0)",
                             "ov-evict(budget=1024)",
                             "adaptive-rkv(budget=1024)",
                             "caote(h2o(budget=1.0))",
                             "dms(knorm)",
                             "headkv(snapkv(budget=1.0))",
                             "q-filters(budget=1.0)",
                             "spec-kv(budget=1.0)",
                             "forcing-kv(share=1)",
                             "forcing-kv(frame=6,share=1)",
                             "forcing-kv(frame=1000,parts=1,share=0)"};

TEST_P(KeepScores, IdentityKeepsAll) {
  for (const Shape s : {shape(97, 97), shape(1, 1), shape(5, 130)}) {
    const Case c(s);
    for (const char* spec : kIdentities) {
      const ApplyOutput out = c.run(spec, backend());
      EXPECT_LT(c.dense_error(out), kExact) << spec;
      EXPECT_LT(kept_error(c, out), kExact) << spec;
      for (const auto& list : lists(out, "kept")) EXPECT_EQ(list, all_of(s.m)) << spec;
    }
  }
}

// Queries near a line: their own first singular vector is found, whichever way it points; or one that is given
// counts.
TEST_P(KeepScores, QFiltersScoreAlongOneDirection) {
  for (const Shape s : {shape(90, 90), shape(33, 131), shape(2, 20)}) {
    Case c(s, 30);
    Random random(31);
    Buffer line(Dtype::F32, {s.g, s.d});
    for (float& x : line->span<float>()) x = float(random.normal());
    for (int64_t head = 0; head < s.h; ++head)
      for (int64_t i = 0; i < s.n; ++i) {
        const double along = 2 + random.normal();
        for (int64_t e = 0; e < s.d; ++e)
          c.q->at<float>(head, i, e) += float(along * double(line->at<float>(head / c.group(), e)));
      }
    const auto held = kept(c, "q-filters(budget=17,sinks=2,rounds=60)", backend());
    ApplyInput in = c.input(backend());
    in.inputs["filters"] = line;
    const auto given = lists(Case::run("q-filters(budget=17,sinks=2)", in), "kept");
    for (int64_t kv = 0; kv < s.g; ++kv) {
      // Power iteration on Σ q q^T, written out.
      std::vector<double> f(size_t(s.d), 1.0), mean(size_t(s.d), 0.0);
      for (int round = 0; round < 300; ++round) {
        std::vector<double> next(size_t(s.d), 0.0);
        for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head)
          for (int64_t i = 0; i < s.n; ++i) {
            double dot = 0;
            for (int64_t e = 0; e < s.d; ++e) dot += double(c.q->at<float>(head, i, e)) * f[size_t(e)];
            for (int64_t e = 0; e < s.d; ++e) {
              const double q = c.q->at<float>(head, i, e);
              next[size_t(e)] += dot * q;
              if (round == 0) mean[size_t(e)] += q;
            }
          }
        const double size = std::sqrt(std::inner_product(next.begin(), next.end(), next.begin(), 0.0));
        for (size_t e = 0; e < f.size(); ++e) f[e] = next[e] / size;
      }
      const double sign = std::inner_product(f.begin(), f.end(), mean.begin(), 0.0) > 0 ? 1 : -1;
      std::vector<double> own, other;
      for (int64_t j = 0; j < s.m; ++j) {
        own.push_back(j < 2 ? INFINITY : 0), other.push_back(own.back());
        for (int64_t e = 0; e < s.d; ++e) {
          own.back() += sign * f[size_t(e)] * double(c.k->at<float>(kv, j, e));
          other.back() += double(line->at<float>(kv, e)) * double(c.k->at<float>(kv, j, e));
        }
      }
      expect_top(held[size_t(kv)], own, 17, "q-filters");
      expect_top(given[size_t(kv)], other, 17, "q-filters, given");
    }
  }
}

TEST_P(KeepScores, SpecKvTakesWhatADraftLooksAt) {
  for (const auto& [n, m, window, look, kernel, budget] : {std::tuple{90, 90, 8, 5, 7, 30},
                                                           {40, 121, 16, 20, 1, 33},
                                                           {60, 60, 4, 0, 3, 20},
                                                           {30, 30, 2, 12, 5, 25},
                                                           {12, 40, 3, 9, 3, 10}}) {
    const Case c(shape(n, m), 32, 2.0);
    const auto held = kept(c,
                           "spec-kv(budget=" + std::to_string(budget) + ",window=" + std::to_string(window) +
                               ",look=" + std::to_string(look) + ",kernel=" + std::to_string(kernel) + ")",
                           backend());
    const int64_t text = m - look, prefix = text - window;
    for (int64_t kv = 0; kv < c.shape.g; ++kv) {
      std::vector<double> votes(static_cast<size_t>(m), 0.0), score(size_t(text), INFINITY);
      for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head)
        for (int64_t i = std::max(0, n - look - window); i < n; ++i) {
          const auto p = c.causal(head, i);
          for (size_t j = 0; j < p.size(); ++j) votes[j] = std::max(votes[j], p[j]);
        }
      for (int64_t j = 0; j < prefix; ++j)
        score[size_t(j)] = *std::max_element(votes.begin() + std::max<int64_t>(0, j - kernel / 2),
                                             votes.begin() + std::min<int64_t>(prefix, j + kernel / 2 + 1));
      expect_top(held[size_t(kv)], score, budget, "spec-kv, " + std::to_string(m));
    }
  }
}

TEST_P(KeepScores, ForcingKvKeepsWhatTheNextFrameResemblesLeast) {
  for (const auto& [m, frame, parts, share, fixed] :
       {std::tuple{150, 12, 3, 0.33, -1}, {100, 20, 4, 0.5, 0}, {97, 6, 6, 0.2, 1}, {40, 20, 5, 0.5, -1}, {30, 40, 2, 0.0, 0}}) {
    const Case c(shape(m, m), 33);
    const int64_t g = c.shape.g;
    const auto is_fixed = [&, fixed = fixed](int64_t kv) { return fixed == kv; };
    const auto held = kept(c,
                           "forcing-kv(frame=" + std::to_string(frame) + ",parts=" + std::to_string(parts) + ",share=" +
                               std::to_string(share) + (fixed < 0 ? "" : ",static=" + std::to_string(fixed)) + ")",
                           backend());
    const int64_t frames = m / frame, part = frame / parts, dynamic = g - (fixed >= 0 && fixed < g);
    std::vector<double> unlike;
    for (int64_t x = parts; x < (frames - 1) * parts; ++x) {
      double sum = 0;
      for (int64_t j = x * part; j < (x + 1) * part; ++j) {
        double both = 0, one = 0, two = 0;
        for (int64_t kv = 0; kv < g; ++kv)
          for (int64_t e = 0; e < c.shape.d && !is_fixed(kv); ++e) {
            const double a = c.k->at<float>(kv, j, e), b = c.k->at<float>(kv, j + frame, e);
            both += a * b, one += a * a, two += b * b;
          }
        sum += both / std::sqrt(one * two);
      }
      unlike.push_back(-sum / double(part));
    }
    const auto stays = top(unlike, std::llround(share * double(unlike.size())));
    for (int64_t kv = 0; kv < g; ++kv) {
      std::vector<int32_t> expected;
      for (int64_t j = 0; j < m; ++j)
        if (j < frame || j >= (frames - 1) * frame ||
            (!is_fixed(kv) && std::binary_search(stays.begin(), stays.end(), int32_t(j / part - parts))))
          expected.push_back(int32_t(j));
      if (dynamic > 0 || is_fixed(kv)) { EXPECT_EQ(held[size_t(kv)], expected) << m << " KV head " << kv; }
    }
  }
}

// Two frames alike: the first of them goes.
TEST_P(KeepScores, ForcingKvDropsAFrameThatRepeats) {
  Case c(shape(60, 60), 34);
  for (int64_t kv = 0; kv < c.shape.g; ++kv)
    for (int64_t j = 20; j < 30; ++j)
      for (int64_t e = 0; e < c.shape.d; ++e) c.k->at<float>(kv, j + 10, e) = c.k->at<float>(kv, j, e);
  for (const auto& list : kept(c, "forcing-kv(frame=10,parts=2,share=0.75)", backend())) {
    EXPECT_EQ(list.size(), 50u);
    for (int32_t j = 20; j < 30; ++j) EXPECT_FALSE(std::binary_search(list.begin(), list.end(), j));
  }
}

TEST_P(KeepScores, A2sfFades) {
  for (const Shape s : {shape(80, 80), shape(33, 70)}) {
    const Case c(s, 6);
    for (const auto& [alpha, window] : {std::pair{0.9, 0}, {0.5, 7}, {1.0, 4}}) {
      const std::string spec = "a2sf(budget=25,alpha=" + std::to_string(alpha) + ",window=" + std::to_string(window) +
                               ")";
      const auto held = kept(c, spec, backend());
      for (int64_t kv = 0; kv < s.g; ++kv) {
        std::vector<double> scores(size_t(s.m), 0.0);
        for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head)
          for (int64_t i = 0; i < s.n; ++i) {
            const auto p = c.causal(head, i);
            for (int64_t j = 0; j < s.m; ++j)
              scores[size_t(j)] += std::pow(alpha, double(s.n - 1 - i)) * p[size_t(j)] / double(c.group());
          }
        for (int64_t j = s.m - window; j < s.m; ++j) scores[size_t(j)] = INFINITY;
        expect_top(held[size_t(kv)], scores, 25, spec);
      }
    }
  }
}

TEST_P(KeepScores, ObservedAttentionDividesByAge) {
  for (const Shape s : {shape(80, 80), shape(33, 70)}) {
    const Case c(s, 6);
    const auto held = kept(c, "observed-attention(budget=25)", backend());
    for (int64_t kv = 0; kv < s.g; ++kv) {
      auto scores = grouped(c, kv, column_sums(c, s.n));
      for (int64_t j = 0; j < s.m; ++j) scores[size_t(j)] /= double(std::min(s.n, s.m - j));
      expect_top(held[size_t(kv)], scores, 25, "observed-attention");
    }
  }
}

TEST_P(KeepScores, KeyDiffKeepsWhatIsUnlikeTheMean) {
  for (const Shape s : {shape(120, 120), shape(11, 201, 20)}) {
    const Case c(s, 12);
    const auto held = kept(c, "keydiff(budget=33)", backend());
    for (int64_t kv = 0; kv < s.g; ++kv) {
      std::vector<double> anchor(size_t(s.d), 0.0), scores;
      for (int64_t j = 0; j < s.m; ++j)
        for (int64_t x = 0; x < s.d; ++x)
          anchor[size_t(x)] += double(c.k->at<float>(kv, j, x)) / norm(c.k, kv, j) / double(s.m);
      double length = 0;
      for (double x : anchor) length += x * x;
      for (int64_t j = 0; j < s.m; ++j) {
        double dot = 0;
        for (int64_t x = 0; x < s.d; ++x) dot += anchor[size_t(x)] * double(c.k->at<float>(kv, j, x));
        scores.push_back(-dot / norm(c.k, kv, j) / std::sqrt(length));
      }
      expect_top(held[size_t(kv)], scores, 33, "keydiff");
    }
  }
}

TEST_P(KeepScores, KeyDiffDropsCopiesOfTheMeanFirst) {
  Case c(shape(60, 60), 5);
  for (int64_t kv = 0; kv < c.shape.g; ++kv)  // forty copies of one direction at different lengths
    for (int64_t j = 10; j < 50; ++j)
      for (int64_t x = 0; x < c.shape.d; ++x) c.k->at<float>(kv, j, x) = float(1 + j % 3) * c.k->at<float>(kv, 10, x);
  std::vector<int32_t> others = all_of(60);
  others.erase(others.begin() + 10, others.begin() + 50);
  for (const auto& list : kept(c, "keydiff(budget=20)", backend())) EXPECT_EQ(list, others);
}

TEST_P(KeepScores, CurMultipliesLocalShares) {
  const Shape s = shape(20, 150);
  Case c(s, 3);
  for (int64_t j = 32; j < 48; ++j)  // one block of zeros
    for (int64_t x = 0; x < s.d; ++x) c.k->at<float>(0, j, x) = 0;
  for (const auto& [leverage, block] : {std::pair{"product", 16}, {"key", 16}, {"value", 7}, {"mean", 0}}) {
    const std::string spec = "cur(budget=40,leverage=" + std::string(leverage) + ",block=" + std::to_string(block) + ")";
    const auto held = kept(c, spec, backend());
    for (int64_t kv = 0; kv < s.g; ++kv) {
      auto share = [&](const Tensor& x, int64_t j) {
        const int64_t size = block ? block : s.m, first = j / size * size;
        double sum = 0;
        for (int64_t i = first; i < std::min(s.m, first + size); ++i) sum += std::pow(norm(x, kv, i), 2);
        return sum > 0 ? std::pow(norm(x, kv, j), 2) / sum : 0;
      };
      std::vector<double> scores;
      for (int64_t j = 0; j < s.m; ++j) {
        const double k = share(c.k, j), v = share(c.v, j);
        const std::string l = leverage;
        scores.push_back(j < 4 ? INFINITY : l == "key" ? k : l == "value" ? v : l == "mean" ? (k + v) / 2 : k * v);
      }
      expect_top(held[size_t(kv)], scores, 40, spec);
    }
  }
}

/// LagKV as its library writes it, for one KV head; −∞ is never given, forced entries by age above all scores.
std::vector<double> lagkv_scores(const Case& c, int64_t kv, int64_t sinks, int64_t lag, bool cross) {
  const int64_t m = c.shape.m;
  std::vector<double> out;
  for (int64_t j = 0; j < m; ++j) out.push_back(j < sinks ? INFINITY : 1000.0 + double(j));
  const int64_t whole = m > sinks ? (m - sinks) / lag : 0;
  for (int64_t p = 0; p + 1 < whole; ++p) {
    const int64_t first = sinks + p * lag;
    std::vector<double> sum(size_t(lag), 0.0);
    for (const Buffer* x : {&c.k, &c.v}) {
      const int64_t d = x->view().size[2];
      std::vector<double> u;
      for (int64_t j = first; j < first + lag; ++j) {
        std::vector<double> y;
        for (int64_t ch = 0; ch < d; ++ch) {
          double low = INFINITY, high = -INFINITY;
          for (int64_t i = first + lag; i < first + 2 * lag; ++i)
            low = std::min(low, double(x->view().at<float>(kv, i, ch))),
            high = std::max(high, double(x->view().at<float>(kv, i, ch)));
          y.push_back((double(x->view().at<float>(kv, j, ch)) - low) / (high - low));
        }
        const double mean = std::accumulate(y.begin(), y.end(), 0.0) / double(d);
        double squares = 0;
        for (double v : y) squares += (v - mean) * (v - mean);
        u.push_back(std::sqrt(squares / double(d - 1)));
      }
      double total = 0;
      for (double v : u) total += std::exp(v);
      for (size_t i = 0; i < u.size(); ++i) sum[i] += std::exp(u[i]) / total / 2;
    }
    for (int64_t i = 0; i < lag; ++i) {
      double lower = 0;
      for (int64_t o = 0; o < lag; ++o) lower += sum[size_t(o)] < sum[size_t(i)];
      out[size_t(first + i)] = cross ? sum[size_t(i)] : lower / double(lag);
    }
  }
  return out;
}

TEST_P(KeepScores, LagKvMeasuresByTheNextPartition) {
  for (const Shape s : {shape(100, 131), shape(10, 130)}) {
    const Case c(s, 4);
    for (const auto& [spec, sinks, lag, cross, budget] : {std::tuple{"lagkv(budget=70,lag=16)", 4, 16, false, 70},
                                                          {"lagkv(budget=70,lag=16,cross=true)", 4, 16, true, 70},
                                                          {"lagkv(budget=90,lag=32,sinks=2)", 2, 32, false, 90}}) {
      const auto held = kept(c, spec, backend());
      for (int64_t kv = 0; kv < s.g; ++kv)
        expect_top(held[size_t(kv)], lagkv_scores(c, kv, sinks, lag, cross), budget, spec);
    }
  }
  // A prompt of less than two partitions: sinks and the latest.
  const Case c(shape(100, 100), 4);
  std::vector<int32_t> expected = all_of(4);
  for (int32_t j = 74; j < 100; ++j) expected.push_back(j);
  for (const auto& list : kept(c, "lagkv(budget=30)", backend())) EXPECT_EQ(list, expected);
}

TEST_P(KeepScores, NonCausalTilesSeeThemselves) {
  for (const Shape s : {shape(100, 100), shape(64, 64)}) {
    const Case c(s, 9, 0.3);
    for (const auto& [spec, tile, kernel, scaled] : {std::tuple{"noncausal(budget=30,tile=24)", 24, 3, false},
                                                     {"noncausal(budget=30,tile=64,kernel=1,scaled=true)", 64, 1, true}}) {
      const auto held = kept(c, spec, backend());
      for (int64_t kv = 0; kv < s.g; ++kv) {
        std::vector<double> mass(size_t(s.m), 0.0), scores;
        for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head)
          for (int64_t i = 0; i < s.n; ++i) {
            const int64_t first = i / tile * tile, last = std::min<int64_t>(s.m, first + tile);
            std::vector<double> e;
            for (int64_t j = first; j < last; ++j)
              e.push_back(std::exp(c.dot(head, i, j) / (scaled ? std::sqrt(double(s.d)) : 1)));
            const double total = std::accumulate(e.begin(), e.end(), 0.0);
            for (int64_t j = first; j < last; ++j) mass[size_t(j)] += e[size_t(j - first)] / total / double(c.group());
          }
        for (int64_t j = 0; j < s.m; ++j) mass[size_t(j)] *= norm(c.v, kv, j);
        for (int64_t j = 0; j < s.m; ++j) {
          double sum = 0;
          for (int64_t x = std::max<int64_t>(0, j - kernel / 2); x <= std::min(s.m - 1, j + kernel / 2); ++x)
            sum += mass[size_t(x)];
          scores.push_back(sum / double(kernel));
        }
        expect_top(held[size_t(kv)], scores, 30, spec);
      }
    }
  }
}

/// Expected attention from queries as they are before rotation, and R as a matrix.
std::vector<double> expected_scores(const Case& c, int64_t kv, const std::vector<Rows>& plain_q, const Rows& rotation,
                                    const Rows& keys, double eps) {
  const int64_t d = c.shape.d, m = c.shape.m, n = c.shape.n;
  const double scale = 1 / std::sqrt(double(d));
  std::vector<double> total(size_t(m), 0.0);
  auto turn = [&](const std::vector<double>& x) {
    std::vector<double> y(size_t(d), 0.0);
    for (int64_t a = 0; a < d; ++a)
      for (int64_t b = 0; b < d; ++b) y[size_t(a)] += rotation[size_t(a)][size_t(b)] * x[size_t(b)];
    return y;
  };
  for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head) {
    Rows x;
    for (int64_t i = 4; i < n; ++i) x.push_back(turn(plain_q[size_t(head)][size_t(i)]));
    std::vector<double> mean(size_t(d), 0.0), z;
    for (const auto& row : x)
      for (int64_t a = 0; a < d; ++a) mean[size_t(a)] += row[size_t(a)] / double(x.size());
    for (int64_t j = 4; j < m; ++j) {
      double first = 0, second = 0;
      for (int64_t a = 0; a < d; ++a) first += mean[size_t(a)] * keys[size_t(j)][size_t(a)];
      for (const auto& row : x) {
        double dot = 0;
        for (int64_t a = 0; a < d; ++a) dot += (row[size_t(a)] - mean[size_t(a)]) * keys[size_t(j)][size_t(a)];
        second += dot * dot / double(x.size());
      }
      z.push_back(first * scale + second * scale * scale / 2);
    }
    const double most = *std::max_element(z.begin(), z.end());
    double sum = 0;
    for (double v : z) sum += std::exp(v - most);
    for (int64_t j = 4; j < m; ++j) total[size_t(j)] += std::exp(z[size_t(j - 4)] - most) / sum / double(c.group());
  }
  for (int64_t j = 0; j < m; ++j) total[size_t(j)] = j < 4 ? INFINITY : (total[size_t(j)] + eps) * norm(c.v, kv, j);
  return total;
}

TEST_P(KeepScores, ExpectedAttentionIsTheGaussianMoment) {
  for (const Shape s : {shape(90, 90), shape(30, 77)}) {
    const Case c(s, 15, 0.7);
    Rows identity(size_t(s.d), std::vector<double>(size_t(s.d), 0.0));
    for (int64_t a = 0; a < s.d; ++a) identity[size_t(a)][size_t(a)] = 1;
    std::vector<Rows> q;
    for (int64_t head = 0; head < s.h; ++head) {
      auto& rows = q.emplace_back();
      for (int64_t i = 0; i < s.n; ++i) {
        auto& row = rows.emplace_back();
        for (int64_t a = 0; a < s.d; ++a) row.push_back(c.q->at<float>(head, i, a));
      }
    }
    for (double eps : {0.0, 0.01}) {
      const std::string spec = "expected-attention(budget=30,eps=" + std::to_string(eps) + ")";
      const auto held = kept(c, spec, backend());
      for (int64_t kv = 0; kv < s.g; ++kv) {
        Rows keys;
        for (int64_t j = 0; j < s.m; ++j) {
          auto& row = keys.emplace_back();
          for (int64_t a = 0; a < s.d; ++a) row.push_back(c.k->at<float>(kv, j, a));
        }
        expect_top(held[size_t(kv)], expected_scores(c, kv, q, identity, keys, eps), 30, spec);
      }
    }
  }
}

// Statistics of the prompt itself, given, are the method that gathers them; with others they decide.
TEST_P(KeepScores, ExpectedAttentionTakesGivenStatistics) {
  for (const Shape s : {shape(90, 90), shape(30, 77)}) {
    const Case c(s, 15, 0.7);
    Buffer mean = Buffer::zeros(Dtype::F32, {s.h, s.d}), covariance = Buffer::zeros(Dtype::F32, {s.h, s.d, s.d});
    const auto q = [&](int64_t head, int64_t i, int64_t e) { return double(c.q->at<float>(head, i, e)); };
    for (int64_t head = 0; head < s.h; ++head)
      for (int64_t a = 0; a < s.d; ++a) {
        double sum = 0;
        for (int64_t i = 4; i < s.n; ++i) sum += q(head, i, a) / double(s.n - 4);
        mean->at<float>(head, a) = float(sum);
      }
    for (int64_t head = 0; head < s.h; ++head)
      for (int64_t a = 0; a < s.d; ++a)
        for (int64_t b = 0; b < s.d; ++b) {
          double sum = 0;
          for (int64_t i = 4; i < s.n; ++i)
            sum += (q(head, i, a) - double(mean->at<float>(head, a))) * (q(head, i, b) - double(mean->at<float>(head, b)));
          covariance->at<float>(head, a, b) = float(sum / double(s.n - 4));
        }
    ApplyInput in = c.input(backend());
    in.inputs = {{"mean", mean}, {"covariance", covariance}};
    for (const std::string options : {"(budget=30)", "(budget=25,eps=0.01)", "(budget=30,covariance=false,norm=false)"})
      EXPECT_EQ(lists(Case::run("expected-attention-stats" + options, in), "kept"),
                lists(c.run("expected-attention" + options, backend()), "kept"))
          << options;
    for (const auto& list : lists(Case::run("expected-attention-stats(budget=1.0)", in), "kept"))
      EXPECT_EQ(list, all_of(s.m));
    // A mean query along one channel ranks by that channel.
    for (float& x : mean->span<float>()) x = 0;
    for (int64_t head = 0; head < s.h; ++head) mean->at<float>(head, 3) = 1;
    const auto held = lists(Case::run("expected-attention-stats(budget=20,covariance=false,norm=false,sinks=0)", in),
                            "kept");
    for (int64_t kv = 0; kv < s.g; ++kv) {
      std::vector<double> scores;
      for (int64_t j = 0; j < s.m; ++j) scores.push_back(double(c.k->at<float>(kv, j, 3)));
      expect_top(held[size_t(kv)], scores, 20, "a channel");
    }
    in.inputs.erase("covariance");
    const auto missing = apply("expected-attention-stats(budget=30)", in);
    ASSERT_FALSE(missing);
    EXPECT_EQ(missing.error().exit_status(), 2);
  }
}

// With a rotary embedding, scores themselves: queries turned back to before it, R as the sum of 512 rotation matrices.
TEST_P(KeepScores, ExpectedAttentionTurnsTheStatistics) {
  const Shape s = shape(50, 50);
  const Case c(s, 16, 0.7);
  const int64_t d = s.d, half = d / 2;
  Buffer inv_freq(Dtype::F32, {half});
  for (int64_t i = 0; i < half; ++i) inv_freq->at<float>(i) = float(std::pow(10000.0, -double(2 * i) / double(d)));
  const Rope rope{inv_freq, int(d), true};
  auto turned = [&](std::vector<double> x, double position) {
    for (int64_t i = 0; i < half; ++i) {
      const double angle = position * inv_freq->at<float>(i), a = x[size_t(i)], b = x[size_t(i + half)];
      x[size_t(i)] = a * std::cos(angle) - b * std::sin(angle),
      x[size_t(i + half)] = a * std::sin(angle) + b * std::cos(angle);
    }
    return x;
  };
  Rows rotation(size_t(d), std::vector<double>(size_t(d), 0.0));
  for (int64_t b = 0; b < d; ++b) {
    std::vector<double> unit(size_t(d), 0.0);
    unit[size_t(b)] = 1;
    for (int64_t p = s.m; p < s.m + 512; ++p) {
      const auto x = turned(unit, double(p));
      for (int64_t a = 0; a < d; ++a) rotation[size_t(a)][size_t(b)] += x[size_t(a)] / 512;
    }
  }
  // The case's tensors are plain; what the mechanism sees is rotated.
  std::vector<Rows> plain_q;
  Buffer q(Dtype::F32, {s.h * s.n, d}), k(Dtype::F32, {s.g * s.m, d});
  std::vector<Rows> keys;
  for (int64_t head = 0; head < s.h; ++head) {
    auto& rows = plain_q.emplace_back();
    for (int64_t i = 0; i < s.n; ++i) {
      auto& row = rows.emplace_back();
      for (int64_t a = 0; a < d; ++a) row.push_back(c.q->at<float>(head, i, a));
      const auto x = turned(row, double(i));
      for (int64_t a = 0; a < d; ++a) q->at<float>(head * s.n + i, a) = float(x[size_t(a)]);
    }
  }
  for (int64_t kv = 0; kv < s.g; ++kv) {
    auto& rows = keys.emplace_back();
    for (int64_t j = 0; j < s.m; ++j) {
      std::vector<double> row;
      for (int64_t a = 0; a < d; ++a) row.push_back(c.k->at<float>(kv, j, a));
      row = turned(row, double(j));
      for (int64_t a = 0; a < d; ++a) k->at<float>(kv * s.m + j, a) = float(row[size_t(a)]);
      rows.push_back(row);
    }
  }
  Queue queue = queue_on(heed::backend(backend()));
  Rope there = rope;
  there.inv_freq = queue.upload(rope.inv_freq);
  ModelInfo model;
  model.h = int(s.h), model.g = int(s.g), model.d = int(d), model.d_v = int(s.d_v), model.ropes = {&there};
  StoreOptions options;
  options.k.kind = options.v.kind = PageType::Kind::F32;
  const StoreShape layer{int(s.g), int(d), int(s.d_v)};
  Store store(queue, std::span(&layer, 1), options);
  auto steps = [](int64_t count, int64_t step) {
    Buffer out(Dtype::I64, {count + 1});
    for (int64_t i = 0; i <= count; ++i) out->at<int64_t>(i) = i * step;
    return out;
  };
  const Buffer q_offsets = steps(s.h, s.n), k_offsets = steps(s.g, s.m);
  Buffer q_pos(Dtype::I32, {s.h * s.n}), k_pos(Dtype::I32, {s.g * s.m});
  for (int64_t r = 0; r < q_pos->numel(); ++r) q_pos->at<int32_t>(r) = int32_t(r % s.n);
  for (int64_t r = 0; r < k_pos->numel(); ++r) k_pos->at<int32_t>(r) = int32_t(r % s.m);
  const Tensor k_starts = queue.upload(k_offsets);
  const Ragged panel_v{queue.upload(c.v->reshape({s.g * s.m, s.d_v})), k_starts, {}, s.g, s.g * s.m};
  store.layer(0).append(queue, {queue.upload(k), k_starts, {}, s.g, s.g * s.m}, panel_v, queue.upload(k_pos),
                        std::span(&s.m, 1));
  LayerView at(model, queue, 0, Phase::Prompt);
  at.prompt = {s.m}, at.rows = {s.n}, at.store = &store.layer(0), at.stores = &store;
  at.q = {queue.upload(q), queue.upload(q_offsets), {}, s.h, s.h * s.n}, at.q_pos = queue.upload(q_pos);
  const auto mechanism = value_or_throw(make_mechanism(value_or_throw(parse_spec("expected-attention"))[0], registry()));
  const Buffer scores = queue.read_back(static_cast<const KeepPolicy&>(*mechanism).score(at).values);
  for (int64_t kv = 0; kv < s.g; ++kv) {
    const auto expected = expected_scores(c, kv, plain_q, rotation, keys[size_t(kv)], 0);
    for (int64_t j = 0; j < s.m; ++j) {
      const double got = scores->at<float>(kv * s.m + j);
      if (j < 4) {
        EXPECT_EQ(got, INFINITY);
      } else {
        EXPECT_NEAR(got / expected[size_t(j)], 1, 2e-3) << "head " << kv << " key " << j;
      }
    }
  }
}

TEST_P(KeepScores, RandomIsUniformAndRepeats) {
  const Case c(shape(8, 400), 2);
  const auto one = kept(c, "random(budget=100)", backend()), again = kept(c, "random(budget=100)", backend()),
             other = kept(c, "random(budget=100,seed=1)", backend());
  EXPECT_EQ(one, again);
  EXPECT_NE(one, other);
  for (const auto& list : one) {
    ASSERT_EQ(list.size(), 100u);
    EXPECT_NEAR(std::accumulate(list.begin(), list.end(), 0.0) / 100, 200, 60);  // deviation of the mean: 11
  }
  if (one.size() > 1) { EXPECT_NE(one[0], one[1]); }
}

TEST_P(KeepScores, DuoAttentionStreamsTheHeadsNamed) {
  const Case c(shape(90, 90));
  std::vector<int32_t> expected = all_of(5);
  for (int32_t j = 70; j < 90; ++j) expected.push_back(j);
  for (const auto& list : kept(c, "duo-attention(sinks=5,recent=20)", backend())) EXPECT_EQ(list, expected);
  if (c.shape.g < 2) return;
  const auto held = kept(c, "duo-attention(sinks=5,recent=20,heads=1)", backend());
  EXPECT_EQ(held[0], all_of(90));
  EXPECT_EQ(held[1], expected);
}

TEST_P(KeepScores, SimLayerKvCutsALazyLayer) {
  const Case c(shape(90, 90), 3);
  double mass = 0;
  for (int64_t head = 0; head < c.shape.h; ++head) {
    const auto p = c.causal(head, 89);
    for (int64_t j = 0; j < 89; ++j) mass += (j < 4 || j >= 69) * p[size_t(j)] / double(c.shape.h);
  }
  std::vector<int32_t> lazy = all_of(4);
  for (int32_t j = 71; j < 90; ++j) lazy.push_back(j);
  const std::string spec = "simlayerkv(recent=20,threshold=";
  for (const auto& list : kept(c, spec + std::to_string(mass + 1e-4) + ")", backend())) EXPECT_EQ(list, all_of(90));
  for (const auto& list : kept(c, spec + std::to_string(mass - 1e-4) + ")", backend())) EXPECT_EQ(list, lazy);
  for (const auto& list : kept(c, "simlayerkv(recent=90,threshold=0)", backend()))
    EXPECT_EQ(list, all_of(90)) << "nothing to cut";
}

TEST_P(KeepScores, ChunkKvKeepsWholeChunksInAllHeads) {
  const Case c(shape(107, 107), 8);
  for (const auto& [budget, chunk] : {std::pair{40, 20}, {33, 10}, {12, 1}}) {
    const std::string spec = "chunkkv(snapkv(budget=" + std::to_string(budget) +
                             ",window=8),chunk=" + std::to_string(chunk) + ")";
    std::vector<double> sum(107, 0.0), scores(107);
    for (int64_t kv = 0; kv < c.shape.g; ++kv) {
      const auto s = snapkv_scores(c, kv, 8, 5);
      for (size_t j = 0; j < 107; ++j) sum[j] += s[j];
    }
    for (int64_t j = 0; j < 107; ++j) {
      const int64_t first = j / chunk * chunk, last = std::min<int64_t>(107, first + chunk);
      scores[size_t(j)] = std::accumulate(sum.begin() + first, sum.begin() + last, 0.0) / double(last - first);
    }
    for (const auto& list : kept(c, spec, backend())) EXPECT_EQ(list, top(scores, budget)) << spec;
  }
}

/// kvpress' walk over chunks of `chunk`, best first: the order in which it takes entries.
std::vector<int32_t> gated_chunks(const std::vector<double>& s, int64_t chunk, int64_t few) {
  struct Chunk {
    int64_t first, last;
    double score, entropy;
  };
  const int64_t m = int64_t(s.size());
  std::vector<Chunk> chunks;
  std::vector<double> scores, entropies;
  for (int64_t first = 0; first < m; first += chunk) {
    Chunk x{first, std::min(m, first + chunk), 0, 0};
    double low = 0, sum = 0;
    for (int64_t j = first; j < x.last; ++j)
      x.score += s[size_t(j)] / double(x.last - first), low = std::min(low, s[size_t(j)]);
    for (int64_t j = first; j < x.last; ++j) sum += s[size_t(j)] - low;
    for (int64_t j = first; j < x.last; ++j) {
      const double p = (s[size_t(j)] - low) / (sum + 1e-8);
      x.entropy -= p * std::log(p + 1e-8);
    }
    x.entropy = x.last - first > 1 ? std::clamp(x.entropy / std::log(double(x.last - first)), 0.0, 1.0) : 0;
    scores.push_back(x.score), entropies.push_back(x.entropy), chunks.push_back(x);
  }
  std::sort(scores.begin(), scores.end()), std::sort(entropies.begin(), entropies.end());
  const double score = scores[(scores.size() - 1) / 2], entropy = entropies[(entropies.size() - 1) / 2];
  std::stable_sort(chunks.begin(), chunks.end(), [](const Chunk& a, const Chunk& b) { return a.score > b.score; });
  std::vector<int32_t> order;
  std::vector<double> rest = s;
  for (const Chunk& x : chunks) {
    const int64_t n = x.score >= score && x.entropy < entropy ? std::min(x.last - x.first, few) : x.last - x.first;
    for (int64_t taken = 0; taken < n; ++taken) {
      order.push_back(int32_t(std::max_element(rest.begin() + x.first, rest.begin() + x.last) - rest.begin()));
      rest[size_t(order.back())] = -INFINITY;
    }
  }
  while (order.size() < s.size()) {
    order.push_back(int32_t(std::max_element(rest.begin(), rest.end()) - rest.begin()));
    rest[size_t(order.back())] = -INFINITY;
  }
  return order;
}

TEST_P(KeepScores, EntropyChunkGatesChunksOfFewGoodEntries) {
  for (const auto& [m, budget, chunk, few, window] :
       {std::tuple{107, 40, 10, 4, 8}, {107, 33, 7, 2, 8}, {64, 20, 16, 1, 4}, {50, 12, 1, 4, 8}, {30, 25, 10, 30, 4}}) {
    const Case c(shape(m, m), 18, 2.5);
    for (const bool attention : {true, false}) {
      std::vector<double> sum(size_t(m), 0.0);
      Rows each;
      double most = -INFINITY;
      for (int64_t kv = 0; kv < c.shape.g; ++kv) {
        each.push_back(snapkv_scores(c, kv, window, 5));
        for (int64_t j = 0; j < m && !attention; ++j) {
          double norm = 0;
          for (int64_t e = 0; e < c.shape.d; ++e) norm += std::pow(double(c.k->at<float>(kv, j, e)), 2);
          each.back()[size_t(j)] = -std::sqrt(norm);
        }
        for (double x : each.back())
          if (std::isfinite(x)) most = std::max(most, x);
      }
      for (const auto& s : each)
        for (size_t j = 0; j < sum.size(); ++j) sum[j] += std::isfinite(s[j]) ? s[j] : most + 1;
      const std::string inner = attention ? "snapkv(budget=" + std::to_string(budget) +
                                                ",window=" + std::to_string(window) + ")"
                                          : "knorm(budget=" + std::to_string(budget) + ")",
                        spec = "entropy-chunk(" + inner + ",chunk=" + std::to_string(chunk) +
                               ",few=" + std::to_string(few) + ")";
      std::set<int32_t> taken;  // forced ones stay, whatever the gate says of their chunk
      for (int32_t j = int32_t(m - (attention ? window : 0)); j < m; ++j) taken.insert(j);
      for (int32_t j : gated_chunks(sum, chunk, few))
        if (int64_t(taken.size()) < budget) taken.insert(j);
      const std::vector<int32_t> expected(taken.begin(), taken.end());
      for (const auto& list : kept(c, spec, backend())) EXPECT_EQ(list, expected) << spec;
    }
  }
}

TEST_P(KeepScores, CaoteIsTheOutputsMove) {
  const Case c(shape(64, 64), 10);
  const int64_t m = c.shape.m, d = c.shape.d_v;
  for (bool fast : {false, true}) {
    const auto held = kept(c, std::string("caote(h2o(budget=20,recent=0.25),fast=") + (fast ? "true)" : "false)"),
                           backend());
    for (int64_t kv = 0; kv < c.shape.g; ++kv) {
      auto a = grouped(c, kv, column_sums(c, c.shape.n));
      std::fill(a.end() - 5, a.end(), 0.0);  // forced: no part of the output
      const double total = std::accumulate(a.begin(), a.end(), 0.0);
      std::vector<double> scores;
      auto output = [&](int64_t without) {  // Σ a v over the others, renormalised
        std::vector<double> o(size_t(d), 0.0);
        double sum = 0;
        for (int64_t j = 0; j < m; ++j)
          if (j != without) sum += a[size_t(j)];
        for (int64_t j = 0; j < m; ++j)
          for (int64_t x = 0; x < d && j != without; ++x)
            o[size_t(x)] += a[size_t(j)] / sum * double(c.v->at<float>(kv, j, x));
        return o;
      };
      const auto whole = output(-1);
      for (int64_t j = 0; j < m; ++j) {
        double squares = 0;
        if (fast) {
          for (int64_t x = 0; x < d; ++x) {
            double mean = 0;
            for (int64_t i = 0; i < m; ++i) mean += double(c.v->at<float>(kv, i, x)) / double(m);
            squares += std::pow(mean - double(c.v->at<float>(kv, j, x)), 2);
          }
          const double w = a[size_t(j)] / total;
          scores.push_back(w / (1 - w) * std::sqrt(squares));
        } else {
          const auto less = output(j);
          for (int64_t x = 0; x < d; ++x) squares += std::pow(whole[size_t(x)] - less[size_t(x)], 2);
          scores.push_back(std::sqrt(squares));
        }
        if (j >= m - 5) scores.back() = INFINITY;
      }
      expect_top(held[size_t(kv)], scores, 20, fast ? "fast" : "caote");
    }
  }
}

TEST_P(KeepScores, DmsKeepsWhatPasses) {
  const Case c(shape(100, 100), 7);
  const auto held = kept(c, "dms(knorm,threshold=-4,window=10)", backend());
  bool cut = false;
  for (int64_t kv = 0; kv < c.shape.g; ++kv) {
    std::vector<int32_t> expected;
    for (int32_t j = 0; j < 100; ++j)
      if (j >= 90 || norm(c.k, kv, j) <= 4) expected.push_back(j);
    EXPECT_EQ(held[size_t(kv)], expected);
    cut |= expected.size() < 100;
  }
  EXPECT_TRUE(cut);
}

TEST_P(KeepScores, HeadKvSharesAPoolByScore) {
  const Case c(shape(120, 120), 7);
  const int64_t g = c.shape.g, budget = 40, window = 8;
  for (const bool by_query : {false, true})
    for (const auto& [beta, temperature] : {std::pair{1.2, 1.0}, {4.0, 2.0}}) {
      std::vector<double> scores(size_t(g), 0.0);
      std::string given = "[";
      for (int64_t i = 0; i < (by_query ? c.shape.h : g); ++i) {
        const double x = 1 + double(i * i % 5);
        scores[size_t(by_query ? i / c.group() : i)] += x;
        given += (i ? "," : "") + std::to_string(x);
      }
      const double sum = std::accumulate(scores.begin(), scores.end(), 0.0);
      double powers = 0;
      for (double& x : scores) powers += x = std::pow(x / sum, temperature);
      const std::string spec = "headkv(snapkv(budget=40,window=8),window=8,scores=" + given +
                               "],beta=" + std::to_string(beta) + ",temp=" + std::to_string(temperature) + ")";
      const auto held = kept(c, spec, backend());
      int64_t total = 0;
      for (int64_t kv = 0; kv < g; ++kv) {
        const double shared = std::floor(double(budget - window) / beta);
        const int64_t count = std::llround(scores[size_t(kv)] / powers * shared * double(g) + double(budget - window) - shared) +
                              window;
        EXPECT_EQ(held[size_t(kv)], top(snapkv_scores(c, kv, window, 5), count)) << spec;
        total += count;
      }
      if (total <= g * 120) { EXPECT_NEAR(double(total), double(g * budget), double(g) / 2 + 1); }
    }
}

TEST(KeepScorePolicies, ParametersThatCannotBeAreNamed) {
  const Case c({2, 2, 64, 64, 16, 16});
  for (const auto& [spec, name] : {std::pair{"cur(budget=3)", "sinks"},
                                   {"lagkv(budget=2)", "sinks"},
                                   {"expected-attention(budget=2)", "sinks"},
                                   {"a2sf(budget=4,window=5)", "window"},
                                   {"random(budget=4,sinks=5)", "sinks"},
                                   {"noncausal(kernel=2)", "kernel"},
                                   {"expected-attention(future=500)", "future"},
                                   {"expected-attention(when=every(1))", "when"},
                                   {"a2sf(alpha=0)", "alpha"},
                                   {"chunkkv(snapkv,chunk=0)", "chunk"},
                                   {"simlayerkv(threshold=2)", "threshold"},
                                   {"headkv(snapkv,scores=[1,2,3])", "scores"},
                                   {"headkv(snapkv,scores=[0,0])", "scores"},
                                   {"headkv(snapkv,scores=[a])", "scores"},
                                   {"headkv(snapkv,scores=3)", "scores"},
                                   {"headkv(knorm(budget=16))", "window"}}) {
    const auto out = apply(spec, c.input("reference"));
    ASSERT_FALSE(out.has_value()) << spec;
    EXPECT_EQ(out.error().code, Code::Invalid);
    EXPECT_NE(out.error().text().find(name), std::string::npos) << out.error().text();
  }
}

TEST(KeepScoreErrors, AreSaid) {
  const Case c({2, 2, 40, 40, 16, 16});
  for (const auto& [spec, words] : {std::pair{"forcing-kv(frame=10,parts=4)", "parts=4"},
                                    {"q-filters(when=every(3))", "when=every(n)"},
                                    {"q-filters(budget=3,sinks=5)", "sinks"},
                                    {"spec-kv(kernel=4)", "kernel=4"},
                                    {"spec-kv(budget=8,window=20)", "window"},
                                    {"loki(rank=2)", "rank"},
                                    {"magicpig(tables=1)", "tables"},
                                    {"squeezed-attention(threshold=-1)", "threshold"},
                                    {"sinklora(groups=0)", "groups"}}) {
    const auto out = apply(spec, c.input("reference"));
    ASSERT_FALSE(out) << spec;
    EXPECT_NE(out.error().text().find(words), std::string::npos) << out.error().text();
  }
}

}  // namespace
}  // namespace heed::test
