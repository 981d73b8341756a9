// Policies that look at single rows of attention, at keys and values together, or at the output matrix, against their
// formulas in f64.
#include "keep_case.h"

namespace heed::test {
namespace {

class KeepValues : public Mechanisms {};
HEED_ON_ALL_SETTINGS(KeepValues);

/// A case with an output matrix of 131 outputs, which is no multiple of anything.
struct WithOutput : Case {
  Buffer matrix;
  explicit WithOutput(Shape s, uint64_t seed = 1) : Case(s, seed), matrix(Dtype::F32, {131, s.h * s.d_v}) {
    Random random(seed + 100);
    for (float& x : matrix->span<float>()) x = float(random.normal());
  }
  ApplyOutput run_with(const std::string& spec, const std::string& backend) const {
    ApplyInput in = input(backend);
    in.inputs["output"] = matrix;
    return run(spec, in);
  }
  std::vector<std::vector<int32_t>> kept_with(const std::string& spec, const std::string& backend) const {
    const ApplyOutput out = run_with(spec, backend);
    EXPECT_LT(dense_error(out), kExact) << spec;
    EXPECT_LT(kept_error(*this, out), kExact) << spec;
    return lists(out, "kept");
  }
  /// Mean over the group of ‖W v_j‖₁.
  double carried(int64_t kv, int64_t j) const {
    double sum = 0;
    for (int64_t head = kv * group(); head < (kv + 1) * group(); ++head)
      for (int64_t o = 0; o < 131; ++o) {
        double y = 0;
        for (int64_t c = 0; c < shape.d_v; ++c)
          y += double(matrix->at<float>(o, head * shape.d_v + c)) * double(v->at<float>(kv, j, c));
        sum += std::abs(y) / double(group());
      }
    return sum;
  }
};

TEST_P(KeepValues, IdentityKeepsAll) {
  for (const Shape s : {shape(97, 97), shape(1, 1), shape(5, 130)}) {
    const WithOutput c(s);
    for (const char* spec :
         {"criticalkv(snapkv(budget=1.0))", "critical-ada(snapkv(budget=1.0))", "defensivekv(budget=1.0)",
          "leverage(budget=1.0)", "compactor(budget=1.0)", "finch(budget=1.0)", "rerotate(snapkv(budget=1.0))",
          "cake(budget=1.0)", "capkv(budget=1.0)", "zipvl(tau=1)", "chunk-local(knorm(budget=1.0),chunk=16)",
          "block-evict(keydiff(budget=1.0),block=16)", "moa(alpha=[100000])", "spatten(budget=1.0)", "r-kv(budget=1.0)",
          "razor-attention", "razor-attention(recent=1,share=1)"}) {
      const ApplyOutput out = c.run_with(spec, backend());
      EXPECT_LT(c.dense_error(out), kExact) << spec;
      EXPECT_LT(kept_error(c, out), kExact) << spec;
      for (const auto& list : lists(out, "kept")) EXPECT_EQ(list, all_of(s.m)) << spec;
    }
  }
}

TEST_P(KeepValues, RazorAttentionAnswersForAllThatWent) {
  for (const auto& [m, sinks, recent, share] :
       {std::tuple{97, 3, 20, 0.0}, {130, 0, 10, 0.25}, {61, 4, 60, 0.0}, {50, 4, 1, 0.5}, {60, 4, 57, 0.0}, {9, 2, 5, 0.0}})
    for (const bool alike : {false, true}) {
      const int64_t latest = std::max<int64_t>(recent, int64_t(share * m)), gone = m - sinks - latest;
      Case c(shape(5, m), 4);
      if (alike)  // then nothing is lost
        for (int64_t kv = 0; kv < c.shape.g; ++kv)
          for (int64_t j = sinks + 1; j < m - latest; ++j) {
            for (int64_t e = 0; e < c.shape.d; ++e) c.k->at<float>(kv, j, e) = c.k->at<float>(kv, sinks, e);
            for (int64_t e = 0; e < c.shape.d_v; ++e) c.v->at<float>(kv, j, e) = c.v->at<float>(kv, sinks, e);
          }
      const ApplyOutput out = c.run("razor-attention(sinks=" + std::to_string(sinks) +
                                        ",recent=" + std::to_string(recent) + ",share=" + std::to_string(share) + ")",
                                    backend());
      EXPECT_LT(c.dense_error(out), kExact);
      std::vector<int32_t> expected = all_of(m);
      if (gone > 1) expected.erase(expected.begin() + sinks, expected.begin() + sinks + gone - 1);
      for (const auto& list : lists(out, "kept")) EXPECT_EQ(list, expected);
      for (int64_t head = 0; head < c.shape.h; ++head) {
        const int64_t kv = head / c.group();
        std::vector<double> sum(size_t(c.shape.d_v), 0.0), mean = sum;
        double total = 0, dot = 0;
        for (int64_t j = 0; j < m; ++j) {
          const bool stays = j < sinks || j >= m - latest;
          const double w = stays ? std::exp(c.dot(head, 4, j) / std::sqrt(double(c.shape.d))) : 0;
          total += w;
          if (!stays) dot += c.dot(head, 4, j) / double(gone);
          for (int64_t e = 0; e < c.shape.d_v; ++e)
            sum[size_t(e)] += w * double(c.v->at<float>(kv, j, e)),
                mean[size_t(e)] += stays ? 0 : double(c.v->at<float>(kv, j, e)) / double(gone);
        }
        const double w = gone > 0 ? double(gone) * std::exp(dot / std::sqrt(double(c.shape.d))) : 0;
        const auto dense = c.output(head, c.causal(head, 4));
        for (int64_t e = 0; e < c.shape.d_v; ++e) {
          const double x = out.find("kept_out")->view().at<float>(head, e);
          EXPECT_NEAR(x, (sum[size_t(e)] + w * mean[size_t(e)]) / (total + w), kExact) << m;
          if (alike || gone <= 1) { EXPECT_NEAR(x, dense[size_t(e)], kExact) << m; }
        }
      }
    }
  const Case c(shape(5, 97), 4);
  const ApplyOutput bare = c.run("razor-attention(sinks=3,recent=20,share=0,compensation=false)", backend());
  EXPECT_LT(kept_error(c, bare), kExact);
  for (const auto& list : lists(bare, "kept")) EXPECT_EQ(list.size(), 23u);
}

TEST_P(KeepValues, LeanKPrunesGivenChannelsBetweenTheEnds) {
  for (const auto& [n, m, sinks, recent] : {std::tuple{90, 90, 8, 12}, {77, 77, 0, 0}, {40, 40, 30, 30}, {1, 1, 0, 0}}) {
    const Case c(shape(n, m), 16);
    Random random(17);
    Buffer mask(Dtype::F32, {c.shape.g, c.shape.d});
    for (float& x : mask->span<float>()) x = float(random.below(2));
    ApplyInput in = c.input(backend());
    in.inputs["channels"] = mask;
    const ApplyOutput out = Case::run("leank(sinks=" + std::to_string(sinks) + ",recent=" + std::to_string(recent) + ")", in);
    EXPECT_LT(c.dense_error(out), kExact);
    Case pruned(c.shape, 16);
    for (int64_t kv = 0; kv < c.shape.g; ++kv)
      for (int64_t j = sinks; j < m - recent; ++j)
        for (int64_t x = 0; x < c.shape.d; ++x) pruned.k->at<float>(kv, j, x) *= mask->at<float>(kv, x);
    double changed = 0;
    for (int64_t head = 0; head < c.shape.h; ++head) {
      const auto expected = pruned.output(head, pruned.causal(head, n - 1)), whole = c.output(head, c.causal(head, n - 1));
      for (int64_t x = 0; x < c.shape.d_v; ++x) {
        EXPECT_NEAR(out.find("kept_out")->view().at<float>(head, x), expected[size_t(x)], kExact) << m;
        changed = std::max(changed, std::abs(expected[size_t(x)] - whole[size_t(x)]));
      }
    }
    EXPECT_EQ(changed > 1e-3, m > 1 && sinks + recent < m);
  }
}

TEST_P(KeepValues, ThinkPrunesChannelsOfLeastEnergy) {
  for (const auto& [n, m, window, share] :
       {std::tuple{90, 90, 8, 0.5}, {5, 77, 32, 0.3}, {40, 61, 4, 0.9}, {3, 20, 2, 1.0}, {1, 1, 1, 0.5}}) {
    const Case c(shape(n, m), 6);
    const ApplyOutput out = c.run("think(share=" + std::to_string(share) + ",window=" + std::to_string(window) + ")",
                                  backend());
    EXPECT_LT(c.dense_error(out), kExact);
    const int64_t d = c.shape.d, rows = std::min(n, window), old = std::min(std::max(0, m - window), n);
    for (int64_t kv = 0; kv < c.shape.g; ++kv) {
      std::vector<double> energy;
      for (int64_t x = 0; x < d; ++x) {
        double q = 0, k = 0;
        for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head)
          for (int64_t i = n - rows; i < n; ++i) q += std::pow(double(c.q->at<float>(head, i, x)), 2);
        for (int64_t j = 0; j < m; ++j) k += std::pow(double(c.k->at<float>(kv, j, x)), 2);
        energy.push_back(q * k);
      }
      const auto stays = top(energy, d - int64_t(share * double(d)));
      Case pruned(c.shape, 6);
      for (int64_t j = std::max(0, m - window) - old; j < m - window; ++j)
        for (int64_t x = 0; x < d; ++x)
          if (!std::binary_search(stays.begin(), stays.end(), int32_t(x))) pruned.k->at<float>(kv, j, x) = 0;
      for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head) {
        const auto expected = pruned.output(head, pruned.causal(head, n - 1));
        for (int64_t x = 0; x < c.shape.d_v; ++x)
          EXPECT_NEAR(out.find("kept_out")->view().at<float>(head, x), expected[size_t(x)], kExact) << m;
      }
    }
  }
}

