// The recurrence of every table against flash-linear-attention's plain references (tests/data/make/golden_recur.py).
#include "base/npy.h"
#include "kernels/harness.h"
#include "kernels/on_device.h"

namespace heed::test {
namespace {

constexpr int64_t h = 2, n = 40, d = 16, d_v = 8;

struct Golden {
  const char* file;
  Recur::Decay decay;
  Recur::Correction correction;
  bool normalise = false;
};

class GoldenRecur : public testing::TestWithParam<const Kernels*> {};
INSTANTIATE_TEST_SUITE_P(Tables, GoldenRecur, testing::ValuesIn(tables()), [](const auto& table) {
  std::string name = table.param->name;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

/// Normal numbers, rows of length 1 if `unit`.
Buffer drawn(Random& random, int64_t rows, int64_t width, bool unit = false) {
  Buffer out(Dtype::F32, {h * rows, width});
  for (float& x : out->span<float>()) x = float(random.normal());
  if (unit)
    for (int64_t r = 0; r < h * rows; ++r) {
      double length = 0;
      for (int64_t c = 0; c < width; ++c) length += double(out->at<float>(r, c)) * double(out->at<float>(r, c));
      for (int64_t c = 0; c < width; ++c)
        out->at<float>(r, c) = float(double(out->at<float>(r, c)) / std::sqrt(length));
    }
  return out;
}

void change(Buffer& x, const std::function<float(float)>& f) {
  for (float& y : x->span<float>()) y = f(y);
}

TEST_P(GoldenRecur, EqualsFla) {
  Random random(23);
  Buffer q = drawn(random, n, d), k = drawn(random, n, d, true);
  const Buffer v = drawn(random, n, d_v);
  Buffer by_row = drawn(random, n, 1), by_channel = drawn(random, n, d), beta(Dtype::F32, {h * n});
  for (Buffer* g : {&by_row, &by_channel}) change(*g, [](float x) { return -0.2f * std::abs(x); });
  for (float& x : beta->span<float>()) x = float(random.uniform());
  const Buffer a = drawn(random, n, d, true);
  Buffer b(Dtype::F32, {h * n, d});
  for (int64_t i = 0; i < b->numel(); ++i) b->as<float>()[i] = -0.5f * a->as<float>()[i];
  const Buffer state = drawn(random, d, d_v);
  Buffer offsets(Dtype::I64, {h + 1});
  for (int64_t s = 0; s <= h; ++s) offsets->at<int64_t>(s) = s * n;

  using D = Recur::Decay;
  using C = Recur::Correction;
  for (const Golden& g : {Golden{"linear", D::None, C::None}, Golden{"simple-gla", D::Scalar, C::None},
                          Golden{"gla", D::Vector, C::None}, Golden{"delta", D::None, C::Delta},
                          Golden{"gated-delta", D::Scalar, C::Delta}, Golden{"kda", D::Vector, C::Delta},
                          Golden{"dplr", D::Vector, C::LowRank}, Golden{"normalised", D::None, C::None, true}}) {
    if (g.normalise)  // the last: z · q must not vanish
      for (Buffer* x : {&q, &k}) change(*x, [](float y) { return std::abs(y) + 0.05f; });
    RecurInputs in;
    in.q = {q, offsets, {}, 1, h * n}, in.k = {k, offsets, {}, 1, h * n}, in.v = {v, offsets, {}, 1, h * n};
    if (g.decay == D::Scalar) in.g = by_row->reshape({h * n});
    if (g.decay == D::Vector) in.g = by_channel;
    if (g.correction == C::Delta) in.beta = beta;
    if (g.correction == C::LowRank) in.a = a, in.b = b;
    if (!g.normalise) in.state = state->reshape({h, d, d_v});
    Recur how;
    how.decay = g.decay, how.correction = g.correction, how.normalise = g.normalise;
    if (g.normalise) how.scale = 1;  // fla scales z · q as well, so that it has no effect

    Queue queue;
    Poisoned out(Dtype::F32, {h * n, d_v}), last(Dtype::F32, {h, d, d_v}), z(Dtype::F32, {h, d});
    GetParam()->recur(queue, in, how, out, last, g.normalise ? z.view() : Tensor());
    const Buffer expected = value_or_throw(read_npy(std::string(HEED_TEST_DATA) + "/golden/recur/" + g.file + ".npy"));
    for (int64_t s = 0; s < h; ++s)
      for (int64_t r = 0; r < n + d; ++r)
        for (int64_t c = 0; c < d_v; ++c)
          ASSERT_NEAR(r < n ? out->at<float>(s * n + r, c) : last->at<float>(s, r - n, c), expected->at<float>(s, r, c), 2e-5)
              << g.file << " row " << r;
  }
}

}  // namespace
}  // namespace heed::test
