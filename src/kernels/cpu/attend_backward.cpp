// Gradients of attention from out and lse alone (Dao 2023): probabilities are made again tile by tile, with
// D = rowsum(out · d_out) in place of a second pass over them. A tile is 64 keys × 64 queries, queries in the lanes: lse, D,
// gains and temperatures are then vectors, and of all operands only the queries' are transposed, once a tile row.
#include "kernels/check.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/padded_rows.h"
#include "kernels/cpu/product.h"
#include "kernels/cpu/walk.h"

namespace heed::HEED_ISA {
namespace {

constexpr int64_t kQueries = 64, kKeys = 64;
constexpr float kInf = INFINITY;

struct Gradient {
  const Ragged &q, &k, &v;
  const Plan& plan;
  const Mods& mods;
  Tensor out, lse, d_out, d_q, d_k, d_v, d_key_bias, d_gain;
  PlanRows plan_rows;
  float scale;
  int64_t d, d_v_wide, wide, wide_v, factors;

  bool softmax() const { return mods.weight == WeightFunction::Softmax; }
  int64_t key_head(int64_t head) const { return mods.k_map ? mods.k_map.at<int32_t>(head) : head * k.heads / q.heads; }
  int64_t value_head(int64_t head) const {
    return mods.v_map ? mods.v_map.at<int32_t>(head) : head * v.heads / q.heads;
  }
};

/// Which gradients a piece of work adds up: dQ needs all keys of a row, dK and dV all rows of a key.
struct Want {
  bool q, k, v;
};

/// One worker's memory, and the walk over the tiles of one head.
class Tiles {
 public:
  static int64_t floats(const Gradient& g) {
    const int64_t square = kKeys * kQueries;
    return 3 * kQueries * g.wide + 3 * kQueries * g.wide_v + kKeys * (2 * g.wide + 2 * g.wide_v) + 4 * square +
           (8 + g.factors) * kQueries + 4 * kKeys;
  }

  Tiles(const Gradient& g, float* memory) : g_(g) {
    const auto take = [&](int64_t count) {
      float* at = memory;
      memory += count;
      return at;
    };
    query_ = take(kQueries * g.wide);
    query_t_ = take(kQueries * g.wide);
    sum_q_ = take(kQueries * g.wide);
    grad_ = take(kQueries * g.wide_v);
    grad_t_ = take(kQueries * g.wide_v);
    seen_ = take(kQueries * g.wide_v);
    key_ = take(kKeys * g.wide);
    sum_k_ = take(kKeys * g.wide);
    value_ = take(kKeys * g.wide_v);
    sum_v_ = take(kKeys * g.wide_v);
    p_ = take(kKeys * kQueries);
    ds_ = take(kKeys * kQueries);
    tanh_ = take(kKeys * kQueries);
    hidden_ = take(kKeys * kQueries);
    lse_ = take(kQueries);
    dot_ = take(kQueries);
    slope_ = take(kQueries);
    factor_ = take(g.factors * kQueries);
    position_ = reinterpret_cast<int32_t*>(take(kQueries));
    index_ = reinterpret_cast<int32_t*>(take(kKeys));
  }

  /// All tiles of one head of one sequence, keys low ≤ j < high.
  void run(int64_t sequence, int64_t head, int64_t low, int64_t high, Want want) {
    want_ = want;
    const int64_t q_segment = sequence * g_.q.heads + head;
    const int64_t k_segment = sequence * g_.k.heads + g_.key_head(head),
                  v_segment = sequence * g_.v.heads + g_.value_head(head);
    q_begin_ = g_.q.begin(q_segment);
    k_begin_ = g_.k.begin(k_segment);
    v_begin_ = g_.v.begin(v_segment);
    n_ = g_.q.length(q_segment);
    m_ = g_.k.length(k_segment);
    const bool dense = g_.plan.form == Plan::Form::Dense;
    const int64_t plan_tile = dense ? std::max<int64_t>(1, n_) : g_.plan.q_tile;
    for (int64_t top = 0; top < n_; top += plan_tile)
      for (int64_t first = top; first < std::min(n_, top + plan_tile); first += kQueries) {
        first_ = first;
        rows_ = std::min({kQueries, n_ - first, top + plan_tile - first});
        tile(sequence, head, top, low, high);
      }
  }

