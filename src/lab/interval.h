// How far a mean of few samples may be from the truth.
#pragma once
#include <cstdint>
#include <span>

namespace heed {

struct Interval {
  double low = 0, high = 0;
  const char* method = "";  // "wilson", "bootstrap" or "normal"
};

/// 95 % interval of a share: `mean` of `count` trials (Wilson, 1927). Right for trials that are 0 or 1; for trials
/// between them it is wider than it must be, since their variance is at most mean · (1 − mean). [0, 1] of no trial.
Interval wilson(double mean, int64_t count);

/// 95 % interval of the mean of scores in [0, 1]: Wilson's when all are 0 or 1, or all the same (a bootstrap knows no
/// spread there); else the percentiles of 4000 resampled means, with a fixed seed.
Interval score_interval(std::span<const double> scores);

/// mean ± 1.96 standard errors: for many values, taken as independent.
Interval normal_interval(std::span<const double> values);

}  // namespace heed
