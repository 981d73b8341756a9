// Gradients of the recurrence, chunk by chunk from the end: the states at chunk borders are made again first, the rest comes
// from the chunk's matrices. Delta is differentiated as the low-rank form it is (catalogue S1): a = e^g ⊙ k, b = −β k, and
// β k for k.
#include "kernels/check.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/recur_chunk.h"

namespace heed::HEED_ISA {
namespace {

constexpr int64_t C = kChunkRows;

/// X ← (I + N)^-T X for N below the diagonal: rows from the last to the first.
void solve_transposed(const float* n, int64_t rows, float* x, int64_t width) {
  for (int64_t j = rows - 1; j > 0; --j)
    for (int64_t i = 0; i < j; ++i) {
      const F by = set(n[j * C + i]);
      for (int64_t c = 0; c < width; c += kLanes)
        store(x + i * width + c, load(x + i * width + c) - by * load(x + j * width + c));
    }
}

/// One worker's memory and one segment's work.
class Backward {
 public:
  Backward(const RecurInputs& in, const Recur& how, const Tensor& d_out, const Tensor& d_state, const RecurGrads& grads,
           int64_t longest)
      : in_(in), how_(how), d_out_(d_out), d_state_(d_state), grads_(grads),
        delta_(how.correction == Recur::Correction::Delta) {
    shape_ = {how, width_of(in.q.values), width_of(in.v.values),
              how.scale != 0 ? how.scale : 1 / std::sqrt(float(width_of(in.q.values)))};
    if (delta_) shape_.how.correction = Recur::Correction::LowRank;
    shape_.keep = shape_.low_rank();
    wide_ = shape_.wide();
    wide_v_ = padded(shape_.d_v);
    borders_ = (longest + C - 1) / C + 1;
    longest_ = longest;
  }

  int64_t floats() const {
    return 15 * C * wide_ + 7 * C * wide_v_ + 4 * C * C + 3 * wide_ * wide_v_ + RecurChunk::floats(shape_) +
           RecurChunk::scratch_floats(shape_) + borders_ * wide_ * wide_v_ + (delta_ ? 3 * longest_ * wide_ : 0) + 2 * wide_;
  }

  void run(int64_t segment, float* memory) const {
    Work w(*this, memory);
    w.run(segment);
  }

 private:
  struct Work {
    const Backward& of;
    const int64_t wide, wide_v, d, d_v;
    float *q, *k, *a, *b, *e, *dq, *dk, *da, *db;  // [64, wide]
    float *v, *y, *dy, *dv, *d_o;                  // [64, wide_v]
    float *v_t, *y_t;                              // [wide_v, 64]
    float *d_qk, *d_qb, *d_ab, *d_ak;              // [64, 64]
    float* ds;                     // [d, wide_v]: the gradient of the state after the chunk, then before
    float *s_t, *ds_t;             // [wide_v, wide]
    float* states;                 // at each chunk border
    float *own_k, *own_a, *own_b;  // [rows, wide]: Delta's, in low-rank form
    float *chunk_memory, *chunk_scratch;

    Work(const Backward& of, float* memory)
        : of(of), wide(of.wide_), wide_v(of.wide_v_), d(of.shape_.d), d_v(of.shape_.d_v) {
      const auto take = [&](int64_t count) {
        float* at = memory;
        memory += count;
        return at;
      };
      for (float** panel : {&q, &k, &a, &b, &e, &dq, &dk, &da, &db}) *panel = take(C * wide);
      for (float** panel : {&v, &y, &dy, &dv, &d_o, &v_t, &y_t}) *panel = take(C * wide_v);
      for (float** square : {&d_qk, &d_qb, &d_ab, &d_ak}) *square = take(C * C);
      ds = take(wide * wide_v);
      s_t = take(wide * wide_v);
      ds_t = take(wide * wide_v);
      states = take(of.borders_ * wide * wide_v);
      for (float** own : {&own_k, &own_a, &own_b}) *own = of.delta_ ? take(of.longest_ * wide) : nullptr;
      chunk_memory = take(RecurChunk::floats(of.shape_));
      chunk_scratch = take(RecurChunk::scratch_floats(of.shape_));
    }

