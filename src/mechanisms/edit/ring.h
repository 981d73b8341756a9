#pragma once
#include <algorithm>

#include "base/comm.h"
#include "kernels/kernels.h"

namespace heed::mechanisms {

/// How n queries over m keys are dealt to ranks: contiguous shards of ⌈n / ranks⌉ queries and ⌈m / ranks⌉ keys, the last
/// ones shorter or empty.
struct Shards {
  int64_t n, m;
  int ranks;
  Tensor q_pos = {}, k_pos = {};  // I32 [n], [m]: true positions, known to all ranks; a window needs them
  int64_t q_begin(int rank) const { return std::min(n, rank * ((n + ranks - 1) / ranks)); }
  int64_t k_begin(int rank) const { return std::min(m, rank * ((m + ranks - 1) / ranks)); }
};

/// Ring attention (Liu et al., 2023): one rank's share of exact attention. q F32 [h, n_r, d], k and v [g, c, d],
/// [g, c, d_v] of any one plain type, where n_r is the rank's number of queries and c = ⌈m / ranks⌉ whatever the shard
/// holds; out F32 [h, n_r, d_v], lse F32 [h, n_r]. Keys and values go around the ring, the others' arriving while the
/// last are worked on; each rank sends (ranks − 1) · g · c · (d + d_v) elements. Of mods, scale, softcap and window count.
void ring_attention(Comm&, Queue&, const Shards&, Tensor q, Tensor k, Tensor v, const Mods&, bool causal, Tensor out,
                    Tensor lse);

}  // namespace heed::mechanisms
