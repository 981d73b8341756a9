#include "kernels/reference/attention.h"

#include <algorithm>

#include "kernels/check.h"

namespace heed::reference {
namespace {

std::vector<double> widen(const Tensor& t) {
  std::vector<double> out;
  out.reserve(size_t(t.size[0] * t.size[1]));
  for (int64_t r = 0; r < t.size[0]; ++r)
    for (int64_t c = 0; c < t.size[1]; ++c) out.push_back(number(t, r, c));
  return out;
}

const Plan& checked(const char* where, const Ragged& q, const Ragged& k, const Ragged& v, const Plan* plan, const Mods& mods) {
  static const Plan dense;
  check_attention(where, q, k, v, plan, mods);
  return plan ? *plan : dense;
}

}  // namespace

Attention::Attention(const char* where, const Ragged& q, const Ragged& k, const Ragged& v, const Plan* plan, const Mods& mods)
    : q_(q), k_(k), v_(v), plan_(checked(where, q, k, v, plan, mods)), mods_(mods), plan_rows_(plan_, q, k.heads),
      scale_(mods.scale != 0 ? double(mods.scale) : 1 / std::sqrt(double(q.values.size[1]))),
      q_values_(widen(q.values)), k_values_(widen(k.values)) {
  if (plan_.form != Plan::Form::Dense)
    require(plan_.rows() >= plan_rows_.starts.back(), where,
            "the plan has " + std::to_string(plan_.rows()) + " rows, the queries have " +
                std::to_string(plan_rows_.starts.back()) + " tiles");
}

std::vector<QueryRow> Attention::rows(int64_t sequence, int64_t head) const {
  const int64_t h = q_.heads, q_segment = sequence * h + head;
  const int64_t k_head = mods_.k_map ? int64_t(number(mods_.k_map, head)) : head * k_.heads / h;
  QueryRow at{};
  at.sequence = sequence;
  at.head = head;
  at.n = q_.length(q_segment);
  at.k_segment = sequence * k_.heads + k_head;
  at.m = k_.length(at.k_segment);
  at.k_first = k_.begin(at.k_segment);
  if (v_.values) {
    const int64_t v_head = mods_.v_map ? int64_t(number(mods_.v_map, head)) : head * v_.heads / h;
    const int64_t v_segment = sequence * v_.heads + v_head;
    require(v_.length(v_segment) == at.m, "attend", "a segment of v is not as long as its keys");
    at.v_first = v_.begin(v_segment);
  }
  std::vector<QueryRow> out;
  for (at.i = 0; at.i < at.n; ++at.i) {
    at.row = q_.begin(q_segment) + at.i;
    out.push_back(at);
  }
  return out;
}

int64_t Attention::q_position(const QueryRow& at) const {
  return mods_.q_pos ? int64_t(number(mods_.q_pos, at.row)) : at.m - at.n + at.i;
}

int64_t Attention::k_position(const QueryRow& at, int64_t key) const {
  return mods_.k_pos ? int64_t(number(mods_.k_pos, at.k_first + key)) : key;
}

void Attention::see(const QueryRow& at, int64_t key, int part, std::vector<Seen>& out) const {
  const int64_t k_row = at.k_first + key;
  if (key < 0 || key >= at.m) return;
  if (plan_.causal && key - at.i > at.m - at.n) return;
  if (mods_.window > 0 && q_position(at) - k_position(at, key) >= mods_.window) return;
  if (mods_.until && double(q_position(at)) > number(mods_.until, k_row)) return;

  const int64_t d = q_.values.size[1];
  double dot = 0;
  for (int64_t c = 0; c < d; ++c) dot += q_values_[size_t(at.row * d + c)] * k_values_[size_t(k_row * d + c)];
  Seen seen{key, part, 0, scale_};
  if (mods_.temperature) seen.slope *= number(mods_.temperature, at.row);
  seen.logit = seen.slope * dot;
  if (mods_.softcap > 0) {
    const double t = std::tanh(seen.logit / double(mods_.softcap));
    seen.logit = double(mods_.softcap) * t;
    seen.slope *= 1 - t * t;
  }
  if (mods_.key_bias) seen.logit += number(mods_.key_bias, k_row);
  if (mods_.row_factor)
    for (int64_t c = 0; c < mods_.row_factor.size[1]; ++c)
      seen.logit += number(mods_.row_factor, at.row, c) * number(mods_.key_factor, k_row, c);
  out.push_back(seen);
}

std::vector<Seen> Attention::seen(const QueryRow& at) const {
  std::vector<Seen> out;
  if (plan_.form == Plan::Form::Dense) {
    for (int64_t key = 0; key < at.m; ++key) see(at, key, 0, out);
    return out;
  }
  const int64_t plan_row = plan_rows_.row(at.sequence, at.head, q_.heads, at.i, plan_.q_tile);
  for (int64_t e = plan_.begin(plan_row); e < plan_.end(plan_row); ++e) {
    const int part = plan_.part ? plan_.part.at<int32_t>(e) : 0;
    switch (plan_.form) {
      case Plan::Form::Dense: break;
      case Plan::Form::Interval:
        for (int64_t key = plan_.index.at<int32_t>(e, 0); key < std::min<int64_t>(plan_.index.at<int32_t>(e, 1), at.m); ++key)
          see(at, key, part, out);
        break;
      case Plan::Form::Tokens: see(at, plan_.index.at<int32_t>(e), part, out); break;
      case Plan::Form::Blocks: {
        const int64_t first = int64_t(plan_.index.at<int32_t>(e)) * plan_.k_tile;
        const int32_t mask = plan_.mask ? plan_.mask.at<int32_t>(e) : -1;
        for (int64_t j = 0; j < plan_.k_tile; ++j)
          if (mask < 0 || (plan_.bits.at<uint64_t>(mask, at.i % plan_.q_tile, j / 64) >> (j % 64) & 1))
            see(at, first + j, part, out);
        break;
      }
    }
  }
  return out;
}

double Attention::weight(const Seen& key, double lse) const {
  return mods_.weight == WeightFunction::Softmax ? std::exp(key.logit - lse) : 1 / (1 + std::exp(-key.logit));
}

double Attention::lse(const QueryRow& at, std::vector<double> logits, bool with_sink) const {
  if (mods_.weight == WeightFunction::Sigmoid)
    for (double& x : logits) x = -std::log1p(std::exp(-std::abs(x))) + std::min(x, 0.0);  // log σ(x)
  if (with_sink && mods_.sink_logits) logits.push_back(number(mods_.sink_logits, at.head));
  return log_sum_exp(logits);
}

double Attention::lse(const QueryRow& at, const std::vector<Seen>& seen, int part) const {
  std::vector<double> logits;
  for (const Seen& key : seen)
    if (key.part == part) logits.push_back(key.logit);
  return lse(at, std::move(logits), part == 0);
}

double Attention::lse(const QueryRow& at, const std::vector<Seen>& seen) const {
  std::vector<double> logits;
  for (const Seen& key : seen) logits.push_back(key.logit);
  return lse(at, std::move(logits), true);
}

}  // namespace heed::reference
