// One mechanism on tensors, without a model (`heed apply`), and the harness that mechanism tests stand on.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "attention/spec.h"

namespace heed {

struct ApplyInput {
  Tensor q, k, v;    // [h, n, d], [g, m, d], [g, m, d_v]: any plain type, head-major, contiguous
  Tensor positions;  // optional I32 [m]: true positions of the keys; queries are the last n
  std::map<std::string, Tensor> inputs;
  bool causal = true;
  float scale = 0;
  Dtype dtype = Dtype::F32;  // what k and v are rounded to
  std::string backend = "auto";
  int device = 0;
  uint64_t seed = 0;
  bool beside_dense = false;  // time dense attention over the same tensors too
};

/// What parts of one call took, in seconds, copies to and from the device left out: `plan` (or `state`: all of a recurrence),
/// `attend`, `edit` with what is observed, `read` and `keep` with their own attention, and `dense`.
using ApplySeconds = std::map<std::string, double>;

/// Named arrays as interfaces fix them: out, lse, state, plan_block, plan_offsets, plan_index, kept_offsets, kept_index,
/// read_offsets, read_index, density.
struct ApplyOutput {
  std::vector<std::pair<std::string, Buffer>> arrays;
  ApplySeconds seconds;
  std::vector<std::string> notes;  // inputs that nothing reads
  const Buffer* find(const std::string& name) const;
};

/// What `inputs` may give a mechanism, needed or not, each with its shape: "beta [h, n]: step in (0, 1)". Throws Error for a
/// bad spec.
std::vector<std::string> inputs_of(const Spec&, const ModelInfo&);

/// Errors: shapes that do not fit (which, and what was expected), a bad spec, a missing input.
Result<ApplyOutput> apply(const std::string& spec, const ApplyInput& input);

}  // namespace heed