TEST_P(KeepValues, TrimmedLlamaKeepsWhatAnyHeadNames) {
  for (const Shape s : {shape(90, 90), shape(20, 77), shape(1, 1), shape(1, 50)})
    for (const double share : {0.1, 0.25, 0.6}) {
      const Case c(s, 7);
      const auto held = kept(c, "trimmed-llama(budget=" + std::to_string(share) + ")", backend());
      const int64_t each = std::max<int64_t>(1, int64_t(share * double(s.m) + 1e-9));
      const Rows paid = column_sums(c, s.n);
      std::set<int32_t> any;
      for (const auto& row : paid)
        for (int32_t j : top(row, each)) any.insert(j);
      EXPECT_LE(int64_t(any.size()), s.h * each);
      for (const auto& list : held) EXPECT_EQ(list, (std::vector<int32_t>(any.begin(), any.end())));
    }
}

/// The two stages inside one head's count.
std::vector<double> two_stages(const WithOutput& c, int64_t kv, const std::vector<double>& base, int64_t count, double first) {
  std::vector<double> out = base;
  for (int64_t j = 0; j < c.shape.m; ++j) out[size_t(j)] = (base[size_t(j)] + 1e-4) * c.carried(kv, j);
  for (int32_t j : top(base, int64_t(first * double(count)))) out[size_t(j)] = INFINITY;
  for (int64_t j = 0; j < c.shape.m; ++j)
    if (std::isinf(base[size_t(j)])) out[size_t(j)] = INFINITY;
  return out;
}

