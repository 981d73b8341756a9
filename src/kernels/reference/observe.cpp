#include <algorithm>
#include <memory>

#include "kernels/check.h"
#include "kernels/reference/attention.h"
#include "kernels/reference/page.h"

namespace heed::reference {
namespace {

/// The keys observed, from whichever place they lie in, and the mods that go with them.
struct Observed {
  std::unique_ptr<Unpacked> unpacked;
  Ragged k;
  Mods mods;
  Observed(const char* where, const Keys& keys, const Mods& given) : mods(given) {
    require(!keys.panel != !keys.pages, where, "keys come from a panel or from pages");
    if (keys.panel) {
      k = *keys.panel;
      return;
    }
    unpacked = std::make_unique<Unpacked>(where, *keys.pages, keys.read);
    k = unpacked->k;
    mods.key_bias = unpacked->bias;
    mods.k_pos = unpacked->positions;
    mods.until = mods.key_factor = mods.row_factor = {};
  }
};

/// One query head's statistic of each key it may see.
std::vector<double> column(const Attention& attention, const std::vector<QueryRow>& rows, const Observe& how) {
  if (rows.empty()) return {};
  const int64_t n = rows[0].n, m = rows[0].m;
  const bool fold_max = how.rows == Observe::Rows::Max, last = how.rows == Observe::Rows::Last;
  std::vector<double> out(size_t(m), how.logits && (fold_max || last) ? -infinity : 0.0), seen_by(size_t(m), 0.0);
  for (const QueryRow& at : rows) {
    const std::vector<Seen> seen = attention.seen(at);
    const double lse = how.lse ? number(how.lse, at.row) : attention.lse(at, seen);
    for (const Seen& key : seen) {
      const double x = how.logits ? key.logit : attention.weight(key, lse);
      double& to = out[size_t(key.key)];
      seen_by[size_t(key.key)] += 1;
      switch (how.rows) {
        case Observe::Rows::Sum:
        case Observe::Rows::Mean:
        case Observe::Rows::Seen: to += x; break;
        case Observe::Rows::Max: to = std::max(to, x); break;
        case Observe::Rows::Last:
          if (at.i == n - 1) to = x;
          break;
        case Observe::Rows::Decayed: to += std::pow(double(how.decay), double(n - 1 - at.i)) * x; break;
      }
    }
  }
  for (int64_t j = 0; j < m; ++j) {
    if (how.rows == Observe::Rows::Mean) out[size_t(j)] /= double(n);
    if (how.rows == Observe::Rows::Seen && seen_by[size_t(j)] > 0) out[size_t(j)] /= seen_by[size_t(j)];
  }
  return out;
}

}  // namespace

void observe(Queue&, const Ragged& q, const Keys& keys, const Plan* plan, const Mods& mods, const Observe& how,
             Ragged columns) {
  constexpr const char* where = "observe";
  using Heads = Observe::Heads;
  const Observed from(where, keys, mods);
  const Attention attention(where, q, from.k, {}, plan, from.mods);
  const int64_t h = q.heads, g = from.k.heads;
  require(columns.segments() == from.k.segments(), where, "columns have the keys' segments");
  require(how.heads != Heads::Each || (!mods.k_map && width(columns.values) == h / g), where,
          "each head apart needs columns [keys, group] and no k_map");
  const bool fold_max = how.rows == Observe::Rows::Max || how.rows == Observe::Rows::Last;
  const double nothing = how.logits && fold_max ? -infinity : 0;

  for (int64_t sequence = 0; sequence < attention.sequences(); ++sequence) {
    std::vector<std::vector<std::vector<double>>> by_kv_head(static_cast<size_t>(g));
    for (int64_t head = 0; head < h; ++head) {
      const int64_t kv_head = mods.k_map ? int64_t(number(mods.k_map, head)) : head * g / h;
      std::vector<double> x = column(attention, attention.rows(sequence, head), how);
      x.resize(size_t(from.k.length(sequence * g + kv_head)), nothing);  // of no rows
      by_kv_head[size_t(kv_head)].push_back(std::move(x));
    }
    for (int64_t kv_head = 0; kv_head < g; ++kv_head) {
      const int64_t segment = sequence * g + kv_head;
      const auto& group = by_kv_head[size_t(kv_head)];
      for (int64_t j = 0; j < from.k.length(segment); ++j) {
        double sum = 0, top = -infinity;
        for (const auto& x : group) {
          sum += x[size_t(j)];
          top = std::max(top, x[size_t(j)]);
        }
        double result = nothing;
        switch (how.heads) {
          case Heads::Each:
            for (size_t i = 0; i < group.size(); ++i)
              store(columns.values, offset(columns.values, columns.begin(segment) + j, int64_t(i)), group[i][size_t(j)]);
            continue;
          case Heads::GroupMean:
            if (!group.empty()) result = sum / double(group.size());
            break;
          case Heads::GroupSum:
            if (!group.empty()) result = sum;
            break;
          case Heads::GroupMax:
            if (!group.empty()) result = top;
            break;
          case Heads::LayerMean:
            sum = 0;
            for (const auto& of_head : by_kv_head)
              for (const auto& x : of_head) sum += j < int64_t(x.size()) ? x[size_t(j)] : 0;
            result = sum / double(h);
            break;
        }
        store(columns.values, offset(columns.values, columns.begin(segment) + j), result);
      }
    }
  }
}

void observe_rows(Queue&, const Ragged& q, const Keys& keys, const Plan* plan, const Mods& mods, const RowStats& stats) {
  constexpr const char* where = "observe_rows";
  const Observed from(where, keys, mods);
  const Attention attention(where, q, from.k, {}, plan, from.mods);
  const int64_t rows = q.values.size[0], spans = stats.spans ? stats.spans.size[0] : 0;
  check_tensor(where, "entropy", stats.entropy, {rows}, true);
  check_tensor(where, "distance", stats.distance, {rows}, true);
  check_tensor(where, "argmax", stats.argmax, {rows}, true, Dtype::I32);
  check_tensor(where, "peak", stats.peak, {rows}, true);
  check_tensor(where, "lse", stats.lse, {rows}, true);
  check_tensor(where, "spans", stats.spans, {spans, 2}, true, Dtype::I32);
  check_tensor(where, "span", stats.span, {rows, spans}, true);
  for (int64_t sequence = 0; sequence < attention.sequences(); ++sequence)
    for (int64_t head = 0; head < attention.heads(); ++head)
      for (const QueryRow& at : attention.rows(sequence, head)) {
        std::vector<Seen> seen = attention.seen(at);
        std::sort(seen.begin(), seen.end(), [](const Seen& a, const Seen& b) { return a.key < b.key; });
        const double lse = attention.lse(at, seen);
        double entropy = 0, distance = 0, peak = 0, best = -infinity;
        int64_t argmax = -1;
        std::vector<double> span(size_t(spans), 0.0);
        for (const Seen& key : seen) {
          const double p = attention.weight(key, lse);
          if (p > 0) entropy -= p * std::log(p);
          distance += p * double(attention.q_position(at) - attention.k_position(at, key.key));
          if (key.logit > best) {  // logits order probabilities even where these underflow to equal ones
            best = key.logit;
            argmax = key.key;
            peak = p;
          }
          for (int64_t s = 0; s < spans; ++s)
            if (key.key >= stats.spans.at<int32_t>(s, 0) && key.key < stats.spans.at<int32_t>(s, 1))
              span[size_t(s)] += p;
        }
        if (stats.entropy) store(stats.entropy, at.row, entropy);
        if (stats.distance) store(stats.distance, at.row, distance);
        if (stats.argmax) store(stats.argmax, at.row, double(argmax));
        if (stats.peak) store(stats.peak, at.row, peak);
        if (stats.lse) store(stats.lse, at.row, lse);
        if (stats.span) set_row(stats.span, at.row, span);
      }
}

}  // namespace heed::reference
