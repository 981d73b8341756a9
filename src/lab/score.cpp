#include "lab/score.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>

#include "base/error.h"
#include "base/threads.h"

namespace heed {
namespace {

// Slices are summed apart and added in order, so that results are the same for any number of threads.
constexpr int64_t kSlice = 8192;

template <class F>
double sum_slices(int64_t count, F slice_sum) {
  const int64_t slices = (count + kSlice - 1) / kSlice;
  std::vector<double> parts(static_cast<size_t>(slices));
  parallel_for(slices, [&](int64_t s) { parts[size_t(s)] = slice_sum(s * kSlice, std::min(count, (s + 1) * kSlice)); });
  return std::accumulate(parts.begin(), parts.end(), 0.0);
}

}  // namespace

double log_sum_exp(std::span<const float> x) {
  if (x.empty()) return -std::numeric_limits<double>::infinity();
  const double top = *std::max_element(x.begin(), x.end());
  if (!std::isfinite(top)) return top;
  return top + std::log(sum_slices(int64_t(x.size()), [&](int64_t a, int64_t b) {
           double sum = 0;
           for (int64_t i = a; i < b; ++i) sum += std::exp(float(x[size_t(i)] - top));
           return sum;
         }));
}

double nll(std::span<const float> logits, int32_t token) { return log_sum_exp(logits) - double(logits[size_t(token)]); }

int32_t argmax(std::span<const float> logits) {
  return int32_t(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

Distributions::Distributions(int64_t rows, int64_t vocabulary) : rows_(rows), vocabulary_(vocabulary) {
  const size_t bytes = size_t(rows * vocabulary) * sizeof(float);
  if (bytes == 0) return;
  const auto refuse = [&] {
    throw Error(Code::Io, "temporary file",
                std::to_string(bytes >> 20) + " MiB for the reference's distributions: " + std::strerror(errno),
                "score fewer tokens with --score, or set TMPDIR to a place with room");
  };
  std::FILE* file = std::tmpfile();
  if (!file) refuse();
  // Allocated, not only sized: a disk that fills up later would end the program.
  const int error = posix_fallocate(fileno(file), 0, off_t(bytes));
  void* memory = error ? MAP_FAILED : mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fileno(file), 0);
  if (error) errno = error;
  const int kept = errno;
  std::fclose(file);
  errno = kept;
  if (memory == MAP_FAILED) refuse();
  data_ = static_cast<float*>(memory);
}

Distributions::~Distributions() {
  if (data_) munmap(data_, size_t(rows_ * vocabulary_) * sizeof(float));
}

void Distributions::set(int64_t row, std::span<const float> logits) {
  const double total = log_sum_exp(logits);
  float* out = data_ + row * vocabulary_;
  for (size_t i = 0; i < logits.size(); ++i) out[i] = float(logits[i] - total);
}

Distributions::Difference Distributions::against(int64_t row, std::span<const float> logits) const {
  const double total = log_sum_exp(logits);
  const std::span<const float> reference(data_ + row * vocabulary_, size_t(vocabulary_));
  const double kl = sum_slices(vocabulary_, [&](int64_t a, int64_t b) {
    double sum = 0;
    for (int64_t i = a; i < b; ++i) {
      // Rounded as the reference was, so that a run is at distance 0 from itself.
      const float p = reference[size_t(i)], q = float(logits[size_t(i)] - total);
      sum += double(std::exp(p)) * (double(p) - double(q));
    }
    return sum;
  });
  return {std::max(0.0, kl), argmax(reference) == argmax(logits)};
}

double quantile(std::vector<double> values, double share) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const double at = share * double(values.size() - 1);
  const size_t low = size_t(at), high = std::min(low + 1, values.size() - 1);
  return values[low] + (values[high] - values[low]) * (at - double(low));
}

double mean(std::span<const double> values) {
  return values.empty() ? 0 : std::accumulate(values.begin(), values.end(), 0.0) / double(values.size());
}

double mean_of_all(const std::vector<std::vector<double>>& rows) {
  double sum = 0, count = 0;
  for (const auto& row : rows) sum += std::accumulate(row.begin(), row.end(), 0.0), count += double(row.size());
  return count > 0 ? sum / count : 0;
}

}  // namespace heed
