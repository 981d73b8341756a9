// What this machine is, and what it can do at best.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "model/model.h"

namespace heed {

/// As the operating system names it; "unknown" where it does not say.
std::string cpu_name();
/// Bytes of memory that this machine has.
int64_t memory_bytes();
/// Weights of a model, counted as numbers.
int64_t parameters(const Model& model);

/// Rates that no kernel passes, measured with all threads at once, best of several tries.
struct MachineLimits {
  double read_gb_s = 0;  // memory read in order, from a buffer larger than the caches
  struct Peak {
    std::string name;   // "avx2 f32", "avx2 int16", "avx512 f32", "avx512 bf16", "avx512 int16", "neon f32"
    double gflops = 0;  // multiply-adds in registers alone, two operations each
  };
  std::vector<Peak> peaks;  // of the instruction sets this machine has
  double peak(const std::string& name) const;
};
MachineLimits machine_limits();

}  // namespace heed
