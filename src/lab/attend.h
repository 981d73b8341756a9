// Attention on arrays: the operation alone.
#pragma once
#include <string>

#include "kernels/kernels.h"

namespace heed {

struct AttendOptions {
  bool causal = true;  // the n queries are the last of the m keys' positions; of a Dense plan, others say it themselves
  float scale = 0;     // 0: 1/√d
  float softcap = 0;   // 0: none
  int64_t window = 0;  // > 0: keys further back are not seen
  std::string backend = "auto";
  int device = 0;  // of the backend; arrays are of the host all the same
};

struct Attended {
  Buffer out;  // F32 [h, n, d_v], or [parts, h, n, d_v] when the plan has parts
  Buffer lse;  // F32 [h, n], likewise
};

/// q [h, n, d], k [g, m, d], v [g, m, d_v]: contiguous views of one type, F32, BF16 or F16; g divides h.
/// Throws Error(Invalid) for shapes and types that do not fit.
Attended attend(const Tensor& q, const Tensor& k, const Tensor& v, const Plan& plan = {}, const AttendOptions& options = {});

}  // namespace heed