 private:
  void tile(int64_t sequence, int64_t head, int64_t top, int64_t low, int64_t high) {
    const bool plain = !g_.mods.q_pos && !g_.mods.k_pos;
    if (g_.plan.causal) high = std::min(high, m_ - n_ + first_ + rows_);
    if (g_.mods.window > 0 && plain) low = std::max(low, m_ - n_ + first_ - g_.mods.window + 1);
    high = std::min(high, m_);
    loaded_ = false;
    const bool dense = g_.plan.form == Plan::Form::Dense;
    Walk walk(g_.plan, dense ? 0 : g_.plan_rows.row(sequence, head, g_.q.heads, top, g_.plan.q_tile), -1, low, high);
    Run run;
    count_ = 0;
    while (low < high && walk.next(kKeys - count_, run)) {
      for (int64_t j = 0; j < run.count; ++j) {
        index_[count_] = int32_t(run.first + j);
        bits_[count_] = run.bits ? run.bits + (run.bit + j) / 64 : nullptr;
        shift_[count_] = int((run.bit + j) % 64);
        ++count_;
      }
      if (count_ == kKeys) flush(top);
    }
    if (count_ > 0) flush(top);
    if (want_.q && g_.d_gain) load_rows();
    if (want_.q) finish();
  }

  /// What the rows of a tile bring: once, and only when they meet a key.
  void load_rows() {
    if (loaded_) return;
    loaded_ = true;
    lanes_ = (rows_ + kPad - 1) / kPad * kPad;
    const Rows queries(g_.q.values), grads(g_.d_out), outs(g_.out);
    for (int64_t i = 0; i < lanes_; ++i) {
      const int64_t row = q_begin_ + first_ + i;
      const bool there = i < rows_;
      const float gain = !there ? 0 : g_.mods.gain ? g_.mods.gain.as<float>()[row] : 1;
      const float sum = there && g_.softmax() ? g_.lse.as<float>()[row] : 0;
      float* grad = grad_ + i * g_.wide_v;
      dot_[i] = 0;
      if (there) queries.read(row, query_ + i * g_.wide);
      else std::fill_n(query_ + i * g_.wide, g_.wide, 0.0f);
      std::fill_n(grad, g_.wide_v, 0.0f);
      // A row without weight is as good as hidden: e^(x − ∞) = 0.
      lse_[i] = gain == 0 || sum == -kInf ? kInf : sum;
      if (gain != 0) {
        grads.read(row, grad);
        outs.read(row, seen_);
        F dot = zero();
        for (int64_t c = 0; c < g_.wide_v; c += kLanes) dot = fma(load(grad + c), load(seen_ + c), dot);
        dot_[i] = hsum(dot);
        for (int64_t c = 0; c < g_.wide_v; c += kLanes) store(grad + c, load(grad + c) * set(gain));
      }
      slope_[i] = g_.scale * (there && g_.mods.temperature ? g_.mods.temperature.as<float>()[row] : 1);
      position_[i] = !there ? 0 : g_.mods.q_pos ? g_.mods.q_pos.as<int32_t>()[row] : int32_t(m_ - n_ + first_ + i);
      for (int64_t r = 0; r < g_.factors; ++r)
        factor_[r * kQueries + i] = there ? g_.mods.row_factor.as<float>()[row * g_.mods.row_factor.stride[0] + r] : 0;
    }
    transpose(query_, g_.wide, lanes_, g_.wide, query_t_, kQueries);
    transpose(grad_, g_.wide_v, lanes_, g_.wide_v, grad_t_, kQueries);
    if (want_.q) std::fill_n(sum_q_, lanes_ * g_.wide, 0.0f);
  }

  /// 0 where row i sees key j of the tile, −∞ where not; false when all rows see it.
  bool hide(int64_t j, int64_t top, float* hidden) const {
    const int64_t key = index_[j];
    const int64_t first_row = g_.plan.causal ? key - (m_ - n_) - first_ : 0;
    const bool ranged = g_.mods.window > 0 || g_.mods.until;
    if (first_row <= 0 && !ranged && !bits_[j]) return false;
    const int32_t position = g_.mods.k_pos ? g_.mods.k_pos.as<int32_t>()[k_begin_ + key] : int32_t(key);
    const int32_t until = g_.mods.until ? g_.mods.until.as<int32_t>()[k_begin_ + key] : INT32_MAX;
    const int64_t window = g_.mods.window > 0 ? g_.mods.window : INT64_MAX;
    const int64_t stride = bits_[j] ? g_.plan.bits.stride[1] : 0;
    for (int64_t i = 0; i < lanes_; ++i) {
      bool seen = i >= first_row && int64_t(position_[i]) - position < window && position_[i] <= until;
      if (bits_[j] && i < rows_) seen = seen && (bits_[j][(first_ - top + i) * stride] >> shift_[j] & 1);
      hidden[i] = seen ? 0 : -kInf;
    }
    return true;
  }