    float* border(int64_t c) const { return states + c * wide * wide_v; }

    /// Rows of Delta as those of LowRank.
    void lower(RecurSource& from, int64_t rows) {
      for (int64_t t = 0; t < rows; ++t) {
        float *key = own_k + t * wide, *left = own_a + t * wide, *right = own_b + t * wide;
        from.k.read(from.k_begin + t, key);
        from.decay(of.how_, t, d, left);
        const F beta = set(from.beta[t]);
        for (int64_t c = 0; c < wide; c += kLanes) {
          const F x = load(key + c), strength = beta * x;
          store(left + c, load(left + c) * x);
          store(right + c, zero() - strength);
          store(key + c, strength);
        }
      }
      const auto rows_of = [&](float* data) {
        Rows own;
        own.data = reinterpret_cast<const char*>(data);
        own.stride = wide * int64_t(sizeof(float));
        own.width = d;
        return own;
      };
      from.k = rows_of(own_k);
      from.a = rows_of(own_a);
      from.b = rows_of(own_b);
      from.k_begin = from.a_begin = 0;
    }

    void load_values(const RecurSource& from, int64_t first, const RecurChunk& chunk) {
      for (int64_t i = 0; i < chunk.padded_rows; ++i) {
        if (i < chunk.rows) from.v.read(from.v_begin + first + i, v + i * wide_v);
        else std::fill_n(v + i * wide_v, wide_v, 0.0f);
      }
    }

    /// y = M v + W S.
    void correct(const RecurChunk& chunk, const float* state) {
      if (!of.shape_.low_rank()) return;
      const int64_t rows = chunk.padded_rows;
      product({chunk.m, C}, v, wide_v, rows, wide_v, rows, y, wide_v);
      product<Into::Add>({chunk.w, wide}, state, wide_v, rows, wide_v, d, y, wide_v);
    }

    void run(int64_t segment) {
      RecurSource from(of.in_, of.how_, segment);
      const RecurSource given = from;
      const int64_t rows = of.in_.q.length(segment), chunks = (rows + C - 1) / C;
      if (of.delta_) lower(from, rows);
      std::fill_n(border(0), wide * wide_v, 0.0f);
      for (int64_t r = 0; r < d && of.in_.state; ++r)
        std::copy_n(of.in_.state.as<float>() + segment * of.in_.state.stride[0] + r * of.in_.state.stride[1], d_v,
                    border(0) + r * wide_v);
      RecurChunk chunk(of.shape_, chunk_memory);
      for (int64_t c = 0; c < chunks; ++c) {
        chunk.make(of.shape_, from, c * C, std::min(C, rows - c * C), chunk_scratch);
        load_values(from, c * C, chunk);
        correct(chunk, border(c));
        float* next = border(c + 1);
        for (int64_t r = 0; r < d; ++r)
          for (int64_t x = 0; x < wide_v; x += kLanes)
            store(next + r * wide_v + x, load(border(c) + r * wide_v + x) * set(chunk.decay[r]));
        product<Into::Add>({chunk.k, C}, v, wide_v, d, wide_v, chunk.padded_rows, next, wide_v);
        if (of.shape_.low_rank())
          product<Into::Add>({chunk.b, C}, y, wide_v, d, wide_v, chunk.padded_rows, next, wide_v);
      }
      std::fill_n(ds, wide * wide_v, 0.0f);
      for (int64_t r = 0; r < d && of.d_state_; ++r)
        std::copy_n(of.d_state_.as<float>() + segment * of.d_state_.stride[0] + r * of.d_state_.stride[1], d_v,
                    ds + r * wide_v);
      for (int64_t c = chunks - 1; c >= 0; --c) {
        chunk.make(of.shape_, from, c * C, std::min(C, rows - c * C), chunk_scratch);
        step(from, chunk, c);
        write(given, c * C, chunk.rows);
      }
      for (int64_t r = 0; r < d && of.grads_.state; ++r)
        std::copy_n(ds + r * wide_v, d_v,
                    of.grads_.state.as<float>() + segment * of.grads_.state.stride[0] + r * of.grads_.state.stride[1]);
    }

