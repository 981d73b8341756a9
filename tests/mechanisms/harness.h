// Random tensors, dense attention as explicit matrices in f64, and what apply returned, for tests of mechanisms.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "backends.h"
#include "base/random.h"
#include "lab/apply.h"
#include "model/session.h"

namespace heed::test {

using Rows = std::vector<std::vector<double>>;  // [rows][columns]

struct Shape {
  int64_t h = 4, g = 2, n = 96, m = 96, d = 16, d_v = 16;
};

struct Case {
  Shape shape;
  Buffer q, k, v;

  explicit Case(Shape s, uint64_t seed = 1, double sharpness = 1.5) : shape(s) {
    Random random(seed);
    q = Buffer(Dtype::F32, {s.h, s.n, s.d}), k = Buffer(Dtype::F32, {s.g, s.m, s.d}),
    v = Buffer(Dtype::F32, {s.g, s.m, s.d_v});
    for (float& x : q->span<float>()) x = float(sharpness * random.normal());
    for (float& x : k->span<float>()) x = float(random.normal());
    for (float& x : v->span<float>()) x = float(random.normal());
  }

  int64_t group() const { return shape.h / shape.g; }
  int64_t first() const { return shape.m - shape.n; }  // position of the first query
  double dot(int64_t head, int64_t i, int64_t j) const {
    double sum = 0;
    for (int64_t c = 0; c < shape.d; ++c)
      sum += double(q->at<float>(head, i, c)) * double(k->at<float>(head / group(), j, c));
    return sum;
  }
  /// Softmax weights of row i of a head over the keys that `sees` admits.
  template <class Sees>
  std::vector<double> weights(int64_t head, int64_t i, Sees sees) const {
    std::vector<double> p(size_t(shape.m), 0.0);
    double top = -INFINITY, sum = 0;
    for (int64_t j = 0; j < shape.m; ++j)
      if (sees(j)) top = std::max(top, dot(head, i, j) / std::sqrt(double(shape.d)));
    for (int64_t j = 0; j < shape.m; ++j)
      if (sees(j)) sum += p[size_t(j)] = std::exp(dot(head, i, j) / std::sqrt(double(shape.d)) - top);
    for (double& x : p) x = sum > 0 ? x / sum : 0;
    return p;
  }
  std::vector<double> causal(int64_t head, int64_t i) const {
    return weights(head, i, [&](int64_t j) { return j <= first() + i; });
  }
  std::vector<double> output(int64_t head, const std::vector<double>& p) const {
    std::vector<double> out(size_t(shape.d_v), 0.0);
    for (int64_t j = 0; j < shape.m; ++j)
      for (int64_t c = 0; c < shape.d_v; ++c)
        out[size_t(c)] += p[size_t(j)] * double(v->at<float>(head / group(), j, c));
    return out;
  }

  ApplyInput input(const std::string& backend) const {
    ApplyInput in;
    in.q = q, in.k = k, in.v = v, in.backend = backend;
    return in;
  }
  ApplyOutput run(const std::string& spec, const std::string& backend) const { return run(spec, input(backend)); }
  static ApplyOutput run(const std::string& spec, const ApplyInput& in) {
    auto out = apply(spec, in);
    if (!out) throw std::runtime_error(spec + ": " + out.error().text());
    return std::move(*out);
  }

  /// Largest difference of `out` from rows that `sees(head, i, j)` admits, in double.
  template <class Sees>
  double error(const ApplyOutput& out, Sees sees) const {
    double worst = 0;
    for (int64_t head = 0; head < shape.h; ++head)
      for (int64_t i = 0; i < shape.n; ++i) {
        const auto expected = output(head,
                                     weights(head, i, [&](int64_t j) { return j <= first() + i && sees(head, i, j); }));
        for (int64_t c = 0; c < shape.d_v; ++c) {
          const double x = out.find("out")->view().at<float>(head, i, c);
          worst = std::max(worst, std::isnan(x) ? INFINITY : std::abs(x - expected[size_t(c)]));
        }
      }
    return worst;
  }
  double dense_error(const ApplyOutput& out) const {
    return error(out, [](int64_t, int64_t, int64_t) { return true; });
  }
};

/// Lists as apply returns them: NAME_offsets and NAME_index.
inline std::vector<std::vector<int32_t>> lists(const ApplyOutput& out, const std::string& name) {
  const Buffer *offsets = out.find(name + "_offsets"), *index = out.find(name + "_index");
  if (!offsets || !index) throw std::runtime_error("no " + name + "_index among the arrays");
  std::vector<std::vector<int32_t>> result;
  for (int64_t s = 0; s + 1 < offsets->view().size[0]; ++s) {
    const int32_t* x = index->view().as<int32_t>();
    result.emplace_back(x + offsets->view().at<int64_t>(s), x + offsets->view().at<int64_t>(s + 1));
  }
  return result;
}

inline std::vector<int32_t> all_of(int64_t count) {
  std::vector<int32_t> out(static_cast<size_t>(count));
  std::iota(out.begin(), out.end(), 0);
  return out;
}

/// The `count` best of scores, ascending; +∞ first, of ties the lower index.
inline std::vector<int32_t> top(const std::vector<double>& scores, int64_t count) {
  std::vector<int32_t> order = all_of(int64_t(scores.size()));
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return scores[size_t(a)] > scores[size_t(b)]; });
  order.resize(size_t(std::clamp<int64_t>(count, 0, int64_t(order.size()))));
  std::sort(order.begin(), order.end());
  return order;
}

/// Every test of a mechanism runs on the oracle, on the machine's best table (or the one that HEED_BACKEND names) and on
/// memory that the host may not touch, for groups 1, 3 and 8.
struct Setting {
  std::string backend;
  int64_t h, g;
};
inline void PrintTo(const Setting& s, std::ostream* out) { *out << s.backend << " h=" << s.h << " g=" << s.g; }
class Mechanisms : public testing::TestWithParam<Setting> {
 protected:
  Shape shape(int64_t n, int64_t m, int64_t d = 16, int64_t d_v = 24) const {
    return {GetParam().h, GetParam().g, n, m, d, d_v};
  }
  const std::string& backend() const { return GetParam().backend; }
};
#define HEED_ON_ALL_SETTINGS(SUITE)                                                                             \
  INSTANTIATE_TEST_SUITE_P(                                                                                     \
      Settings, SUITE,                                                                                          \
      testing::Values(Setting{"reference", 2, 2}, Setting{"reference", 6, 2}, Setting{backend_or("cpu"), 2, 2}, \
                      Setting{backend_or("cpu"), 6, 2}, Setting{backend_or("cpu"), 8, 1}, Setting{"guarded", 6, 2}))

inline constexpr double kExact = 2e-5;  // f32 against f64 at these sizes

/// ‖x[kv, j]‖.
inline double norm(const Tensor& x, int64_t kv, int64_t j) {
  double sum = 0;
  for (int64_t c = 0; c < x.size[2]; ++c) sum += std::pow(double(x.at<float>(kv, j, c)), 2);
  return std::sqrt(sum);
}

/// Token numbers below 61, which a tiny random model knows.
inline std::vector<int32_t> text(int64_t length, uint64_t seed) {
  Random random(seed);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < length; ++i) ids.push_back(int32_t(random.below(61)));
  return ids;
}

inline std::string number(double x) { return std::to_string(x); }
inline int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline std::vector<int32_t> sorted(const std::set<int32_t>& x) { return {x.begin(), x.end()}; }

}  // namespace heed::test