TEST_P(KeepValues, CriticalKvChoosesTheRestByWhatTheOutputCarries) {
  for (const Shape s : {shape(90, 90), shape(20, 77)}) {
    const WithOutput c(s, 4);
    for (const double first : {0.0, 0.5, 0.77}) {
      const auto held = c.kept_with("criticalkv(snapkv(budget=41,window=8),first=" + std::to_string(first) + ")", backend());
      for (int64_t kv = 0; kv < s.g; ++kv)
        expect_top(held[size_t(kv)], two_stages(c, kv, snapkv_scores(c, kv, 8, 5), 41, first), 41, "criticalkv");
    }
    EXPECT_EQ(c.kept_with("criticalkv(snapkv(budget=41,window=8),first=1)", backend()),
              c.kept_with("snapkv(budget=41,window=8)", backend()));
  }
}

TEST_P(KeepValues, CriticalKvAroundAdaKvDividesFirst) {
  const WithOutput c(shape(80, 80), 6);
  const int64_t m = 80, g = c.shape.g, budget = 30;
  std::vector<std::vector<double>> base;
  std::vector<double> pool;
  for (int64_t kv = 0; kv < g; ++kv) {
    base.push_back(snapkv_scores(c, kv, 8, 5));
    std::vector<double> floored = base.back();
    for (int32_t j : top(floored, budget / 5)) floored[size_t(j)] = INFINITY;
    pool.insert(pool.end(), floored.begin(), floored.end());
  }
  std::vector<int64_t> counts(size_t(g), 0);
  for (int32_t i : top(pool, g * budget)) ++counts[size_t(i / m)];
  for (const char* spec :
       {"criticalkv(adakv(snapkv(budget=30,window=8),port=true))", "critical-ada(snapkv(budget=30,window=8))"}) {
    const auto held = c.kept_with(spec, backend());
    for (int64_t kv = 0; kv < g; ++kv)
      expect_top(held[size_t(kv)], two_stages(c, kv, base[size_t(kv)], counts[size_t(kv)], 0.5), counts[size_t(kv)], spec);
  }
  EXPECT_EQ(c.kept_with("critical-ada(snapkv(budget=30,window=8),alpha=1,first=1)", backend()),
            c.kept_with("snapkv(budget=30,window=8)", backend()));
}

TEST_P(KeepValues, CriticalKvNamesTheMatrixItNeeds) {
  const Case c(shape(40, 40));
  const auto out = apply("criticalkv(snapkv(budget=36))", c.input(backend()));
  ASSERT_FALSE(out.has_value());
  EXPECT_NE(out.error().text().find("output"), std::string::npos) << out.error().text();
}