    void step(const RecurSource& from, const RecurChunk& chunk, int64_t c) {
      const int64_t rows = chunk.padded_rows, first = c * C;
      const bool low = of.shape_.low_rank();
      const float* state = border(c);
      load_values(from, first, chunk);
      correct(chunk, state);
      const Rows grads(of.d_out_);
      for (int64_t i = 0; i < rows; ++i) {
        const bool there = i < chunk.rows;
        float* to[] = {q + i * wide, k + i * wide, a + i * wide, b + i * wide};
        for (float* x : to) std::fill_n(x, wide, 0.0f);
        std::fill_n(d_o + i * wide_v, wide_v, 0.0f);
        std::fill_n(e + i * wide, wide, 1.0f);
        if (!there) continue;
        from.q.read(from.q_begin + first + i, to[0], of.shape_.scale);
        from.k.read(from.k_begin + first + i, to[1]);
        if (low) {
          from.a.read(from.a_begin + first + i, to[2]);
          from.b.read(from.a_begin + first + i, to[3]);
        }
        from.decay(of.how_, first + i, d, e + i * wide);
        grads.read(from.q_begin + first + i, d_o + i * wide_v);
      }

      // Value side.
      product({chunk.qk, 1, C}, d_o, wide_v, rows, wide_v, rows, dv, wide_v);
      product<Into::Add>({chunk.k, 1, C}, ds, wide_v, rows, wide_v, d, dv, wide_v);
      if (low) {
        product({chunk.qb, 1, C}, d_o, wide_v, rows, wide_v, rows, dy, wide_v);
        product<Into::Add>({chunk.b, 1, C}, ds, wide_v, rows, wide_v, d, dy, wide_v);
        solve_transposed(chunk.n, rows, dy, wide_v);
        product<Into::Add>({chunk.plain_m, 1, C}, dy, wide_v, rows, wide_v, rows, dv, wide_v);
      }
      // Matrix side.
      transpose(v, wide_v, rows, wide_v, v_t, C);
      product({d_o, wide_v}, v_t, C, rows, rows, wide_v, d_qk, C);
      transpose(state, wide_v, d, wide_v, s_t, wide);
      transpose(ds, wide_v, d, wide_v, ds_t, wide);
      for (float* t : {s_t, ds_t})
        for (int64_t x = 0; x < wide_v; ++x) std::fill(t + x * wide + d, t + (x + 1) * wide, 0.0f);
      product({d_o, wide_v}, s_t, wide, rows, wide, wide_v, dq, wide);
      product({v, wide_v}, ds_t, wide, rows, wide, wide_v, dk, wide);
      if (low) {
        transpose(y, wide_v, rows, wide_v, y_t, C);
        product({d_o, wide_v}, y_t, C, rows, rows, wide_v, d_qb, C);
        product({dy, wide_v}, y_t, C, rows, rows, wide_v, d_ab, C);
        product({dy, wide_v}, v_t, C, rows, rows, wide_v, d_ak, C);
        product({dy, wide_v}, s_t, wide, rows, wide, wide_v, da, wide);
        product({y, wide_v}, ds_t, wide, rows, wide, wide_v, db, wide);
      }
      std::fill_n(through_end(), wide, 0.0f);
      const float* after = border(c + 1);
      for (int64_t r = 0; r < d; ++r) {
        F sum = zero();
        for (int64_t x = 0; x < wide_v; x += kLanes)
          sum = fma(load(after + r * wide_v + x), load(ds + r * wide_v + x), sum);
        through_end()[r] = hsum(sum);
      }
      for (int64_t x = 0; x < wide; x += kLanes) low ? channels<true>(rows, x) : channels<false>(rows, x);

      // The state before the chunk.
      for (int64_t r = 0; r < d; ++r)
        for (int64_t x = 0; x < wide_v; x += kLanes)
          store(ds + r * wide_v + x, load(ds + r * wide_v + x) * set(chunk.decay[r]));
      product<Into::Add>({chunk.q, 1, wide}, d_o, wide_v, d, wide_v, rows, ds, wide_v);
      if (low) product<Into::Add>({chunk.left, 1, wide}, dy, wide_v, d, wide_v, rows, ds, wide_v);
    }

