// Keep policies to which a curve, a network or the kinds of tokens are given, against their definitions in plain loops.
#include "keep_case.h"
#include "session_case.h"

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

/// FastGen's smallest cache that holds an entry, from kinds of tokens (0, 1 punctuation, 2 control) and what was paid.
std::vector<int> fastgen_levels(const std::vector<int>& kinds, const std::vector<double>& paid, int64_t most, int64_t latest) {
  const auto hitters = top(paid, most);
  std::vector<int> out;
  for (int64_t j = 0; j < int64_t(kinds.size()); ++j)
    out.push_back(kinds[size_t(j)] == 2                                            ? 1
                  : kinds[size_t(j)] == 1                                          ? 2
                  : std::binary_search(hitters.begin(), hitters.end(), int32_t(j)) ? 3
                  : j >= int64_t(kinds.size()) - latest                            ? 4
                                                                                   : 5);
  return out;
}
/// The first cache that holds `recovered` of what each of the heads paid.
int fastgen_kind(const std::vector<int>& levels, const Rows& paid, double recovered) {
  for (int kind = 1; kind < 5; ++kind) {
    double least = INFINITY;
    for (const auto& head : paid) {
      double held = 0, all = 0;
      for (size_t j = 0; j < head.size(); ++j) all += head[j], held += levels[j] <= kind ? head[j] : 0;
      least = std::min(least, held / all);
    }
    if (least >= recovered) return kind;
  }
  return 5;
}

TEST_P(KeepGiven, FastGenGivesEachHeadTheSmallestCacheThatSuffices) {
  std::set<int> seen;
  for (const Shape s : {shape(90, 90), shape(20, 61)})
    for (const double recovered : {0.08, 0.25, 0.45, 0.6, 0.7, 0.95, 1.0}) {
      const Case c(s, 6);
      Random random(7);
      Buffer tokens(Dtype::F32, {s.m});
      std::vector<int> kinds;
      for (float& x : tokens->span<float>()) {
        kinds.push_back(std::max(0, int(random.below(6)) - 3));
        x = float(kinds.back());
      }
      const auto held = kept_with(c, "fastgen(frequent=0.2,local=0.25,recovered=" + std::to_string(recovered) + ")",
                                  backend(), {{"tokens", tokens}});
      const Rows paid = column_sums(c, s.n);
      for (int64_t kv = 0; kv < s.g; ++kv) {
        const Rows own(paid.begin() + kv * c.group(), paid.begin() + (kv + 1) * c.group());
        std::vector<double> sum(size_t(s.m), 0.0);
        for (const auto& head : own)
          for (size_t j = 0; j < head.size(); ++j) sum[j] += head[j];
        const auto levels = fastgen_levels(kinds, sum, int64_t(0.2 * double(s.m)), int64_t(0.25 * double(s.m)));
        const int kind = recovered < 1 ? fastgen_kind(levels, own, recovered) : 5;
        std::vector<int32_t> expected;
        for (int32_t j = 0; j < s.m; ++j)
          if (levels[size_t(j)] <= kind) expected.push_back(j);
        EXPECT_EQ(held[size_t(kv)], expected) << "recovered " << recovered << " kind " << kind;
        seen.insert(kind);
      }
    }
  EXPECT_GE(seen.size(), 4u);
}

// Entry by entry in plain loops: a head keeps its kind while decoding, and what it names.
TEST(KeepGivenSessions, FastGenKeepsWhatAHeadsKindNames) {
  std::set<int> seen;
  for (const auto& [h, g] : {std::pair{6, 2}, {3, 3}, {8, 1}})
    for (const double recovered : {0.15, 0.35, 0.45, 0.6, 0.9}) {
      const int64_t length = 50, d = 16, group = h / g;
      ModelInfo info;
      info.layers = 3, info.h = h, info.g = g, info.d = info.d_v = int(d), info.hidden = 48, info.vocabulary = 61;
      info.scale = 10;  // so that tokens pay unequally
      for (int id = 0; id < 61; ++id) info.token_classes.push_back(uint8_t(id % 5 == 0 ? 2 : id % 5 == 1 ? 1 : 0));
      const auto ids = text(length + 12, 9);
      Session session(Model::random(info, 64, Dtype::F32, 5),
                      in_f32("fastgen(frequent=0.1,local=0.1,recovered=" + std::to_string(recovered) + ")"));
      struct Entry {
        int32_t position;
        std::vector<double> paid;  // by query head
      };
      std::vector<std::vector<Entry>> entries(static_cast<size_t>(g));
      std::vector<int> kind(static_cast<size_t>(g), 0);
      int32_t fed = 0;
      session.tap([&, g = g](LayerView& at) {
        if (at.layer != 1) return;
        const int64_t n = at.rows[0];
        const Ragged keys = stored_keys(at);
        for (int64_t kv = 0; kv < g; ++kv) {
          auto& own = entries[size_t(kv)];
          for (int32_t i = 0; i < n; ++i) own.push_back({fed + i, std::vector<double>(size_t(group), 0.0)});
          std::vector<int32_t> positions;
          for (const Entry& e : own) positions.push_back(e.position);
          ASSERT_EQ(at.store->positions(kv), positions);
          const int64_t m = int64_t(own.size());
          for (int64_t member = 0; member < group; ++member)
            for (int64_t i = 0; i < n; ++i) {
              std::vector<double> p;
              double total = 0;
              for (int64_t j = 0; j <= m - n + i; ++j) {
                double dot = 0;
                for (int64_t c = 0; c < d; ++c)
                  dot += double(at.q.values.at<float>(at.q.begin(kv * group + member) + i, c)) *
                         double(keys.values.at<float>(keys.begin(kv) + j, c));
                total += p.emplace_back(std::exp(10 * dot));
              }
              for (size_t j = 0; j < p.size(); ++j) own[j].paid[size_t(member)] += p[j] / total;
            }
          std::vector<int> kinds;
          std::vector<double> sum;
          Rows paid(static_cast<size_t>(group));
          for (const Entry& e : own) {
            kinds.push_back(info.token_classes[size_t(ids[size_t(e.position)])]);
            sum.push_back(std::accumulate(e.paid.begin(), e.paid.end(), 0.0));
            for (size_t member = 0; member < paid.size(); ++member) paid[member].push_back(e.paid[member]);
          }
          const auto levels = fastgen_levels(kinds, sum, length / 10, length / 10);
          if (!at.decoding()) seen.insert(kind[size_t(kv)] = fastgen_kind(levels, paid, recovered));
          std::vector<Entry> left;
          for (size_t j = 0; j < own.size(); ++j)
            if (levels[j] <= kind[size_t(kv)]) left.push_back(own[j]);
          own = left;
        }
        fed += int32_t(n);
      });
      session.prefill(std::span(ids).first(size_t(length)));
      for (int64_t i = length; i < int64_t(ids.size()); ++i) session.decode(ids[size_t(i)]);
      EXPECT_EQ(fed, length + 12);
    }
  EXPECT_GE(seen.size(), 4u);
}

}  // namespace
}  // namespace heed::test
