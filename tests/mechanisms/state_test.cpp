#include "harness.h"

namespace heed::test {
namespace {

class States : public Mechanisms {};
HEED_ON_ALL_SETTINGS(States);

struct Gates {
  Buffer g, beta, state;
  Gates(const Shape& s, uint64_t seed)
      : g(Dtype::F32, {s.h, s.n}), beta(Dtype::F32, {s.h, s.n}), state(Dtype::F32, {s.h, s.d, s.d_v}) {
    Random random(seed);
    for (float& x : g->span<float>()) x = float(-random.uniform());
    for (float& x : beta->span<float>()) x = float(random.uniform());
    for (float& x : state->span<float>()) x = float(random.normal());
  }
};

// The recurrence, one step after another.
TEST_P(States, GdnIsTheLiteralRecurrence) {
  for (const Shape s : {shape(77, 77), shape(1, 1), shape(130, 130, 64, 32)})
    for (const bool norm : {true, false})
      for (const bool given : {true, false}) {
        const Case c(s, 2, norm ? 1.0 : 0.2);
        const Gates gates(s, 3);
        ApplyInput in = c.input(backend());
        in.inputs = {{"g", gates.g}, {"beta", gates.beta}};
        if (given) in.inputs["state"] = gates.state;
        if (!norm)
          for (float& x : c.k->span<float>()) x *= 0.2f;  // an unnormalised key must not make the state grow
        const ApplyOutput out = Case::run(norm ? "gdn" : "gdn(l2norm=false)", in);
        double worst = 0, size = 1;
        for (int64_t head = 0; head < s.h; ++head) {
          Rows state(size_t(s.d), std::vector<double>(size_t(s.d_v), 0.0));
          if (given)
            for (int64_t a = 0; a < s.d; ++a)
              for (int64_t b = 0; b < s.d_v; ++b) state[size_t(a)][size_t(b)] = gates.state->at<float>(head, a, b);
          for (int64_t i = 0; i < s.n; ++i) {
            std::vector<double> q, k;
            double qq = 1e-6, kk = 1e-6;
            for (int64_t a = 0; a < s.d; ++a) {
              q.push_back(c.q->at<float>(head, i, a)), k.push_back(c.k->at<float>(head / c.group(), i, a));
              qq += q.back() * q.back(), kk += k.back() * k.back();
            }
            if (norm)
              for (int64_t a = 0; a < s.d; ++a) q[size_t(a)] /= std::sqrt(qq), k[size_t(a)] /= std::sqrt(kk);
            const double decay = std::exp(double(gates.g->at<float>(head, i))), beta = gates.beta->at<float>(head, i);
            for (int64_t b = 0; b < s.d_v; ++b) {
              double seen = 0;
              for (int64_t a = 0; a < s.d; ++a) seen += (state[size_t(a)][size_t(b)] *= decay) * k[size_t(a)];
              const double u = beta * (double(c.v->at<float>(head / c.group(), i, b)) - seen);
              double o = 0;
              for (int64_t a = 0; a < s.d; ++a) o += (state[size_t(a)][size_t(b)] += k[size_t(a)] * u) * q[size_t(a)];
              o /= std::sqrt(double(s.d));
              size = std::max(size, std::abs(o));
              worst = std::max(worst, std::abs(o - double(out.find("out")->view().at<float>(head, i, b))));
            }
          }
          for (int64_t a = 0; a < s.d; ++a)
            for (int64_t b = 0; b < s.d_v; ++b)
              worst = std::max(
                  worst, std::abs(state[size_t(a)][size_t(b)] - double(out.find("state")->view().at<float>(head, a, b))));
        }
        EXPECT_LT(worst, 2e-4 * size) << "l2norm " << norm << " state " << given;
        EXPECT_EQ(out.find("lse"), nullptr);
      }
}

// A text fed in two halves ends where the whole does.
TEST_P(States, GdnGoesOnFromAState) {
  const Shape s = shape(50, 50);
  const Case c(s, 4, 0.5);
  const Gates gates(s, 5);
  auto part = [&](int64_t from, int64_t to, const Tensor& state) {
    std::vector<Buffer> held;
    auto cut = [&](const Tensor& t) {
      Tensor view = t.slice(1, from, to);
      held.emplace_back(Dtype::F32, std::span(view.size.data(), size_t(view.rank)));
      copy(view, held.back());
      return held.back().view();
    };
    ApplyInput in = c.input(backend());
    in.q = cut(c.q), in.k = cut(c.k), in.v = cut(c.v);
    in.inputs = {{"g", cut(gates.g)}, {"beta", cut(gates.beta)}};
    if (state) in.inputs["state"] = state;
    return Case::run("gdn", in);
  };
  const ApplyOutput whole = part(0, 50, {}), first = part(0, 19, {}), second = part(19, 50, *first.find("state"));
  for (int64_t head = 0; head < s.h; ++head)
    for (int64_t a = 0; a < s.d; ++a)
      for (int64_t b = 0; b < s.d_v; ++b)
        ASSERT_NEAR(whole.find("state")->view().at<float>(head, a, b),
                    second.find("state")->view().at<float>(head, a, b), 1e-4);
}

TEST(StateErrors, NameTheInput) {
  const Case c({2, 2, 8, 8, 16, 16});
  const auto out = apply("gdn", c.input("reference"));
  ASSERT_FALSE(out.has_value());
  EXPECT_NE(out.error().text().find("'g'"), std::string::npos) << out.error().text();
  ApplyInput in = c.input("reference");
  const Buffer wrong = Buffer::zeros(Dtype::F32, {2, 7});
  in.inputs = {{"g", wrong}, {"beta", wrong}};
  EXPECT_FALSE(apply("gdn", in).has_value());
}

}  // namespace
}  // namespace heed::test