    /// Σ over values of S ⊙ dS at the chunk's end: what every log decay of the chunk does through it. Kept in s_t, used up by then.
    float* through_end() const { return s_t; }

    /// kLanes channels from x on: gradients of the decayed products, row by row as the decays go; dg into e.
    template <bool Low>
    void channels(int64_t rows, int64_t x) {
      F moving[C], moving_low[C];
      const auto at = [&](float* panel, int64_t i) { return panel + i * wide + x; };
      // What rows owe: keys decay forward to meet them.
      F sofar = set(1);
      for (int64_t i = 0; i < rows; ++i) {
        const F decay = load(at(e, i));
        if constexpr (Low) {
          F sum = load(at(da, i)) * sofar;
          for (int64_t j = 0; j < i; ++j)
            sum = fma(set(d_ak[i * C + j]), moving[j], fma(set(d_ab[i * C + j]), moving_low[j], sum));
          store(at(da, i), sum);
        }
        sofar = sofar * decay;
        F sum = load(at(dq, i)) * sofar;
        for (int64_t j = 0; j < i; ++j) {
          moving[j] = moving[j] * decay;
          sum = fma(set(d_qk[i * C + j]), moving[j], sum);
          if constexpr (Low) {
            moving_low[j] = moving_low[j] * decay;
            sum = fma(set(d_qb[i * C + j]), moving_low[j], sum);
          }
        }
        moving[i] = load(at(k, i));
        sum = fma(set(d_qk[i * C + i]), moving[i], sum);
        if constexpr (Low) {
          moving_low[i] = load(at(b, i));
          sum = fma(set(d_qb[i * C + i]), moving_low[i], sum);
        }
        store(at(dq, i), sum);
      }
      // What keys owe: rows decay backward to meet them.
      F toend = set(1);
      for (int64_t j = rows - 1; j >= 0; --j) {
        const F decay = j + 1 < rows ? load(at(e, j + 1)) : set(1);
        toend = toend * decay;
        F sum = load(at(dk, j)) * toend, sum_low = Low ? load(at(db, j)) * toend : zero();
        for (int64_t i = j + 1; i < rows; ++i) {
          moving[i] = moving[i] * decay;
          sum = fma(set(d_qk[i * C + j]), moving[i], sum);
          if constexpr (Low) {
            if (i > j + 1) moving_low[i] = moving_low[i] * decay;
            sum = fma(set(d_ak[i * C + j]), moving_low[i], sum);
            sum_low = fma(set(d_qb[i * C + j]), moving[i], fma(set(d_ab[i * C + j]), moving_low[i], sum_low));
          }
        }
        moving[j] = load(at(q, j));
        sum = fma(set(d_qk[j * C + j]), moving[j], sum);
        if constexpr (Low) {
          sum_low = fma(set(d_qb[j * C + j]), moving[j], sum_low);
          moving_low[j] = load(at(a, j));
          store(at(db, j), sum_low);
        }
        store(at(dk, j), sum);
      }
      // G_i stands in e^(G_i) beside q and a and in e^(−G_j) beside k and b, so its gradient is q dq − k dk − b db (+ a da one
      // row earlier); g_l is part of all G_i with i ≥ l.
      F sum = load(through_end() + x);
      for (int64_t i = rows - 1; i >= 0; --i) {
        sum = sum + load(at(q, i)) * load(at(dq, i)) - load(at(k, i)) * load(at(dk, i));
        if constexpr (Low) sum = sum - load(at(b, i)) * load(at(db, i));
        moving[i] = sum;
        if constexpr (Low) sum = sum + load(at(a, i)) * load(at(da, i));
      }
      if (of.delta_) {
        // k stood in for three: β k as the key, e^g ⊙ k as a, −β k as b.
        for (int64_t i = 0; i < rows; ++i) moving[i] = moving[i] + load(at(a, i)) * load(at(da, i));
        for (int64_t i = 0; i < rows; ++i) {
          store(at(da, i), load(at(da, i)) * load(at(e, i)));
          store(at(dk, i), load(at(dk, i)) - load(at(db, i)));
        }
      }
      for (int64_t i = 0; i < rows; ++i) store(at(e, i), moving[i]);
    }

