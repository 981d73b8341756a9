// attend over keys and values of bf16, for tiles of many queries.
#pragma once
#include "kernels/kernels.h"

namespace heed::HEED_ISA {

/// Where attend's results go.
struct Outputs {
  Tensor out, lse;
  bool split;  // by parts
  float* row(int part, int64_t row) const {
    return out.as<float>() + (split ? part * out.stride[0] + row * out.stride[1] : row * out.stride[0]);
  }
  void set_lse(int part, int64_t row, float x) const {
    if (!lse) return;
    lse.as<float>()[split ? part * lse.stride[0] + row * lse.stride[1] : row * lse.stride[0]] = x;
  }
};

/// Whether attend_bf16 does this call, and faster than a loop over tiles of 64 queries does.
bool takes_bf16(const Ragged& q, const Ragged& k, const Ragged& v, const Plan& plan, const Mods& mods);

/// Queries of F32 and F16 are rounded to bf16, as the keys they meet are. v null: only lse is made.
void attend_bf16(Queue& queue, const Ragged& q, const Ragged& k, const Ragged* v, const Plan& plan, const Mods& mods,
                 Outputs to);

}  // namespace heed::HEED_ISA
