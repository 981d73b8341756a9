// Counter-based random numbers: the same seed and index give the same number on every machine and thread.
#pragma once
#include <cmath>
#include <cstdint>
#include <initializer_list>

namespace heed {

/// SplitMix64 over (seed, counter): statistically sound for tests, sampling and synthetic data; not cryptographic.
class Random {
 public:
  /// Seeds that differ by little give streams that are each other's, a few numbers on: mixed() keeps them apart.
  explicit Random(uint64_t seed = 0) : state_(seed * 0x9e3779b97f4a7c15ull + 0x853c49e6748fea9bull) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  /// Uniform in [0, 1).
  double uniform() { return double(next() >> 11) * 0x1.0p-53; }
  /// Uniform integer in [0, bound).
  int64_t below(int64_t bound) { return int64_t(uniform() * double(bound)); }
  /// Standard normal (Box-Muller).
  double normal() {
    const double u = 1.0 - uniform(), v = uniform();
    return std::sqrt(-2.0 * std::log(u)) * std::cos(6.283185307179586 * v);
  }

 private:
  uint64_t state_;
};

/// A seed made of several numbers, whose order counts.
inline uint64_t mixed(std::initializer_list<uint64_t> numbers) {
  uint64_t seed = 0;
  for (uint64_t x : numbers) seed = Random(seed ^ Random(x).next()).next();
  return seed;
}

}  // namespace heed
