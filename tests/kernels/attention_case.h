// Random attention problems: every plan form, scope, mod and layout, with who may see whom written down beside them.
#pragma once
#include "kernels/harness.h"

namespace heed::test {

/// What a check can cope with.
struct Ask {
  bool small = false;     // a few rows and keys, for finite differences and explicit matrices
  bool many = false;      // tens to hundreds of rows, keys and values of BF16: what is worked on in large tiles
  bool low_types = true;  // BF16 and F16 besides F32
  bool parts = true;
  bool mods = true;
  bool maps = true;
  bool plans = true;    // forms besides Dense
  bool extreme = true;  // logits up to ±1e4
  bool sigmoid = true;
};

/// A plan and, for each query row, the part in which it names each key (−1: not named).
struct PlanData {
  Plan plan;
  std::vector<Buffer> memory;
  std::vector<std::vector<int>> part_of;  // [row of q.values][key]
};

PlanData random_plan(Random& random, Plan::Form form, Plan::Scope scope, int q_tile, int k_tile, int parts,
                     const Ragged& q, const Ragged& k, const std::vector<int64_t>& k_head_of);

struct AttentionCase {
  int64_t sequences, h, g, g_v, d, d_v;
  RaggedData q, k, v;
  PlanData plan;
  Mods mods;
  std::vector<Poisoned> memory;         // of mods
  std::vector<int64_t> k_head, v_head;  // of each query head
  double logit = 0;                     // no logit is larger
  double terms = 1;                     // keys of the longest segment

  AttentionCase(Random& random, const Ask& ask);
  /// Poisoned results of the right shapes.
  Poisoned out() const;
  Poisoned lse() const;
  std::string text() const;
};

}  // namespace heed::test
