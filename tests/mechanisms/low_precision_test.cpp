// Attention with operands in few bits, against the same roundings in plain loops.
#include "attention/low_precision.h"

#include <map>

#include "kernels/kernels.h"
#include "mechanisms/registry.h"
#include "session_case.h"

namespace heed::test {
namespace {

class LowPrecision : public Mechanisms {};
HEED_ON_ALL_SETTINGS(LowPrecision);

/// The nearest number of 4 exponent and 3 mantissa bits, halves to even: looked up among all there are.
double e4m3(double x) {
  static const std::vector<double> all = [] {
    std::vector<double> out;
    for (int code = 0; code < 127; ++code)
      out.push_back(code < 8 ? std::ldexp(code, -9) : std::ldexp(8 + code % 8, code / 8 - 10));
    return out;
  }();
  const double a = std::abs(x);
  size_t best = 0;
  for (size_t i = 1; i < all.size(); ++i) {
    const double old = std::abs(all[best] - a), now = std::abs(all[i] - a);
    if (now < old || (now == old && i % 2 == 0)) best = i;
  }
  return std::copysign(all[best], x);
}
double half(double x) { return double(float(f16(float(x)))); }

TEST(Formats, E4M3IsTheNearestOfAllItsNumbers) {
  Queue queue;
  queue.run = &reference_kernels();
  std::vector<float> in{0, 448, 447, 432, 500, -449, 0.0009765625f, 0.0029296875f, 0.015625f, 1, 1.0625f, 1.1875f, -3};
  Random random(2);
  for (int i = 0; i < 4000; ++i) in.push_back(float(random.normal() * std::exp(3 * random.normal())));
  Buffer x = Buffer::of<float>({int64_t(in.size())}, in);
  round_to(queue, Format::E4M3, x);
  for (size_t i = 0; i < in.size(); ++i) EXPECT_EQ(double(x->as<float>()[i]), e4m3(in[i])) << in[i];
  Buffer y = Buffer::of<float>({int64_t(in.size())}, in);
  round_to(queue, Format::F16, y);
  for (size_t i = 0; i < in.size(); ++i) EXPECT_EQ(double(y->as<float>()[i]), half(in[i])) << in[i];
}

struct Version {
  std::string spec;
  int levels = 127;
  bool thread = true;
  int64_t q_block = 32, k_block = 64, tile = 64, smooth_q = 0;
  int weights = 2;  // 2: e4m3, 1: f16, 0: f32
  double largest = 448;
  bool smooth_k = true, smooth_v = false;
};

/// Rows as whole numbers times their group's scale; group(row) names it.
template <class Group>
Rows coded_rows(const Rows& x, int levels, Group group) {
  std::map<int64_t, double> most;
  for (size_t r = 0; r < x.size(); ++r)
    for (double v : x[r]) most[group(int64_t(r))] = std::max(most[group(int64_t(r))], std::abs(v));
  Rows out = x;
  for (size_t r = 0; r < x.size(); ++r) {
    const double scale = most[group(int64_t(r))] / levels + 1e-7;
    for (double& v : out[r]) v = std::copysign(std::floor(std::abs(v) / scale + 0.5), v) * scale;
  }
  return out;
}

Rows rows_of(const Tensor& x, int64_t head) {
  Rows out;
  for (int64_t i = 0; i < x.size[1]; ++i) {
    auto& row = out.emplace_back();
    for (int64_t c = 0; c < x.size[2]; ++c) row.push_back(double(x.at<float>(head, i, c)));
  }
  return out;
}
std::vector<double> mean_of(const Rows& x, size_t first, size_t last) {
  std::vector<double> out(x[0].size(), 0.0);
  for (size_t r = first; r < last; ++r)
    for (size_t c = 0; c < out.size(); ++c) out[c] += x[r][c] / double(last - first);
  return out;
}
double inner(const std::vector<double>& a, const std::vector<double>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

/// Output rows and lse of one head as the papers have them, tile by tile.
std::pair<Rows, std::vector<double>> sage(const Case& c, const Version& by, int64_t head) {
  const int64_t n = c.shape.n, m = c.shape.m, kv = head / c.group();
  Rows q = rows_of(c.q, head), k = rows_of(c.k, kv), v = rows_of(c.v, kv), q_mean = q;
  for (auto& row : q_mean) std::fill(row.begin(), row.end(), 0.0);
  const Rows whole = q;
  const auto k_mean = mean_of(k, 0, size_t(m));
  for (auto& row : k)
    for (size_t e = 0; by.smooth_k && e < row.size(); ++e) row[e] -= k_mean[e];
  for (int64_t i = 0; by.smooth_q && i < n; ++i) {
    const int64_t first = i / by.smooth_q * by.smooth_q;
    q_mean[size_t(i)] = mean_of(whole, size_t(first), size_t(std::min(n, first + by.smooth_q)));
    for (size_t e = 0; e < q[0].size(); ++e) q[size_t(i)][e] -= q_mean[size_t(i)][e];
  }
  Rows q_codes = q, k_codes = k;
  if (by.levels) {
    q_codes = coded_rows(q, by.levels,
                         [&](int64_t r) { return r / by.q_block * 8 + (by.thread ? r % by.q_block % 8 : 0); });
    k_codes = coded_rows(k, by.levels,
                         [&](int64_t r) { return r / by.k_block * 8 + (by.thread ? r % by.k_block % 8 / 2 : 0); });
  }
  const auto v_mean = mean_of(v, 0, size_t(m));
  for (size_t e = 0; e < v[0].size(); ++e) {
    double most = 0;
    for (auto& row : v) row[e] -= by.smooth_v ? v_mean[e] : 0, most = std::max(most, std::abs(row[e]));
    for (auto& row : v)
      if (by.weights == 2)
        row[e] = most > 0 ? e4m3(double(float(row[e] / (most / by.largest)))) * most / by.largest : 0;
      else if (by.weights == 1) row[e] = half(row[e]);
  }
  const double scale = 1 / std::sqrt(double(c.shape.d));
  Rows out;
  std::vector<double> lse;
  for (int64_t i = 0; i < n; ++i) {
    std::vector<double> sum(size_t(c.shape.d_v), 0.0);
    double top = -INFINITY, total = 0;
    for (int64_t first = 0; first < m; first += by.tile) {
      std::vector<std::pair<int64_t, double>> logits;
      double next = top;
      for (int64_t j = first; j < std::min(m, first + by.tile) && j <= m - n + i; ++j) {
        double x = inner(q_codes[size_t(i)], k_codes[size_t(j)]) + inner(q_mean[size_t(i)], k[size_t(j)]);
        if (by.smooth_k) x += inner(whole[size_t(i)], k_mean);
        logits.emplace_back(j, x * scale), next = std::max(next, x * scale);
      }
      const double shrink = std::exp(top - next);
      top = next, total *= shrink;
      for (double& x : sum) x *= shrink;
      for (const auto& [j, x] : logits) {
        const double p = std::exp(x - top), rounded = by.weights == 2   ? e4m3(448 * p) / 448
                                                      : by.weights == 1 ? half(p)
                                                                        : p;
        total += p;
        for (size_t e = 0; e < sum.size(); ++e) sum[e] += rounded * v[size_t(j)][e];
      }
    }
    for (size_t e = 0; e < sum.size(); ++e) sum[e] = sum[e] / total + (by.smooth_v ? v_mean[e] : 0);
    out.push_back(sum), lse.push_back(top + std::log(total));
  }
  return {out, lse};
}

// A product next to a rounding boundary may fall to the other side of it in f32: one code of one weight.
TEST_P(LowPrecision, SageIsTheRoundedSoftmax) {
  const Version versions[] = {
      {.spec = "sage"},
      {.spec = "sage(scales=block,q_block=128,weights=f16)", .thread = false, .q_block = 128, .weights = 1},
      {.spec = "sage(q_block=16,k_block=128,largest=2.25,tile=16)", .q_block = 16, .k_block = 128, .tile = 16, .largest = 2.25},
      {.spec = "sage(codes=int4,smooth_q=24,smooth_v=true)", .levels = 7, .smooth_q = 24, .smooth_v = true},
      {.spec = "sage(weights=f32,smooth_k=false)", .weights = 0, .smooth_k = false},
      {.spec = "sage(codes=f32,weights=f32,tile=7)", .levels = 0, .tile = 7, .weights = 0}};
  for (const Shape s : {shape(150, 150), shape(21, 100), shape(1, 1)})
    for (const Version& by : versions) {
      const Case c(s, 4);
      const ApplyOutput out = c.run(by.spec, backend());
      double worst = 0, mean = 0, worst_lse = 0;
      for (int64_t head = 0; head < s.h; ++head) {
        const auto [rows, lse] = sage(c, by, head);
        for (int64_t i = 0; i < s.n; ++i) {
          worst_lse = std::max(worst_lse, std::abs(double(out.find("lse")->view().at<float>(head, i)) - lse[size_t(i)]));
          for (int64_t e = 0; e < s.d_v; ++e) {
            const double off = std::abs(double(out.find("out")->view().at<float>(head, i, e)) - rows[size_t(i)][size_t(e)]);
            worst = std::max(worst, std::isnan(off) ? INFINITY : off), mean += off / double(s.h * s.n * s.d_v);
          }
        }
      }
      EXPECT_LT(worst_lse, by.levels ? 2e-2 : 2e-5) << by.spec;
      EXPECT_LT(mean, by.levels || by.weights ? 2e-4 : 1e-6) << by.spec;
      EXPECT_LT(worst, by.levels || by.weights ? 3e-2 : kExact) << by.spec;
    }
}

double error_of(const Case& c, const std::string& spec, const std::string& backend) {
  const ApplyOutput out = c.run(spec, backend), dense = c.run("dense", backend);
  double sum = 0, size = 0;
  for (size_t i = 0; i < size_t(out.find("out")->view().numel()); ++i) {
    const double x = out.find("out")->view().as<float>()[i], y = dense.find("out")->view().as<float>()[i];
    sum += (x - y) * (x - y), size += y * y;
  }
  return std::sqrt(sum / size);
}

TEST_P(LowPrecision, SmoothKeysHideAChannelsBias) {
  Case c(shape(130, 130), 7);
  const double plain = error_of(c, "sage", backend());
  EXPECT_GT(plain, 1e-3);
  EXPECT_LT(plain, 0.1);
  EXPECT_LT(error_of(c, "sage", backend()), error_of(c, "sage(codes=int4)", backend()));
  for (int64_t kv = 0; kv < c.shape.g; ++kv)
    for (int64_t j = 0; j < c.shape.m; ++j) c.k->at<float>(kv, j, 3) += 40;
  const double smooth = error_of(c, "sage", backend()), rough = error_of(c, "sage(smooth_k=false)", backend());
  EXPECT_LT(smooth, 2 * plain) << "a shift of all keys changes nothing but rounding";
  EXPECT_GT(rough, 3 * smooth);
}

TEST_P(LowPrecision, OtherHeadsAreDense) {
  const Case c(shape(40, 40), 5);
  const ApplyOutput out = c.run("sage(codes=int4,heads=0)", backend()), dense = c.run("dense", backend());
  double first = 0, others = 0;
  for (int64_t head = 0; head < c.shape.h; ++head)
    for (int64_t i = 0; i < 40; ++i)
      for (int64_t e = 0; e < c.shape.d_v; ++e) {
        const double off = std::abs(double(out.find("out")->view().at<float>(head, i, e)) -
                                    double(dense.find("out")->view().at<float>(head, i, e)));
        double& worst = head ? others : first;
        worst = std::max(worst, off);
      }
  EXPECT_GT(first, 1e-3);
  EXPECT_LT(others, kExact);
}

TEST(LowPrecisionSpecs, BadOnesAreRefused) {
  const ModelInfo m;
  for (const char* spec : {"sage(q_block=12)", "sage(codes=int2)", "sage(largest=449)", "sage+moba"})
    EXPECT_FALSE(Composition::parse(spec, m, registry())) << spec;
}

}  // namespace
}  // namespace heed::test