  /// Logits of key j become P, and dP becomes the gradient of q·k; returns Σ of the logits' gradients.
  float weigh(int64_t j, int64_t top) {
    float *p = p_ + j * kQueries, *ds = ds_ + j * kQueries, *bent = tanh_ + j * kQueries;
    const bool partly = hide(j, top, hidden_);
    const int64_t key = k_begin_ + index_[j];
    const F bias = set(g_.mods.key_bias ? g_.mods.key_bias.as<float>()[key] : 0);
    const float* factors = g_.factors ? g_.mods.key_factor.as<float>() + key * g_.mods.key_factor.stride[0] : nullptr;
    const float cap = g_.mods.softcap;
    F sum = zero();
    for (int64_t i = 0; i < lanes_; i += kLanes) {
      F x = load(p + i) * load(slope_ + i);
      if (cap > 0) {
        const F t = tanh(x / set(cap));
        store(bent + i, t);
        x = t * set(cap);
      }
      x = x + bias;
      for (int64_t r = 0; r < g_.factors; ++r) x = fma(load(factor_ + r * kQueries + i), set(factors[r]), x);
      if (partly) x = x + load(hidden_ + i);
      const F weight = g_.softmax() ? exp(x - load(lse_ + i)) : sigmoid(x);
      store(p + i, weight);
      if (!want_.q && !want_.k) continue;
      F grad = load(ds + i);
      grad = g_.softmax() ? weight * (grad - load(dot_ + i)) : weight * (set(1) - weight) * grad;
      sum = sum + grad;
      grad = grad * load(slope_ + i);
      if (cap > 0) {
        const F t = load(bent + i);
        grad = grad * (set(1) - t * t);
      }
      store(ds + i, grad);
    }
    return hsum(sum);
  }

  /// The keys gathered so far meet the tile's rows.
  void flush(int64_t top) {
    load_rows();
    const int64_t wide = g_.wide, wide_v = g_.wide_v;
    const Rows keys(g_.k.values), values(g_.v.values);
    for (int64_t j = 0; j < count_; ++j) {
      keys.read(k_begin_ + index_[j], key_ + j * wide);
      values.read(v_begin_ + index_[j], value_ + j * wide_v);
    }
    const bool logits = want_.q || want_.k;
    product({key_, wide}, query_t_, kQueries, count_, lanes_, g_.d, p_, kQueries);
    if (logits) product({value_, wide_v}, grad_t_, kQueries, count_, lanes_, g_.d_v_wide, ds_, kQueries);
    for (int64_t j = 0; j < count_; ++j) {
      const float bias = weigh(j, top);
      if (want_.k && g_.d_key_bias) g_.d_key_bias.as<float>()[k_begin_ + index_[j]] += bias;
    }
    if (want_.q) product<Into::Add>({ds_, 1, kQueries}, key_, wide, rows_, wide, count_, sum_q_, wide);
    if (want_.k) {
      product({ds_, kQueries}, query_, wide, count_, wide, rows_, sum_k_, wide);
      add_rows(sum_k_, wide, k_begin_, g_.d_k);
    }
    if (want_.v) {
      product({p_, kQueries}, grad_, wide_v, count_, wide_v, rows_, sum_v_, wide_v);
      add_rows(sum_v_, wide_v, v_begin_, g_.d_v);
    }
    count_ = 0;
  }

  void add_rows(const float* from, int64_t wide, int64_t begin, const Tensor& to) const {
    const int64_t width = to.size[1];
    for (int64_t j = 0; j < count_; ++j) {
      float* row = to.as<float>() + (begin + index_[j]) * to.stride[0];
      for (int64_t c = 0; c < width; ++c) row[c] += from[j * wide + c];
    }
  }

  /// dQ and the gain's gradient of the tile's rows.
  void finish() const {
    for (int64_t i = 0; i < rows_; ++i) {
      const int64_t row = q_begin_ + first_ + i;
      float* to = g_.d_q.as<float>() + row * g_.d_q.stride[0];
      if (loaded_) std::copy_n(sum_q_ + i * g_.wide, g_.d, to);
      else std::fill_n(to, g_.d, 0.0f);
      if (!g_.d_gain) continue;
      const float gain = g_.mods.gain ? g_.mods.gain.as<float>()[row] : 1;
      g_.d_gain.as<float>()[row] = gain != 0 ? dot_[i] / gain : 0;
    }
  }

