#include "lab/interval.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/random.h"
#include "lab/score.h"

namespace heed {
namespace {

constexpr double kZ = 1.959963984540054;  // the normal distribution's 97.5 % point
constexpr int kResamples = 4000;

}  // namespace

Interval wilson(double mean, int64_t count) {
  if (count <= 0) return {0, 1, "wilson"};
  const double n = double(count), z = kZ * kZ / n;
  const double middle = (mean + z / 2) / (1 + z);
  const double half = kZ * std::sqrt(mean * (1 - mean) / n + z / (4 * n)) / (1 + z);
  return {mean <= 0 ? 0 : std::max(0.0, middle - half), mean >= 1 ? 1 : std::min(1.0, middle + half), "wilson"};
}

Interval score_interval(std::span<const double> scores) {
  const bool plain = std::all_of(scores.begin(), scores.end(), [](double x) { return x == 0 || x == 1; });
  const bool same = std::all_of(scores.begin(), scores.end(), [&](double x) { return x == scores[0]; });
  if (plain || same) return wilson(mean(scores), int64_t(scores.size()));
  Random random(scores.size());
  std::vector<double> means(kResamples);
  for (double& m : means) {
    double sum = 0;
    for (size_t i = 0; i < scores.size(); ++i) sum += scores[size_t(random.below(int64_t(scores.size())))];
    m = sum / double(scores.size());
  }
  return {quantile(means, 0.025), quantile(means, 0.975), "bootstrap"};
}

Interval normal_interval(std::span<const double> values) {
  const double m = mean(values);
  if (values.size() < 2) return {m, m, "normal"};
  double squares = 0;
  for (double x : values) squares += (x - m) * (x - m);
  const double half = kZ * std::sqrt(squares / double(values.size() - 1) / double(values.size()));
  return {m - half, m + half, "normal"};
}

}  // namespace heed
