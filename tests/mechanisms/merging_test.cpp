// Policies that write what goes into what stays, against their definitions in plain loops.
#include "attention/scores.h"
#include "keep_case.h"
#include "plan_case.h"

namespace heed::test {
namespace {

class Merging : public Mechanisms {};
HEED_ON_ALL_SETTINGS(Merging);

double key_cosine(const Case& c, int64_t kv, int64_t i, int64_t j) {
  double sum = 0;
  for (int64_t e = 0; e < c.shape.d; ++e) sum += double(c.k->at<float>(kv, i, e)) * double(c.k->at<float>(kv, j, e));
  return sum / norm(c.k, kv, i) / norm(c.k, kv, j);
}

/// Values of a KV head behind a cut that keeps `held`.
Rows blended(const Case& c, int64_t kv, const std::vector<int32_t>& held, double least, double share) {
  struct Gone {
    int64_t from;
    int32_t to;
    double cosine;
  };
  std::vector<Gone> gone;
  std::vector<double> alike;  // of all that go; those not alike enough come last
  for (int64_t i = 0; i < c.shape.m; ++i) {
    if (std::binary_search(held.begin(), held.end(), int32_t(i))) continue;
    Gone best{i, -1, -2};
    for (int32_t t : held)
      if (const double x = key_cosine(c, kv, i, t); x > best.cosine) best.to = t, best.cosine = x;
    gone.push_back(best);
    alike.push_back(best.cosine >= least ? best.cosine : -INFINITY);
  }
  std::sort(alike.begin(), alike.end());
  // Above a quantile that lies between two are those from the upper one on.
  const double threshold = alike.empty() ? INFINITY : alike[size_t(std::ceil((1 - share) * double(alike.size() - 1)))];
  Rows sum(size_t(c.shape.m), std::vector<double>(size_t(c.shape.d_v)));
  std::vector<double> mass(size_t(c.shape.m), 1.0);
  for (int64_t j = 0; j < c.shape.m; ++j)
    for (int64_t e = 0; e < c.shape.d_v; ++e) sum[size_t(j)][size_t(e)] = c.v->at<float>(kv, j, e);
  for (const Gone& x : gone) {
    if (x.cosine < least || x.cosine < threshold) continue;
    const double from = norm(c.v, kv, x.from), to = norm(c.v, kv, x.to),
                 u = std::max(0.0, x.cosine) * from / (from + to + 1e-6);
    mass[size_t(x.to)] += u;
    for (int64_t e = 0; e < c.shape.d_v; ++e) sum[size_t(x.to)][size_t(e)] += u * double(c.v->at<float>(kv, x.from, e));
  }
  for (size_t j = 0; j < sum.size(); ++j)
    for (double& e : sum[j]) e /= mass[j];
  return sum;
}

/// The largest difference of what the last query reads from its weights over the entries held and the values given.
double blended_error(const Case& c, const ApplyOutput& out, const std::vector<Rows>& values) {
  const auto held = lists(out, "kept");
  double worst = 0;
  for (int64_t head = 0; head < c.shape.h; ++head) {
    const int64_t kv = head / c.group();
    const auto& list = held[size_t(kv)];
    const auto p = c.weights(head, c.shape.n - 1,
                             [&](int64_t j) { return std::binary_search(list.begin(), list.end(), int32_t(j)); });
    for (int64_t e = 0; e < c.shape.d_v; ++e) {
      double sum = 0;
      for (int32_t j : list) sum += p[size_t(j)] * values[size_t(kv)][size_t(j)][size_t(e)];
      worst = std::max(worst, std::abs(sum - double(out.find("kept_out")->view().at<float>(head, e))));
    }
  }
  return worst;
}

TEST_P(Merging, MergeEvictBlendsValuesIntoTheMostAlike) {
  for (const Shape s : {shape(90, 90), shape(7, 130, 12)})
    for (const auto& [inner, least, share] : {std::tuple{"knorm(budget=30)", 0.0, 1.0},
                                              {"knorm(budget=30)", 0.3, 1.0},
                                              {"knorm(budget=20)", -1.0, 0.5},
                                              {"knorm(budget=45)", 0.1, 0.3},
                                              {"knorm(budget=1)", 0.0, 1.0},
                                              {"adakv(knorm(budget=30),alpha=0)", 0.0, 0.8},
                                              {"knorm(budget=30)", 0.0, 0.0}}) {
      const Case c(s, 6);
      const std::string spec = "merge-evict(" + std::string(inner) + ",least=" + std::to_string(least) +
                               ",share=" + std::to_string(share) + ")";
      const ApplyOutput out = c.run(spec, backend());
      EXPECT_LT(c.dense_error(out), kExact) << spec;
      const auto held = lists(out, "kept");
      EXPECT_EQ(held, kept(c, inner, backend())) << spec;
      std::vector<Rows> values, plain;
      for (int64_t kv = 0; kv < s.g; ++kv) {
        values.push_back(blended(c, kv, held[size_t(kv)], least, share));
        plain.push_back(blended(c, kv, held[size_t(kv)], 2, 1));
      }
      EXPECT_LT(blended_error(c, out, values), kExact) << spec;
      EXPECT_GT(blended_error(c, out, plain), 1e-3) << spec << " blends nothing";
    }
}

TEST_P(Merging, MergeEvictOfNothingAlikeOnlyEvicts) {
  const Case c(shape(60, 60), 7);
  const ApplyOutput out = c.run("merge-evict(snapkv(budget=20,window=4),least=1)", backend());
  EXPECT_LT(kept_error(c, out), kExact);
  EXPECT_EQ(lists(out, "kept"), kept(c, "snapkv(budget=20,window=4)", backend()));
  // One set for all heads.
  std::vector<double> score(60, 0.0);
  for (int64_t kv = 0; kv < c.shape.g; ++kv)
    for (int64_t j = 0; j < 60; ++j) score[size_t(j)] -= norm(c.k, kv, j);
  for (const auto& list : kept(c, "cam(knorm(budget=20))", backend())) EXPECT_EQ(list, top(score, 20));
  for (const char* spec : {"merge-evict(snapkv(budget=1.0))", "cam(snapkv(budget=1.0))"}) {
    const ApplyOutput all = c.run(spec, backend());
    EXPECT_LT(kept_error(c, all), kExact) << spec;
    for (const auto& list : lists(all, "kept")) EXPECT_EQ(list, all_of(60)) << spec;
  }
}

/// Keys and values of all entries of a KV head, in f64.
Rows entry_rows(const Ragged& x, int64_t kv) {
  Rows out;
  for (int64_t r = x.begin(kv); r < x.end(kv); ++r) {
    auto& row = out.emplace_back();
    for (int64_t e = 0; e < x.values.size[1]; ++e) row.push_back(double(x.values.at<float>(r, e)));
  }
  return out;
}

// Which candidates were merged shows in the values that stay: of all subsets one explains them. None is one that nothing
// was paid, all are that were paid their window's mean, and the others come as often as their chances say.
TEST(CamSessions, MergesWhatDecodedTokensPaidFor) {
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}, {8, 1}}) {
    const int64_t budget = 20, window = 5, d = 16;
    ModelInfo info;
    info.layers = 3, info.h = h, info.g = g, info.d = info.d_v = int(d), info.hidden = 48, info.vocabulary = 61;
    info.scale = 30;  // so that tokens pay unequally
    SessionOptions o;
    o.attention = "cam(random(budget=20,when=every(4)),window=5)", o.backend = "reference";
    o.k.kind = o.v.kind = PageType::Kind::F32;
    Session session(Model::random(info, 64, Dtype::F32, 5), o);
    Rows paid(static_cast<size_t>(g));
    std::vector<Rows> before(static_cast<size_t>(g));  // values when the cut came
    std::vector<int32_t> positions;                    // of those
    bool prompt = true;
    int64_t certain = 0, never = 0, cuts = 0;
    double chances = 0, variance = 0, merged = 0;
    session.tap([&, h = h, g = g](LayerView& at) {
      if (at.layer != 1) return;
      const Ragged keys = stored_keys(at), values = stored_values(at);
      const std::vector<int32_t> now = at.store->positions(0);
      std::vector<int32_t> stay;  // what the last cut left, as numbers of its entries
      if (now.size() <= positions.size()) {
        for (size_t j = 0; j < positions.size(); ++j)
          if (std::binary_search(now.begin(), now.end(), positions[j])) stay.push_back(int32_t(j));
        EXPECT_EQ(int64_t(stay.size()), budget);
        ++cuts;
      }
      positions = now;
      for (int64_t kv = 0; kv < g; ++kv) {
        EXPECT_EQ(at.store->positions(kv), now);
        const Rows k = entry_rows(keys, kv), v = entry_rows(values, kv);
        const int64_t m = int64_t(k.size());
        auto& a = paid[size_t(kv)];
        // What the last cut made of the values.
        if (!stay.empty()) {
          ASSERT_EQ(m, int64_t(stay.size()) + 1);
          const Rows& old = before[size_t(kv)];
          std::vector<int64_t> gone, size, first;
          std::vector<double> p;
          for (int64_t i = 0; i < int64_t(old.size()); ++i) {
            if (std::binary_search(stay.begin(), stay.end(), int32_t(i))) continue;
            const int64_t next = std::upper_bound(stay.begin(), stay.end(), int32_t(i)) - stay.begin(),
                          c = std::min<int64_t>(window, int64_t(stay.size()) - next);
            double mean = 0;
            for (int64_t r = next; r < next + c; ++r) mean += a[size_t(stay[size_t(r)])] / double(c);
            gone.push_back(i), size.push_back(c), first.push_back(next);
            p.push_back(c == 0 ? 0 : mean > 0 ? std::min(1.0, a[size_t(i)] / mean) : a[size_t(i)] > 0 ? 1 : 0);
          }
          if (prompt) p.assign(gone.size(), 0), gone.clear();  // behind a prompt nothing is merged
          int explained = 0;
          for (int64_t subset = 0; subset < int64_t(1) << gone.size(); ++subset) {
            Rows expected;
            for (int32_t j : stay) expected.push_back(old[size_t(j)]);
            bool possible = true;
            for (size_t x = 0; x < gone.size(); ++x) {
              if (!(subset >> x & 1)) continue;
              possible &= size[x] > 0;
              for (int64_t r = first[x]; r < first[x] + size[x]; ++r)
                for (size_t e = 0; e < size_t(d); ++e)
                  expected[size_t(r)][e] += old[size_t(gone[x])][e] / double(size[x]);
            }
            double worst = possible ? 0 : INFINITY;
            for (size_t r = 0; r < expected.size(); ++r)
              for (size_t e = 0; e < size_t(d); ++e) worst = std::max(worst, std::abs(expected[r][e] - v[r][e]));
            if (worst > 1e-5) continue;
            ++explained;
            for (size_t x = 0; x < gone.size(); ++x) {
              const bool was = subset >> x & 1;
              chances += p[x], variance += p[x] * (1 - p[x]), merged += was;
              if (p[x] > 1 - 1e-4) {
                EXPECT_TRUE(was);
                ++certain;
              } else if (p[x] < 1e-6) {
                EXPECT_FALSE(was);
                ++never;
              }
            }
          }
          EXPECT_EQ(explained, 1);
          std::vector<double> left;
          for (int32_t j : stay) left.push_back(a[size_t(j)]);
          a = left;
        }
        a.resize(size_t(m), 0.0);
        if (at.decoding())
          for (int64_t head = kv * h / g; head < (kv + 1) * h / g; ++head) {
            std::vector<double> logits;
            for (int64_t j = 0; j < m; ++j) {
              logits.push_back(0);
              for (int64_t e = 0; e < d; ++e)
                logits.back() += double(at.q.values.at<float>(at.q.begin(head), e)) * k[size_t(j)][size_t(e)] * 30;
            }
            const auto weights = softmax(logits);
            for (int64_t j = 0; j < m; ++j) a[size_t(j)] += weights[size_t(j)] * double(g) / double(h);
          }
        before[size_t(kv)] = v;
      }
      if (at.decoding()) prompt = false;
    });
    session.prefill(text(50, 9));
    for (int32_t i = 0; i < 161; ++i) session.decode(i * 5 % 61);
    EXPECT_EQ(cuts, 41);
    EXPECT_GT(certain, 0);
    EXPECT_GT(never, 0);
    EXPECT_GT(variance, 1);
    EXPECT_NEAR(merged, chances, 4 * std::sqrt(variance));
  }
}

}  // namespace
}  // namespace heed::test