TEST_P(KeepValues, DefensiveKvTakesTheWorstCase) {
  const int64_t window = 8, kernel = 5;
  for (const Shape s : {shape(90, 90), shape(8, 77)}) {
    const WithOutput c(s, 5);
    const int64_t m = s.m, prefix = m - window;
    for (const auto& [mass, released, budget] : {std::tuple{0.9, false, 45}, {0.6, true, 30}, {0.0, false, 30}}) {
      std::vector<double> pool, bare;
      Rows n(size_t(s.g), std::vector<double>(size_t(m)));
      std::vector<double> total(size_t(m), 0.0);
      double before_window = 0;  // the mean over all heads of what the `window` keys before it are paid
      for (int64_t head = 0; head < s.h; ++head)
        for (int64_t i = s.n - window; i < s.n; ++i) {
          const auto p = c.causal(head, i);
          before_window += std::accumulate(p.begin() + prefix - window, p.begin() + prefix, 0.0) / double(s.h * window);
        }
      for (int64_t kv = 0; kv < s.g; ++kv)
        for (int64_t j = 0; j < m; ++j) total[size_t(j)] += n[size_t(kv)][size_t(j)] = c.carried(kv, j);
      for (int64_t kv = 0; kv < s.g; ++kv) {
        std::vector<double> worst(size_t(m), 0.0), mean(size_t(m), 0.0);
        for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head)
          for (int64_t i = s.n - window; i < s.n; ++i) {
            const auto p = c.causal(head, i);
            std::vector<double> pooled(size_t(prefix), 0.0);
            double own = 0, sum = 0;
            for (int64_t j = 0; j < prefix; ++j) {
              for (int64_t x = std::max<int64_t>(0, j - kernel / 2); x <= std::min(prefix - 1, j + kernel / 2); ++x)
                pooled[size_t(j)] += p[size_t(x)] / double(kernel);
              own += p[size_t(j)], sum += pooled[size_t(j)];
            }
            for (int64_t j = 0; j < prefix; ++j)
              worst[size_t(j)] = std::max(worst[size_t(j)], pooled[size_t(j)] * own / sum);
            for (int64_t j = 0; j < m; ++j) mean[size_t(j)] += p[size_t(j)] / double(window * c.group());
          }
        const double least = std::accumulate(worst.begin(), worst.begin() + prefix, 0.0) / double(prefix),
                     before = std::accumulate(mean.begin(), mean.begin() + prefix, 0.0);
        const double o = released ? before_window : std::accumulate(mean.begin() + prefix, mean.end(), 0.0);
        const int64_t most = (released ? prefix * budget / m : budget) - window;
        std::vector<double> scores(size_t(m), INFINITY);
        for (int64_t j = 0; j < prefix; ++j)
          scores[size_t(j)] = std::max(worst[size_t(j)], least) * n[size_t(kv)][size_t(j)] / total[size_t(j)];
        bare.insert(bare.end(), scores.begin(), scores.end());
        mean.resize(size_t(prefix));
        std::vector<int32_t> order = all_of(prefix);
        std::stable_sort(order.begin(), order.end(),
                         [&](int32_t a, int32_t b) { return mean[size_t(a)] > mean[size_t(b)]; });
        double sum = 0;
        for (int64_t i = 0; i < std::min(prefix, most); ++i) {
          sum += mean[size_t(order[size_t(i)])] / before;
          if (sum > mass - o) break;
          scores[size_t(order[size_t(i)])] = INFINITY;
        }
        pool.insert(pool.end(), scores.begin(), scores.end());
      }
      const std::string spec = "defensivekv(window=8,budget=" + std::to_string(budget) +
                               ",mass=" + std::to_string(mass) + (released ? ",as_released=true)" : ")");
      std::vector<int32_t> joined;
      const auto held = c.kept_with(spec, backend());
      for (int64_t kv = 0; kv < s.g; ++kv)
        for (int32_t j : held[size_t(kv)]) joined.push_back(int32_t(kv * m + j));
      expect_top(joined, pool, s.g * budget, spec);
      if (mass == 0) { EXPECT_EQ(pool, bare) << "nothing is sure"; }
    }
  }
}

/// x^T (Σ x x^T + ridge)^-1 x for every row, by elimination with pivoting.
std::vector<double> leverages(const Rows& x, double ridge) {
  const size_t d = x[0].size();
  std::vector<double> out;
  Rows a(d, std::vector<double>(d, 0.0));
  for (const auto& row : x)
    for (size_t i = 0; i < d; ++i)
      for (size_t j = 0; j < d; ++j) a[i][j] += row[i] * row[j];
  for (size_t i = 0; i < d; ++i) a[i][i] += ridge;
  for (const auto& row : x) {
    Rows m = a;
    std::vector<double> y = row;
    for (size_t p = 0; p < d; ++p) {
      size_t best = p;
      for (size_t i = p; i < d; ++i)
        if (std::abs(m[i][p]) > std::abs(m[best][p])) best = i;
      std::swap(m[p], m[best]), std::swap(y[p], y[best]);
      for (size_t i = p + 1; i < d; ++i) {
        const double f = m[i][p] / m[p][p];
        for (size_t j = p; j < d; ++j) m[i][j] -= f * m[p][j];
        y[i] -= f * y[p];
      }
    }
    for (size_t p = d; p-- > 0;) {
      for (size_t j = p + 1; j < d; ++j) y[p] -= m[p][j] * y[j];
      y[p] /= m[p][p];
    }
    double sum = 0;
    for (size_t i = 0; i < d; ++i) sum += row[i] * y[i];
    out.push_back(std::max(0.0, sum));
  }
  return out;
}

