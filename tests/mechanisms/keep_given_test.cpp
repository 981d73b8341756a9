// Keep policies to which a curve or a network is given, against their definitions in plain loops.
#include "keep_case.h"

namespace heed::test {
namespace {

class KeepGiven : public Mechanisms {};
HEED_ON_ALL_SETTINGS(KeepGiven);

Buffer drawn(std::initializer_list<int64_t> sizes, uint64_t seed, double size = 1) {
  Random random(seed);
  Buffer out(Dtype::F32, sizes);
  for (float& x : out->span<float>()) x = float(size * random.normal());
  return out;
}
std::vector<std::vector<int32_t>> kept_with(const Case& c, const std::string& spec, const std::string& backend,
                                            const std::map<std::string, Tensor>& inputs) {
  ApplyInput in = c.input(backend);
  in.inputs = inputs;
  const ApplyOutput out = Case::run(spec, in);
  EXPECT_LT(c.dense_error(out), kExact) << spec;
  EXPECT_LT(kept_error(c, out), kExact) << spec;
  return lists(out, "kept");
}
/// x[row] · w[o] + b[o].
double product(const Tensor& w, int64_t o, const Tensor& x, int64_t row, const Tensor& b) {
  double sum = b ? double(b.at<float>(o)) : 0;
  for (int64_t c = 0; c < x.size[1]; ++c) sum += double(w.at<float>(o, c)) * double(x.at<float>(row, c));
  return sum;
}

TEST_P(KeepGiven, LuKvFollowsTheCurve) {
  for (const int64_t m : {90, 41, 3, 1}) {
    const Case c(shape(m, m), 6);
    const int64_t g = c.shape.g;
    for (uint64_t seed = 1; seed <= 5; ++seed) {
      Random random(seed);
      std::vector<double> lost;
      std::string list;
      for (int64_t kv = 0; kv < g; ++kv) {
        lost.push_back(double(random.below(seed == 5 ? 2 : 101)) / (seed == 5 ? 1 : 100));
        list += (kv ? "," : "[") + std::to_string(lost.back());
      }
      const std::string spec = "lu-kv(knorm(budget=0.5),lost=" + list + "])";
      double sum = 0;
      std::vector<std::pair<double, int64_t>> rest;
      std::vector<int64_t> count;
      for (int64_t kv = 0; kv < g; ++kv) {
        const double wanted = (1 - lost[size_t(kv)]) * double(m);
        sum += wanted;
        count.push_back(int64_t(wanted + 1e-9));
        rest.emplace_back(-std::round((wanted - double(count.back())) * 1e6), kv);
      }
      const int64_t total = std::clamp<int64_t>(std::llrint(sum), g, g * m);
      std::sort(rest.begin(), rest.end());
      const int64_t over = total - std::accumulate(count.begin(), count.end(), int64_t(0));
      for (int64_t i = 0; i < std::min(over, g); ++i) ++count[size_t(rest[size_t(i)].second)];
      const auto held = kept(c, spec, backend());
      for (int64_t kv = 0; kv < g; ++kv) {
        std::vector<double> score;
        for (int64_t j = 0; j < m; ++j) score.push_back(j < 4 || j == m - 1 ? INFINITY : -norm(c.k, kv, j));
        EXPECT_EQ(held[size_t(kv)], top(score, std::clamp<int64_t>(count[size_t(kv)], 1, m))) << spec << " m " << m;
      }
    }
    // Without a curve all heads hold the budget.
    EXPECT_EQ(kept(c, "lu-kv(knorm(budget=0.5),sinks=0,recent=0)", backend()), kept(c, "knorm(budget=0.5)", backend()));
    for (const auto& all : kept(c, "lu-kv(expected-attention(budget=1.0))", backend())) EXPECT_EQ(all, all_of(m));
  }
}

TEST(KeepGivenErrors, LuKvNamesTheSharesItNeeds) {
  const Case c({6, 2, 30, 30, 16, 16});
  for (const auto& [lost, words] : {std::pair{"[0.5,0.2,0.1]", "2 KV heads"}, {"[0.5,1.5]", "1.5 is more than all"}}) {
    const auto out = heed::apply("lu-kv(knorm(budget=0.5),lost=" + std::string(lost) + ")", c.input("reference"));
    ASSERT_FALSE(out.has_value());
    EXPECT_NE(out.error().text().find(words), std::string::npos) << out.error().text();
  }
}

TEST_P(KeepGiven, KvZapScoresByItsNetwork) {
  for (const Shape s : {shape(90, 90), shape(7, 61)})
    for (const int64_t width : {0, 10}) {
      const Case c(s, 6);
      const Buffer x = drawn({s.m, 24}, 2), w1 = drawn({width ? width : s.g, 24}, 3, 0.3), b1 = drawn({w1->size[0]}, 4),
                   w2 = drawn({s.g, 10}, 5), b2 = drawn({s.g}, 6);
      std::map<std::string, Tensor> in{{"x", x}, {"w1", w1}, {"b1", b1}};
      if (width) in["w2"] = w2, in["b2"] = b2;
      const auto held = kept_with(c, "kvzap(budget=0.4)", backend(), in),
                 passed = kept_with(c, "dms(kvzap,threshold=0.25,window=5)", backend(), in);
      for (int64_t kv = 0; kv < s.g; ++kv) {
        std::vector<double> score;
        for (int64_t j = 0; j < s.m; ++j) {
          if (width == 0) {
            score.push_back(product(w1, kv, x, j, b1));
            continue;
          }
          score.push_back(b2->at<float>(kv));
          for (int64_t o = 0; o < width; ++o) {
            const double z = product(w1, o, x, j, b1),
                         gelu = 0.5 * z * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
            EXPECT_NEAR(gelu, 0.5 * z * std::erfc(-z / std::sqrt(2.0)), 5e-4);
            score.back() += double(w2->at<float>(kv, o)) * gelu;
          }
        }
        expect_top(held[size_t(kv)], score, int64_t(0.4 * double(s.m)), "kvzap");
        std::vector<int32_t> reach;
        for (int64_t j = 0; j < s.m; ++j)
          if (score[size_t(j)] >= 0.25 || j >= s.m - 5) reach.push_back(int32_t(j));
        EXPECT_EQ(passed[size_t(kv)], reach);
      }
      for (const auto& all : kept_with(c, "kvzap(budget=1.0)", backend(), in)) EXPECT_EQ(all, all_of(s.m));
    }
}

TEST_P(KeepGiven, FastKvZipScoresByItsGate) {
  for (const Shape s : {shape(110, 110), shape(7, 61)})
    for (const bool weighed : {false, true}) {
      const Case c(s, 6);
      const int64_t hidden = 24, group = c.group();
      const Buffer x = drawn({s.m, hidden}, 2), wq = drawn({s.h * 16, hidden}, 3), bq = drawn({s.h * 16}, 4),
                   wk = drawn({s.g * 16, hidden}, 5), b = drawn({s.h}, 6), fixed = drawn({s.g, 16, 16}, 7),
                   q_norm = drawn({16}, 8), k_norm = drawn({16}, 9);
      std::map<std::string, Tensor> in{{"x", x}, {"w_q", wq}, {"b_q", bq}, {"w_k", wk}, {"b", b}, {"fixed_k", fixed}};
      if (weighed) in["q_norm"] = q_norm, in["k_norm"] = k_norm;
      const auto row = [&](const Tensor& w, int64_t head, int64_t j, const Tensor& bias, const Buffer& weight) {
        std::vector<double> y;
        double squares = 0;
        for (int64_t e = 0; e < 16; ++e)
          y.push_back(product(w, head * 16 + e, x, j, bias)), squares += y.back() * y.back();
        for (int64_t e = 0; e < 16; ++e)
          y[size_t(e)] *= (weighed ? double(weight->at<float>(e)) : 1) / std::sqrt(squares / 16 + 1e-6);
        return y;
      };
      std::vector<double> pool;
      std::vector<std::vector<double>> score;
      for (int64_t kv = 0; kv < s.g; ++kv) {
        auto& own = score.emplace_back(size_t(s.m), 0.0);
        for (int64_t j = 0; j < s.m; ++j) {
          const auto k = row(wk, kv, j, {}, k_norm);
          for (int64_t head = kv * group; head < (kv + 1) * group; ++head) {
            const auto q = row(wq, head, j, bq, q_norm);
            const double a = std::inner_product(q.begin(), q.end(), k.begin(), 0.0) / 4 + double(b->at<float>(head));
            double sum = 1;
            for (int64_t f = 0; f < 16; ++f) {
              double base = 0;
              for (int64_t e = 0; e < 16; ++e) base += double(fixed->at<float>(kv, f, e)) * q[size_t(e)] / 4;
              sum += std::exp(base - a);
            }
            own[size_t(j)] += 1 / sum / double(group);
          }
          if (j < 4 || j >= s.m - std::max<int64_t>(1, s.m / 50)) own[size_t(j)] = INFINITY;
        }
        pool.insert(pool.end(), own.begin(), own.end());
      }
      const int64_t each = int64_t(0.3 * double(s.m) + 1e-9);
      std::vector<int64_t> count(size_t(s.g), 0);
      for (int32_t i : top(pool, each * s.g)) ++count[size_t(i / s.m)];
      for (const char* spec : {"fast-kvzip(budget=0.3)", "fast-kvzip(budget=0.3,share=layer)"}) {
        const auto held = kept_with(c, spec, backend(), in);
        for (int64_t kv = 0; kv < s.g; ++kv) {
          ASSERT_NEAR(double(held[size_t(kv)].size()), double(count[size_t(kv)]), 1) << spec;  // scores may tie
          expect_top(held[size_t(kv)], score[size_t(kv)], int64_t(held[size_t(kv)].size()), spec);
        }
      }
      for (const auto& all : kept_with(c, "fast-kvzip(budget=1.0)", backend(), in)) EXPECT_EQ(all, all_of(s.m));
    }
}

TEST_P(KeepGiven, KvZapNamesWhatItNeeds) {
  const Case c(shape(40, 40));
  for (const char* spec : {"kvzap", "fast-kvzip", "dms(kvzap)"}) {
    const auto out = apply(spec, c.input(backend()));
    ASSERT_FALSE(out.has_value());
    EXPECT_NE(out.error().text().find("--input"), std::string::npos) << out.error().text();
  }
}

}  // namespace
}  // namespace heed::test
