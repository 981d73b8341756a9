// What a row of logits says: losses, and how far it is from another run's.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace heed {

/// log Σ e^x, in f64. The result does not depend on the number of threads.
double log_sum_exp(std::span<const float> logits);

/// −log softmax(logits)[token], in nats.
double nll(std::span<const float> logits, int32_t token);

/// The lowest index of the largest number.
int32_t argmax(std::span<const float> logits);

/// The distributions of one run, as a reference for others: log-probabilities, rows × vocabulary × 4 bytes, in a
/// temporary file without a name, so that a long run takes no memory that others need.
class Distributions {
 public:
  /// Throws Error(Io) when there is no room for it.
  Distributions(int64_t rows, int64_t vocabulary);
  ~Distributions();
  Distributions(const Distributions&) = delete;
  Distributions& operator=(const Distributions&) = delete;

  void set(int64_t row, std::span<const float> logits);

  struct Difference {
    double kl = 0;          // Σ p (log p − log q), nats: p is the reference; never below 0
    bool same_top = false;  // both put the same token first
  };
  Difference against(int64_t row, std::span<const float> logits) const;

 private:
  int64_t rows_, vocabulary_;
  float* data_ = nullptr;
};

/// The value below which `share` of the values lie, between neighbours by their distance; 0 of none.
double quantile(std::vector<double> values, double share);
double mean(std::span<const double> values);
/// Over every number of every row.
double mean_of_all(const std::vector<std::vector<double>>& rows);

}  // namespace heed