Rows centred_keys(const Case& c, int64_t kv, int64_t first, int64_t last) {
  Rows x;
  std::vector<double> mean(size_t(c.shape.d), 0.0);
  for (int64_t j = first; j < last; ++j)
    for (int64_t a = 0; a < c.shape.d; ++a) mean[size_t(a)] += double(c.k->at<float>(kv, j, a)) / double(last - first);
  for (int64_t j = first; j < last; ++j) {
    auto& row = x.emplace_back();
    for (int64_t a = 0; a < c.shape.d; ++a) row.push_back(double(c.k->at<float>(kv, j, a)) - mean[size_t(a)]);
  }
  return x;
}

TEST_P(KeepValues, LeverageIsTheHatMatrix) {
  for (const Shape s : {shape(90, 90), shape(11, 61, 20)}) {
    const Case c(s, 3);
    for (const double ridge : {0.01, 25.0}) {
      const std::string spec = "leverage(budget=30,ridge=" + std::to_string(ridge) + ")";
      const auto held = kept(c, spec, backend());
      for (int64_t kv = 0; kv < s.g; ++kv) {
        const auto scores = leverages(centred_keys(c, kv, 0, s.m), ridge);
        if (ridge < 1) { EXPECT_NEAR(std::accumulate(scores.begin(), scores.end(), 0.0), double(s.d), 0.1) << "rank"; }
        expect_top(held[size_t(kv)], scores, 30, spec);
      }
    }
  }
}

// A sketch mixes channels at random: an entry far from all others stands out in every one of them.
TEST_P(KeepValues, LeverageFindsOutliersInASketch) {
  Case c(shape(80, 80), 3);
  for (int64_t kv = 0; kv < c.shape.g; ++kv)
    for (int64_t a = 0; a < c.shape.d; ++a) c.k->at<float>(kv, 33, a) *= 40, c.k->at<float>(kv, 61, a) *= 40;
  for (const char* spec : {"leverage(budget=5,sketch=8)", "leverage(budget=5,sketch=8,seed=3)"})
    for (const auto& list : kept(c, spec, backend())) {
      EXPECT_TRUE(std::binary_search(list.begin(), list.end(), 33)) << spec;
      EXPECT_TRUE(std::binary_search(list.begin(), list.end(), 61)) << spec;
    }
}

TEST_P(KeepValues, CompactorAddsWhatStandsOutAndWhatIsSeen) {
  const int64_t sinks = 3, recent = 2, tile = 24;
  for (const Shape s : {shape(90, 90), shape(64, 64)}) {
    const Case c(s, 9, 0.3);
    for (const auto& [blend, budget] : {std::pair{-1.0, 30}, {0.0, 30}, {4.0, 21}}) {
      const int64_t first = sinks, last = s.m - recent;
      Rows drawn, apart;
      for (int64_t kv = 0; kv < s.g; ++kv) {
        std::vector<double> mass(size_t(s.m), 0.0), smooth;
        for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head)
          for (int64_t i = first; i < last; ++i) {
            const int64_t from = first + (i - first) / tile * tile, to = std::min(last, from + tile);
            double total = 0;
            for (int64_t j = from; j < to; ++j) total += std::exp(c.dot(head, i, j));
            for (int64_t j = from; j < to; ++j)
              mass[size_t(j)] += std::exp(c.dot(head, i, j)) / total / double(c.group());
          }
        for (int64_t j = first; j < last; ++j) mass[size_t(j)] *= norm(c.v, kv, j);
        for (int64_t j = first; j < last; ++j) {
          double sum = 0;
          for (int64_t x = std::max(first, j - 1); x <= std::min(last - 1, j + 1); ++x) sum += mass[size_t(x)] / 3;
          smooth.push_back(sum);
        }
        drawn.push_back(smooth), apart.push_back(leverages(centred_keys(c, kv, first, last), 0.01));
      }
      for (Rows* x : {&drawn, &apart}) {
        double mean = 0, squares = 0, count = double(s.g * (last - first));
        for (const auto& row : *x)
          for (double y : row) mean += y / count;
        for (const auto& row : *x)
          for (double y : row) squares += (y - mean) * (y - mean) / (count - 1);
        for (auto& row : *x)
          for (double& y : row) y = (y - mean) / std::sqrt(squares);
      }
      const std::string spec = "compactor(tile=24,sinks=3,recent=2,budget=" + std::to_string(budget) +
                               ",blend=" + std::to_string(blend) + ")";
      const double weight = blend < 0 ? 1 - double(budget) / double(s.m) : blend;
      const auto held = kept(c, spec, backend());
      for (int64_t kv = 0; kv < s.g; ++kv) {
        std::vector<double> scores(size_t(s.m), INFINITY);
        for (int64_t j = first; j < last; ++j)
          scores[size_t(j)] = weight * apart[size_t(kv)][size_t(j - first)] + drawn[size_t(kv)][size_t(j - first)];
        expect_top(held[size_t(kv)], scores, budget, spec);
      }
    }
  }
}

