// Who sees whom, and with which logit: shared by attend, its gradient, and observe.
#pragma once
#include "kernels/reference/reference.h"

namespace heed::reference {

/// One query row of a head, and where its keys lie.
struct QueryRow {
  int64_t sequence, head;
  int64_t i, n, m;           // the i-th of n queries over m keys
  int64_t row;               // in q.values
  int64_t k_first, v_first;  // first key and value in k.values and v.values
  int64_t k_segment;
};

/// A key that a row sees.
struct Seen {
  int64_t key;  // counted from the segment's first
  int part;
  double logit;
  double slope;  // of the logit by q·k
};

class Attention {
 public:
  /// v.values may be empty; plan may be null (dense, causal).
  Attention(const char* where, const Ragged& q, const Ragged& k, const Ragged& v, const Plan* plan, const Mods& mods);

  int64_t sequences() const { return q_.sequences(); }
  int64_t heads() const { return q_.heads; }
  /// The rows of one head of one sequence.
  std::vector<QueryRow> rows(int64_t sequence, int64_t head) const;
  /// What a row sees, in the plan's order (ascending keys, within a part).
  std::vector<Seen> seen(const QueryRow& at) const;
  /// e^(logit − lse) or σ(logit).
  double weight(const Seen& key, double lse) const;
  /// The log of what weights divide by: logits, and the sink when part 0 is meant.
  double lse(const QueryRow& at, const std::vector<Seen>& seen, int part) const;
  /// The same over all parts.
  double lse(const QueryRow& at, const std::vector<Seen>& seen) const;
  int64_t q_position(const QueryRow& at) const;
  int64_t k_position(const QueryRow& at, int64_t key) const;
  double gain(const QueryRow& at) const { return mods_.gain ? number(mods_.gain, at.row) : 1.0; }

 private:
  double lse(const QueryRow& at, std::vector<double> logits, bool with_sink) const;
  void see(const QueryRow& at, int64_t key, int part, std::vector<Seen>& out) const;

  const Ragged& q_;
  const Ragged& k_;
  Ragged v_;  // by value: those who need none pass a temporary
  Plan plan_;
  const Mods& mods_;
  PlanRows plan_rows_;
  double scale_;
  std::vector<double> q_values_, k_values_;
};

}  // namespace heed::reference