    void write(const RecurSource& given, int64_t first, int64_t rows) {
      const auto put = [&](const Tensor& t, int64_t row, const float* x, int64_t width, float by) {
        if (!t) return;
        float* to = t.as<float>() + row * t.stride[0];
        for (int64_t c = 0; c < width; ++c) to[c] = x[c] * by;
      };
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = given.q_begin + first + i;
        put(of.grads_.q, row, dq + i * wide, d, of.shape_.scale);
        put(of.grads_.v, given.v_begin + first + i, dv + i * wide_v, d_v, 1);
        if (of.how_.decay == Recur::Decay::Vector) put(of.grads_.g, row, e + i * wide, d, 1);
        if (of.how_.decay != Recur::Decay::Vector && of.grads_.g) {
          F sum = zero();
          for (int64_t c = 0; c < wide; c += kLanes) sum = sum + load(e + i * wide + c);
          of.grads_.g.as<float>()[row] = hsum(sum);
        }
        put(of.grads_.a, row, da + i * wide, d, 1);
        put(of.grads_.b, row, db + i * wide, d, 1);
        if (of.delta_) {
          const float beta = given.beta[first + i];
          given.k.read(given.k_begin + first + i, k + i * wide);
          F along = zero();
          for (int64_t c = i * wide; c < (i + 1) * wide; c += kLanes) {
            along = fma(load(k + c), load(dk + c), along);
            store(dk + c, fma(set(beta), load(dk + c), load(da + c)));
          }
          if (of.grads_.beta) of.grads_.beta.as<float>()[row] = hsum(along);
        }
        put(of.grads_.k, given.k_begin + first + i, dk + i * wide, d, 1);
      }
    }
  };

  const RecurInputs& in_;
  const Recur& how_;
  const Tensor &d_out_, &d_state_;
  const RecurGrads& grads_;
  bool delta_;
  RecurShape shape_;
  int64_t wide_ = 0, wide_v_ = 0, borders_ = 0, longest_ = 0;
};

}  // namespace

void recur_backward(Queue& queue, const RecurInputs& in, const Recur& how, Tensor d_out, Tensor d_state,
                    const RecurGrads& grads) {
  constexpr const char* where = "recur_backward";
  check_recur(where, in, how);
  require(!how.normalise, where, "there is no gradient of the normalised form");
  const int64_t segments = in.q.segments(), rows = in.q.values.size[0], d = width_of(in.q.values),
                d_v = width_of(in.v.values);
  check_tensor(where, "d_out", d_out, {rows, d_v});
  check_tensor(where, "d_state", d_state, {segments, d, d_v}, true);
  for (const Tensor& t : {grads.q, grads.a, grads.b}) check_tensor(where, "a gradient", t, {rows, d}, true);
  check_tensor(where, "gradient of k", grads.k, {in.k.values.size[0], d}, true);
  check_tensor(where, "gradient of v", grads.v, {in.v.values.size[0], d_v}, true);
  check_tensor(where, "gradient of beta", grads.beta, {rows}, true);
  check_tensor(where, "gradient of state", grads.state, {segments, d, d_v}, true);
  if (how.decay == Recur::Decay::Vector) check_tensor(where, "gradient of g", grads.g, {rows, d}, true);
  else check_tensor(where, "gradient of g", grads.g, {rows}, true);
  int64_t longest = 0;
  for (int64_t s = 0; s < segments; ++s) longest = std::max(longest, in.q.length(s));
  const Backward backward(in, how, d_out, d_state, grads, longest);
  for_each(queue, segments, backward.floats(), [&](int64_t s, float* scratch) { backward.run(s, scratch); });
}

}  // namespace heed::HEED_ISA