TEST_P(KeepValues, FinchWeighsRowsByWhatTheySee) {
  const int64_t window = 9;
  for (const Shape s : {shape(90, 90), shape(12, 77)}) {
    const Case c(s, 5);
    const auto held = kept(c, "finch(window=9,budget=30)", backend());
    for (int64_t kv = 0; kv < s.g; ++kv) {
      std::vector<double> scores(size_t(s.m), 0.0);
      for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head)
        for (int64_t u = 0; u < window; ++u) {
          const auto p = c.causal(head, s.n - window + u);
          for (int64_t j = 0; j < s.m; ++j) scores[size_t(j)] += double(s.m - window + u) * p[size_t(j)];
        }
      std::fill(scores.end() - window, scores.end(), INFINITY);
      expect_top(held[size_t(kv)], scores, 30, "finch");
    }
    EXPECT_EQ(kept(c, "finch(window=9,budget=30,weighted=false)", backend()),
              kept(c, "snapkv(window=9,budget=30,kernel=1)", backend()));
  }
}

TEST_P(KeepValues, CakeAddsHowMuchAWeightVaries) {
  const int64_t window = 8;
  for (const Shape s : {shape(90, 90), shape(8, 77)}) {
    const Case c(s, 5);
    for (const double gamma : {0.0, 200.0}) {
      const std::string spec = "cake(window=8,budget=30,kernel=3,gamma=" + std::to_string(gamma) + ")";
      const auto held = kept(c, spec, backend());
      const int64_t prefix = s.m - window;
      for (int64_t kv = 0; kv < s.g; ++kv) {
        std::vector<double> votes(size_t(prefix), 0.0), scores(size_t(s.m), INFINITY);
        for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head) {
          Rows p;
          for (int64_t i = s.n - window; i < s.n; ++i) p.push_back(c.causal(head, i));
          for (int64_t j = 0; j < prefix; ++j) {
            double mean = 0, squares = 0;
            for (const auto& row : p) mean += row[size_t(j)] / double(window);
            for (const auto& row : p) squares += std::pow(row[size_t(j)] - mean, 2) / double(window - 1);
            votes[size_t(j)] += mean + gamma * squares;
          }
        }
        for (int64_t j = 0; j < prefix; ++j) {
          scores[size_t(j)] = 0;
          for (int64_t x = std::max<int64_t>(0, j - 1); x <= std::min(prefix - 1, j + 1); ++x)
            scores[size_t(j)] += votes[size_t(x)];
        }
        expect_top(held[size_t(kv)], scores, 30, spec);
      }
    }
  }
}

// A layer that a value's loss would cost most: log det A − log det (A − w v v^T) = −log(1 − s).
TEST_P(KeepValues, CapKvIsALossOfVolume) {
  for (const Shape s : {shape(60, 60, 16, 12), shape(20, 47, 16, 12)}) {
    const Case c(s, 5);
    const auto held = kept(c, "capkv(budget=20,tau=3)", backend());
    auto log_det = [&](Rows a) {
      double sum = 0;
      for (size_t p = 0; p < a.size(); ++p) {
        sum += std::log(a[p][p]);
        for (size_t i = p + 1; i < a.size(); ++i) {
          const double f = a[i][p] / a[p][p];
          for (size_t j = p; j < a.size(); ++j) a[i][j] -= f * a[p][j];
        }
      }
      return sum;
    };
    for (int64_t kv = 0; kv < s.g; ++kv) {
      std::vector<double> scores(size_t(s.m), 0.0);
      for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head) {
        std::vector<double> mu(size_t(s.d), 0.0), w;
        for (int64_t i = 4; i < s.n; ++i)
          for (int64_t a = 0; a < s.d; ++a) mu[size_t(a)] += double(c.q->at<float>(head, i, a));
        double length = 0, most = -1;
        for (double x : mu) length += x * x;
        for (int64_t j = 0; j < s.m; ++j) {
          double dot = 0;
          for (int64_t a = 0; a < s.d; ++a) dot += mu[size_t(a)] * double(c.k->at<float>(kv, j, a));
          w.push_back(dot / std::sqrt(length) / norm(c.k, kv, j));
          if (j >= 4) most = std::max(most, w.back());
        }
        for (double& x : w) x = std::exp(3 * (x - most));
        Rows a(size_t(s.d_v), std::vector<double>(size_t(s.d_v), 0.0));
        auto add = [&](Rows& to, int64_t j, double weight) {
          for (int64_t x = 0; x < s.d_v; ++x)
            for (int64_t y = 0; y < s.d_v; ++y)
              to[size_t(x)][size_t(y)] += weight * double(c.v->at<float>(kv, j, x)) * double(c.v->at<float>(kv, j, y));
        };
        for (size_t x = 0; x < a.size(); ++x) a[x][x] = 1;
        for (int64_t j = 4; j < s.m; ++j) add(a, j, w[size_t(j)] + 1e-6);
        for (int64_t j = 4; j < s.m; ++j) {
          Rows less = a;
          add(less, j, -w[size_t(j)]);
          scores[size_t(j)] += 1 - std::exp(log_det(less) - log_det(a));
        }
      }
      std::fill(scores.begin(), scores.begin() + 4, INFINITY);
      expect_top(held[size_t(kv)], scores, 20, "capkv");
    }
  }
}