  const Gradient& g_;
  Want want_{};
  float *query_, *query_t_, *sum_q_, *grad_, *grad_t_, *seen_, *key_, *sum_k_, *value_, *sum_v_, *p_, *ds_, *tanh_,
      *hidden_, *lse_, *dot_, *slope_, *factor_;
  int32_t *position_, *index_;
  const uint64_t* bits_[kKeys];
  int shift_[kKeys];
  int64_t q_begin_ = 0, k_begin_ = 0, v_begin_ = 0, n_ = 0, m_ = 0, first_ = 0, rows_ = 0, lanes_ = 0, count_ = 0;
  bool loaded_ = false;
};

void clear_rows(const Ragged& of, int64_t segment, int64_t low, int64_t high, const Tensor& t) {
  for (int64_t r = of.begin(segment) + low; r < of.begin(segment) + high; ++r)
    std::fill_n(t.as<float>() + r * t.stride[0], width_of(t), 0.0f);
}

}  // namespace

void attend_backward(Queue& queue, const Ragged& q, const Ragged& k, const Ragged& v, const Plan& plan,
                     const Mods& mods, Tensor out, Tensor lse, Tensor d_out, Tensor d_q, Tensor d_k, Tensor d_v,
                     Tensor d_key_bias, Tensor d_gain) {
  constexpr const char* where = "attend_backward";
  check_attention(where, q, k, v, &plan, mods);
  const int64_t rows = q.values.size[0], keys = k.values.size[0], width_k = q.values.size[1], width_v = v.values.size[1];
  check_tensor(where, "out", out, {rows, width_v});
  check_tensor(where, "lse", lse, {rows}, mods.weight == WeightFunction::Sigmoid);
  check_tensor(where, "d_out", d_out, {rows, width_v});
  check_tensor(where, "d_q", d_q, {rows, width_k});
  check_tensor(where, "d_k", d_k, {keys, width_k});
  check_tensor(where, "d_v", d_v, {v.values.size[0], width_v});
  check_tensor(where, "d_key_bias", d_key_bias, {keys}, true);
  check_tensor(where, "d_gain", d_gain, {rows}, true);
  const float scale = mods.scale != 0 ? mods.scale : 1 / std::sqrt(float(width_k));
  const Gradient g{q,
                   k,
                   v,
                   plan,
                   mods,
                   out,
                   lse,
                   d_out,
                   d_q,
                   d_k,
                   d_v,
                   d_key_bias,
                   d_gain,
                   PlanRows(plan, q, k.heads),
                   scale,
                   width_k,
                   width_v,
                   padded(width_k),
                   padded(width_v),
                   mods.row_factor ? mods.row_factor.size[1] : 0};
  if (plan.form != Plan::Form::Dense) g.plan_rows.check(plan, where);
  for (int64_t s = 0; s < q.segments(); ++s) {
    const int64_t sequence = s / q.heads, head = s % q.heads;
    require(g.key_head(head) >= 0 && g.key_head(head) < k.heads && g.value_head(head) >= 0 && g.value_head(head) < v.heads,
            where, "a map names a KV head that is not there");
    require(k.length(sequence * k.heads + g.key_head(head)) == v.length(sequence * v.heads + g.value_head(head)), where,
            "a segment of v is not as long as its keys");
  }

  // One pass makes all gradients when each KV head can have a thread. Otherwise dQ is made in one pass over query heads and
  // dK and dV in another over ranges of keys: 7 products a tile for 5, but work for everybody. Either way each number is
  // the same sum in the same order.
  const int64_t crew = threads(), sequences = q.sequences();
  const bool paired = !mods.k_map && !mods.v_map && k.heads == v.heads;
  const int64_t floats = Tiles::floats(g);
  const bool one_pass = paired && k.segments() >= crew;
  if (!one_pass)
    for_each(queue, q.segments(), floats, [&](int64_t s, float* scratch) {
      Tiles(g, scratch).run(s / q.heads, s % q.heads, 0, INT64_MAX, {true, false, false});
    });

  struct Part {
    bool keys, values;
  };
  const std::vector<Part> parts = paired ? std::vector<Part>{{true, true}}
                                         : std::vector<Part>{{true, false}, {false, true}};
  for (const Part part : parts) {
    const Ragged& of = part.keys ? k : v;
    constexpr int64_t narrowest = 256;
    Pieces pieces;
    const int64_t wanted = one_pass ? 1 : (4 * crew + of.segments() - 1) / std::max<int64_t>(1, of.segments());
    const auto ranges = [&](int64_t s) { return std::clamp<int64_t>(of.length(s) / narrowest, 1, wanted); };
    for (int64_t s = 0; s < of.segments(); ++s) pieces.add(ranges(s));
    for_each(queue, sequences > 0 ? pieces.count() : 0, floats, [&](int64_t i, float* scratch) {
      const auto [s, piece] = pieces[i];
      const int64_t sequence = s / of.heads, kv = s % of.heads, m = of.length(s), count = ranges(s);
      const int64_t low = m * piece / count, high = m * (piece + 1) / count;
      if (part.keys) {
        clear_rows(k, s, low, high, d_k);
        if (d_key_bias) clear_rows(k, s, low, high, d_key_bias);
      }
      if (part.values) clear_rows(v, s, low, high, d_v);
      Tiles tiles(g, scratch);
      for (int64_t head = 0; head < q.heads; ++head)
        if ((part.keys ? g.key_head(head) : g.value_head(head)) == kv)
          tiles.run(sequence, head, low, one_pass ? INT64_MAX : high, {one_pass, part.keys, part.values});
    });
  }
}

}  // namespace heed::HEED_ISA
