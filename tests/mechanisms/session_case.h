// Small models in sessions, and what a tap on a layer is held against.
#pragma once
#include "attention/scores.h"
#include "harness.h"
#include "model/session.h"

namespace heed::test {

/// Four layers, the second with a sliding window of 24.
inline std::shared_ptr<const Model> tiny_model(int h, int g) {
  ModelInfo shape;
  shape.layers = 4, shape.h = h, shape.g = g, shape.d = shape.d_v = 16, shape.hidden = 48, shape.vocabulary = 61;
  shape.windows = {0, 24, 0, 0};
  return Model::random(shape, 64, Dtype::F32, 5);
}

/// What query head 0 of a decoded token reads in a layer.
inline std::vector<int32_t> first_row(const Plan& plan) {
  std::vector<int32_t> out;
  for (int64_t e = plan.begin(0); e < plan.end(0); ++e) out.push_back(plan.index.at<int32_t>(e));
  return out;
}

/// Queries and keys of one layer before rotation, as they come in, in f64.
struct PlainRows {
  std::vector<Rows> q, k, v;  // [head][token][channel]
  std::vector<double> turn;   // inverse frequencies

  explicit PlainRows(const ModelInfo& m)
      : q(size_t(m.h)), k(size_t(m.g)), v(size_t(m.g)), turn(size_t(m.rope(0)->dims / 2)) {
    EXPECT_TRUE(m.rope(0)->neox);
    for (size_t i = 0; i < turn.size(); ++i) turn[i] = double(m.rope(0)->inv_freq.at<float>(int64_t(i)));
  }
  void take(LayerView& at) {
    auto rows = [](const Ragged& x, int64_t s) {
      Rows out;
      for (int64_t r = x.begin(s); r < x.end(s); ++r) {
        auto& row = out.emplace_back();
        for (int64_t c = 0; c < x.values.size[1]; ++c) row.push_back(double(x.values.at<float>(r, c)));
      }
      return out;
    };
    for (size_t head = 0; head < q.size(); ++head)
      for (auto& row : rows(at.plain_q, int64_t(head))) q[head].push_back(row);
    const Ragged keys = plain_keys(at), values = stored_values(at);
    for (size_t kv = 0; kv < k.size(); ++kv) k[kv] = rows(keys, int64_t(kv)), v[kv] = rows(values, int64_t(kv));
  }
  size_t kv_of(size_t head) const { return head * k.size() / q.size(); }
  /// Of query i and key j, which stands `distance` before it.
  double dot(size_t head, size_t i, size_t j, double distance) const {
    const auto &x = q[head][i], &y = k[kv_of(head)][j];
    const size_t half = turn.size();
    double sum = 0;
    for (size_t c = 0; c < half; ++c) {
      const double a = distance * turn[c], cos = std::cos(a), sin = std::sin(a);
      sum += (x[c] * cos - x[c + half] * sin) * y[c] + (x[c] * sin + x[c + half] * cos) * y[c + half];
    }
    for (size_t c = 2 * half; c < x.size(); ++c) sum += x[c] * y[c];
    return sum;
  }
  /// The largest difference of the outputs of a decoded token (of one KV head, or of all) from attention over `list`, keys
  /// distance(rank, key) apart.
  template <class Distance>
  double error(LayerView& at, const std::vector<int32_t>& list, Distance distance, int64_t of = -1) const {
    double worst = 0;
    for (size_t head = 0; head < q.size(); ++head) {
      if (of >= 0 && kv_of(head) != size_t(of)) continue;
      std::vector<double> sum(v[0][0].size(), 0.0);
      double total = 0;
      for (size_t r = 0; r < list.size(); ++r) {
        const double logit = dot(head, q[head].size() - 1, size_t(list[r]), distance(r, list[r])),
                     w = std::exp(logit / std::sqrt(double(at.model.d)));
        total += w;
        for (size_t c = 0; c < sum.size(); ++c) sum[c] += w * v[kv_of(head)][size_t(list[r])][c];
      }
      for (size_t c = 0; c < sum.size(); ++c)
        worst = std::max(worst, std::abs(sum[c] / total - double(at.out.at<float>(int64_t(head), int64_t(c)))));
    }
    return worst;
  }
};

inline SessionOptions in_f32(const std::string& attention, int64_t chunk = 0) {
  SessionOptions o;
  o.attention = attention, o.backend = host_backend_or("reference"), o.chunk = chunk;
  o.k.kind = o.v.kind = PageType::Kind::F32;
  return o;
}

/// The largest difference of two rows of numbers; ∞ where one is NaN or they are unequally long.
inline double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double worst = a.size() == b.size() ? 0 : INFINITY;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    const double d = std::abs(double(a[i]) - double(b[i]));
    worst = std::isnan(d) ? INFINITY : std::max(worst, d);
  }
  return worst;
}

/// What each head of each layer holds behind a prompt.
inline std::vector<std::vector<int32_t>> held(const std::shared_ptr<const Model>& model, const std::string& spec,
                                              int64_t chunk) {
  SessionOptions o;
  o.attention = spec, o.chunk = chunk, o.backend = backend_or("reference");
  o.k.kind = o.v.kind = PageType::Kind::F32;
  Session session(model, o);
  session.prefill(text(83, 1));
  std::vector<std::vector<int32_t>> out;
  for (int l = 0; l < model->info().layers; ++l)
    for (int kv = 0; kv < model->info().g; ++kv) out.push_back(session.store().layer(l).positions(kv));
  return out;
}

}  // namespace heed::test