TEST_P(KeepValues, ZipVlKeepsWhatGathersTheMass) {
  for (const Shape s : {shape(80, 80), shape(33, 70)}) {
    const Case c(s, 6);
    std::vector<double> mass(size_t(s.m), 0.0), mean;
    for (const auto& row : column_sums(c, s.n))
      for (int64_t j = 0; j < s.m; ++j) mass[size_t(j)] += row[size_t(j)];
    const double total = std::accumulate(mass.begin(), mass.end(), 0.0);
    for (int64_t j = 0; j < s.m; ++j) mean.push_back(mass[size_t(j)] / double(std::min(s.n, s.m - j)));
    size_t before = 0;
    for (const double tau : {0.3, 0.8, 0.95}) {
      auto sorted = mass;
      std::sort(sorted.rbegin(), sorted.rend());
      size_t p = 0;
      for (double sum = 0; sum < tau * total; ++p) sum += sorted[p];
      for (const auto& list : kept(c, "zipvl(tau=" + std::to_string(tau) + ")", backend()))
        expect_top(list, mean, int64_t(p), "zipvl");
      EXPECT_GT(p, before);
      before = p;
    }
  }
}

TEST_P(KeepValues, ChunkLocalKeepsTheSameShareOfEveryChunk) {
  const Case c(shape(107, 107), 8);
  for (const auto& [budget, share] : {std::pair{"0.3", 0.3}, {"40", 40.0 / 107}, {"1", 1.0 / 107}})
    for (const int64_t chunk : {1, 16, 200}) {
      const std::string spec = std::string("chunk-local(knorm(budget=") + budget + "),chunk=" + std::to_string(chunk) +
                               ")";
      const auto held = kept(c, spec, backend());
      for (int64_t kv = 0; kv < c.shape.g; ++kv) {
        std::vector<int32_t> expected;
        for (int64_t first = 0; first < 107; first += chunk) {
          std::vector<double> scores;
          for (int64_t j = first; j < std::min<int64_t>(107, first + chunk); ++j) scores.push_back(-norm(c.k, kv, j));
          const int64_t count = std::max<int64_t>(1, int64_t(double(scores.size()) * share + 1e-9));
          for (int32_t j : top(scores, count)) expected.push_back(int32_t(first) + j);
        }
        EXPECT_EQ(held[size_t(kv)], expected) << spec;
      }
    }
}

TEST_P(KeepValues, SpattenAddsUpAllHeads) {
  for (const Shape s : {shape(80, 80), shape(33, 70)}) {
    const Case c(s, 6);
    std::vector<double> mass(size_t(s.m), 0.0);
    for (const auto& row : column_sums(c, s.n))
      for (int64_t j = 0; j < s.m; ++j) mass[size_t(j)] += row[size_t(j)];
    for (const auto& list : kept(c, "spatten(budget=25)", backend())) expect_top(list, mass, 25, "spatten");
  }
}

TEST_P(KeepValues, MoaGivesEachHeadItsBand) {
  const Case c(shape(90, 90));
  std::string alpha, beta;
  std::vector<int64_t> bands;
  for (int64_t kv = 0; kv < c.shape.g; ++kv) {
    alpha += (kv ? "," : "") + std::to_string(5 + 10 * kv), beta += kv ? ",0.2" : "0.1";
    bands.push_back((5 + 10 * kv + (kv ? 18 : 9) + 7) / 8 * 8);
  }
  const std::string spec = "moa(sinks=3,block=8,alpha=[" + alpha + "],beta=[" + beta + "])";
  const auto held = kept(c, spec, backend());
  for (int64_t kv = 0; kv < c.shape.g; ++kv) {
    std::vector<int32_t> expected = all_of(3);
    for (int64_t j = 90 - bands[size_t(kv)]; j < 90; ++j) expected.push_back(int32_t(j));
    EXPECT_EQ(held[size_t(kv)], expected) << spec;
  }
  EXPECT_EQ(kept(c, "moa(sinks=3,block=8,alpha=[5],beta=[0.1])", backend())[0], held[0]) << "one for all";
}

