// What only large or repeated calls show: gradients that are the same bits on any number of threads, and over long segments and tiles.
#include "base/threads.h"
#include "kernels/attention_case.h"
#include "kernels/bounds.h"
#include "kernels/on_device.h"

namespace heed::test {
namespace {

class AttendBackward : public testing::TestWithParam<const Kernels*> {
 protected:
  const Kernels& run = *GetParam();
  Queue queue;
  void TearDown() override { set_threads(0); }
};
INSTANTIATE_TEST_SUITE_P(Tables, AttendBackward, testing::ValuesIn(tables()), [](const auto& table) {
  std::string name = table.param->name;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

struct Gradients {
  Poisoned q, k, v, bias, gain;
};

Gradients gradients(const Kernels& run, Queue& queue, const AttentionCase& c, const Poisoned& d_out) {
  Poisoned out = c.out(), lse = c.lse();
  run.attend(queue, c.q, c.k, c.v, c.plan.plan, c.mods, out, lse);
  if (c.plan.plan.parts > 1) throw Error(Code::Internal, "test", "one part is meant");
  const auto like = [](const RaggedData& of) {
    return Poisoned(Dtype::F32, {of.view.values.size[0], of.view.values.size[1]});
  };
  Gradients g{like(c.q), like(c.k), like(c.v), Poisoned(Dtype::F32, {c.k.view.values.size[0]}),
              Poisoned(Dtype::F32, {c.q.view.values.size[0]})};
  run.attend_backward(queue, c.q, c.k, c.v, c.plan.plan, c.mods, out, lse, d_out, g.q, g.k, g.v, g.bias, g.gain);
  return g;
}

TEST_P(AttendBackward, ResultsDoNotDependOnThreads) {
  Random random(31);
  Ask ask;
  ask.parts = ask.extreme = false;
  for (int i = 0; i < cases(12); ++i) {
    const AttentionCase c(random, ask);
    SCOPED_TRACE("case " + std::to_string(i) + ": " + c.text());
    const Poisoned d_out = row_numbers(c.q, Dtype::F32, c.d_v, [&] { return random.normal(); });
    set_threads(1);
    const Gradients one = gradients(run, queue, c, d_out);
    set_threads(9);
    const Gradients many = gradients(run, queue, c, d_out);
    expect_close("d_q", one.q, many.q, 0);
    expect_close("d_k", one.k, many.k, 0);
    expect_close("d_v", one.v, many.v, 0);
    expect_close("d_key_bias", one.bias, many.bias, 0);
    expect_close("d_gain", one.gain, many.gain, 0);
  }
}

/// Σ_j P_ij (dP_ij − D_i) = 0: a logit added to all keys of a row changes nothing, so key_bias' gradients sum to zero over
/// a causal row's keys; and Σ_j dV_j = Σ_i dO_i, since each row of P sums to one. Over several tiles and ranges of keys.
TEST_P(AttendBackward, LongSegmentsKeepTheSumsOfSoftmax) {
  Random random(32);
  const int64_t n = 700, h = 3, g = 1, d = 64;
  const RaggedData q = normal_ragged(random, Dtype::F32, std::vector<int64_t>(size_t(h), n), h, d, {});
  const RaggedData k = normal_ragged(random, Dtype::F32, {n}, g, d, {}),
                   v = normal_ragged(random, Dtype::F32, {n}, g, d, {});
  const Poisoned d_out = row_numbers(q, Dtype::F32, d, [&] { return random.normal(); });
  const Poisoned zero_bias = filled(Dtype::F32, {n}, [] { return 0.0; });
  Mods mods;
  mods.key_bias = zero_bias;
  for (int count : {1, 6}) {
    set_threads(count);
    Poisoned out(Dtype::F32, {h * n, d}), lse(Dtype::F32, {h * n}), d_q = out.twin(), d_k(Dtype::F32, {n, d}),
                                                                    d_v = d_k.twin(), bias(Dtype::F32, {n});
    run.attend(queue, q, k, v, {}, mods, out, lse);
    run.attend_backward(queue, q, k, v, {}, mods, out, lse, d_out, d_q, d_k, d_v, bias, {});
    double total_bias = 0, size_bias = 0;
    for (int64_t j = 0; j < n; ++j) {
      total_bias += double(bias->at<float>(j));
      size_bias += std::abs(double(bias->at<float>(j)));
    }
    EXPECT_GT(size_bias, 1);
    EXPECT_NEAR(total_bias, 0, 1e-5 * size_bias);
    for (int64_t c = 0; c < d; ++c) {
      double from_v = 0, from_out = 0;
      for (int64_t j = 0; j < n; ++j) from_v += double(d_v->at<float>(j, c));
      for (int64_t r = 0; r < h * n; ++r) from_out += double(d_out->at<float>(r, c));
      EXPECT_NEAR(from_v, from_out, 1e-3) << c;
    }
  }
}

/// The shapes that tensor cores take whole: several tiles of rows and keys, odd ends, gaps, one row, none, groups, windows.
TEST_P(AttendBackward, Bf16TilesEqualReference) {
  Random random(33);
  for (int i = 0; i < cases(12); ++i) {
    const int64_t d = pick(random, {40, 64, 80, 96, 128}), g = pick(random, {1, 2}), h = g * pick(random, {1, 3, 8});
    std::vector<int64_t> n, m;
    for (int64_t rows : {pick(random, {0, 1, 65}), pick(random, {63, 130, 200})}) {
      const int64_t keys = std::max<int64_t>(0, rows + pick(random, {-40, 0, 70, 129}));
      n.insert(n.end(), size_t(h), rows), m.insert(m.end(), size_t(g), keys);
    }
    const Layout layout{.gaps = chance(random, 0.5)};
    const Dtype type = pick(random, {Dtype::BF16, Dtype::F32});
    const RaggedData q = normal_ragged(random, type, n, h, d, layout),
                     k = normal_ragged(random, Dtype::BF16, m, g, d, layout),
                     v = normal_ragged(random, Dtype::BF16, m, g, d, layout);
    Plan plan;
    plan.causal = chance(random, 0.6);
    Mods mods;
    mods.window = pick(random, {0, 0, 5, 100});
    SCOPED_TRACE("case " + std::to_string(i) + ": d " + std::to_string(d) + ", heads " + std::to_string(h) + " over " +
                 std::to_string(g) + ", rows " + std::to_string(n.back()) + ", keys " + std::to_string(m.back()) +
                 (plan.causal ? ", causal" : "") + ", window " + std::to_string(mods.window));
    const int64_t rows = q.view.values.size[0];
    const Poisoned d_out = row_numbers(q, Dtype::F32, d, [&] { return random.normal(); });
    Poisoned out(Dtype::F32, {rows, d}), lse(Dtype::F32, {rows});
    oracle().attend(queue, q, k, v, plan, mods, out, lse);
    auto fresh = [&] {
      auto like = [&](const RaggedData& of) { return Poisoned(Dtype::F32, {of.view.values.size[0], d}); };
      return Gradients{like(q), like(k), like(v), {}, Poisoned(Dtype::F32, {rows})};
    };
    Gradients want = fresh(), got = fresh();
    oracle().attend_backward(queue, q, k, v, plan, mods, out, lse, d_out, want.q, want.k, want.v, {}, want.gain);
    run.attend_backward(queue, q, k, v, plan, mods, out, lse, d_out, got.q, got.k, got.v, {}, got.gain);
    const double unit_of = unit(Dtype::BF16, 200);
    expect_close("d_q", want.q, got.q, gradient(unit_of, 6, std::max(1.0, largest(want.q))));
    expect_close("d_k", want.k, got.k, gradient(unit_of, 6, std::max(1.0, largest(want.k))));
    expect_close("d_v", want.v, got.v, gradient(unit_of, 6, std::max(1.0, largest(want.v))));
    expect_close("d_gain", want.gain, got.gain, 1e-3);
  }
}

}  // namespace
}  // namespace heed::test