TEST_P(KeepValues, RkvTakesRedundancyOff) {
  const int64_t window = 4;
  for (const Shape s : {shape(60, 60), shape(7, 51)}) {
    Case c(s, 5);
    for (int64_t kv = 0; kv < s.g; ++kv)  // some keys alike
      for (int64_t j = 10; j < 30; ++j)
        for (int64_t a = 0; a < s.d; ++a)
          c.k->at<float>(kv, j, a) = c.k->at<float>(kv, j % 3, a) + 0.3f * c.k->at<float>(kv, j, a);
    for (const double lambda : {0.0, 0.1, 0.6, 1.0}) {
      const std::string spec = "r-kv(window=4,kernel=3,budget=25,lambda=" + std::to_string(lambda) + ")";
      const auto held = kept(c, spec, backend());
      const int64_t prefix = s.m - window;
      for (int64_t kv = 0; kv < s.g; ++kv) {
        std::vector<double> paid(size_t(prefix), 0.0), alike(size_t(s.m), 0.0), scores(size_t(s.m), INFINITY);
        for (int64_t i = s.n - window; i < s.n; ++i) {
          std::vector<double> e;
          double sum = 0;
          for (int64_t j = 0; j < prefix; ++j) {
            double most = -INFINITY;
            for (int64_t head = kv * c.group(); head < (kv + 1) * c.group(); ++head)
              most = std::max(most, c.dot(head, i, j) / std::sqrt(double(s.d)));
            e.push_back(std::exp(most)), sum += e.back();
          }
          for (int64_t j = 0; j < prefix; ++j) paid[size_t(j)] += e[size_t(j)] / sum / double(window);
        }
        double total = 0;
        for (int64_t i = 0; i < s.m; ++i) {
          std::vector<double> cosine(size_t(s.m), 0.0);
          int64_t newest = 0;
          for (int64_t j = 0; j < s.m; ++j) {
            double dot = 0;
            for (int64_t a = 0; a < s.d; ++a)
              dot += double(c.k->at<float>(kv, i, a)) * double(c.k->at<float>(kv, j, a));
            cosine[size_t(j)] = i == j ? 0 : dot / norm(c.k, kv, i) / norm(c.k, kv, j);
            if (cosine[size_t(j)] > 0.5) newest = j;
          }
          cosine[size_t(newest)] = 0;
          for (int64_t j = 0; j < s.m; ++j) alike[size_t(j)] += cosine[size_t(j)] / double(s.m);
        }
        for (double& x : alike) total += x = std::exp(x);
        for (int64_t j = 0; j < prefix; ++j) {
          double most = 0;
          for (int64_t x = std::max<int64_t>(0, j - 1); x <= std::min(prefix - 1, j + 1); ++x)
            most = std::max(most, paid[size_t(x)]);
          scores[size_t(j)] = lambda * most - (1 - lambda) * alike[size_t(j)] / total;
        }
        expect_top(held[size_t(kv)], scores, 25, spec);
      }
    }
  }
}

TEST(KeepValuePolicies, ParametersThatCannotBeAreNamed) {
  const Case c({2, 2, 64, 64, 16, 16});
  for (const auto& [spec, name] : {std::pair{"defensivekv(budget=16)", "window"},
                                   {"defensivekv(kernel=2)", "kernel"},
                                   {"defensivekv(when=every(2))", "when"},
                                   {"compactor(budget=11)", "sinks"},
                                   {"compactor(kernel=2)", "kernel"},
                                   {"finch(budget=16)", "window"},
                                   {"finch(when=every(2))", "when"},
                                   {"cake(budget=16)", "window"},
                                   {"cake(kernel=4)", "kernel"},
                                   {"capkv(future=500)", "future"},
                                   {"capkv(budget=3)", "sinks"},
                                   {"zipvl(tau=1.5)", "tau"},
                                   {"moa(alpha=[1,2,3])", "alpha"},
                                   {"moa(beta=[0.1,x])", "beta"},
                                   {"spatten(dense=2)", "dense"},
                                   {"r-kv(budget=7)", "window"},
                                   {"r-kv(kernel=2)", "kernel"}}) {
    const auto out = apply(spec, c.input("reference"));
    ASSERT_FALSE(out.has_value()) << spec;
    EXPECT_EQ(out.error().code, Code::Invalid);
    EXPECT_NE(out.error().text().find(name), std::string::npos) << out.error().text();
  }
}

}  // namespace
}  // namespace heed::test
