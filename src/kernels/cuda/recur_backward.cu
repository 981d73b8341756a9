// The recurrence's gradient: which form takes a call, and the plain one: states are kept at every 64th row and made anew
// between, then rows are walked backward. A block a segment; warp w holds rows w, w + 16, … of the state, a lane every
// 32nd column.
#include "kernels/cuda/recur_backward_sm90.h"

namespace heed::cuda {
namespace {

constexpr int kWarps = 16, kThreads = kWarps * 32, kChunk = 64, kMostD = 256, kMostColumns = 512;

struct Backward : RecurBackward {
  bool g_vector;
  float* starts;  // [Σ chunks, d, d_v]
  float* chunk;   // [segments, kChunk + 1, d, d_v]
  float* held;    // [segments, d, d_v]
};

struct RowMemory {
  float q[kMostD], k[kMostD], decay[kMostD], a[kMostD], b[kMostD], d_g[kMostD];
  float v[kMostColumns], g_out[kMostColumns];
  float left[3][kMostColumns];  // x^T M for up to three x
  float partial[kWarps][kMostColumns];
  float beta;
};

__device__ void load_row(const RecurView& a, int s, int t, RowMemory& m) {
  __syncthreads();
  const int64_t q_row = a.qs.begin(s) + t, k_row = a.ks.begin(s) + t, v_row = a.vs.begin(s) + t;
  const bool low_rank = a.correction == Recur::Correction::LowRank;
  for (int i = threadIdx.x; i < a.d; i += kThreads) {
    m.q[i] = a.q.get(q_row, i);
    m.k[i] = a.k.get(k_row, i);
    m.decay[i] = a.decay_at(q_row, i);
    m.a[i] = low_rank ? a.a.get(q_row, i) : 0;
    m.b[i] = low_rank ? a.b.get(q_row, i) : 0;
  }
  for (int c = threadIdx.x; c < a.d_v; c += kThreads) m.v[c] = a.v.get(v_row, c);
  if (threadIdx.x == 0) m.beta = a.beta ? a.beta[q_row] : 1;
  __syncthreads();
}

/// left[which] = Σ_i weight(i) M(i, ·), in order of warps.
template <class Weight>
__device__ void left_product(const RecurView& a, RowMemory& m, int which, const float* matrix, Weight weight) {
  const int w = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int c = lane; c < a.d_v; c += 32) {
    float sum = 0;
    for (int i = w; i < a.d; i += kWarps) sum += weight(i) * matrix[int64_t(i) * a.d_v + c];
    m.partial[w][c] = sum;
  }
  __syncthreads();
  for (int c = threadIdx.x; c < a.d_v; c += kThreads) {
    float sum = 0;
    for (int other = 0; other < kWarps; ++other) sum += m.partial[other][c];
    m.left[which][c] = sum;
  }
  __syncthreads();
}

/// The row in memory takes `from` to `to`, which may be the same.
__device__ void step_state(const RecurView& a, RowMemory& m, const float* from, float* to) {
  const int w = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool low_rank = a.correction == Recur::Correction::LowRank, delta = a.correction == Recur::Correction::Delta;
  if (low_rank) left_product(a, m, 0, from, [&](int i) { return m.a[i]; });
  if (delta) left_product(a, m, 0, from, [&](int i) { return m.decay[i] * m.k[i]; });
  for (int i = w; i < a.d; i += kWarps)
    for (int c = lane; c < a.d_v; c += 32) {
      float x = m.decay[i] * from[int64_t(i) * a.d_v + c];
      if (low_rank) x += m.b[i] * m.left[0][c];
      to[int64_t(i) * a.d_v + c] = x + m.beta * m.k[i] * (m.v[c] - (delta ? m.left[0][c] : 0));
    }
}

__device__ void set_each(const RecurView& a, float* to, auto value) {
  const int w = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = w; i < a.d; i += kWarps)
    for (int c = lane; c < a.d_v; c += 32) to[int64_t(i) * a.d_v + c] = value(i, c);
}

__global__ void __launch_bounds__(kThreads)
    recur_backward_kernel(const __grid_constant__ RecurView a, const __grid_constant__ Backward to) {
  extern __shared__ char raw[];
  RowMemory& m = *reinterpret_cast<RowMemory*>(raw);
  const int s = blockIdx.x, n = a.qs.length(s), w = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t size = int64_t(a.d) * a.d_v;
  float* starts = to.starts + (a.qs.begin(s) / kChunk + s) * size;
  float* chunk = to.chunk + s * (kChunk + 1) * size;
  float* held = to.held + s * size;  // the state on the way forward, its gradient on the way back
  const bool low_rank = a.correction == Recur::Correction::LowRank, delta = a.correction == Recur::Correction::Delta;
  set_each(a, held, [&](int i, int c) { return a.state_at(s, i, c); });
  for (int t = 0; t < n; ++t) {
    if (t % kChunk == 0)
      set_each(a, starts + t / kChunk * size, [&](int i, int c) { return held[int64_t(i) * a.d_v + c]; });
    load_row(a, s, t, m);
    step_state(a, m, held, held);
  }
  set_each(a, held, [&](int i, int c) {
    return to.d_state ? to.d_state[s * to.d_state_stride[0] + i * to.d_state_stride[1] + c * to.d_state_stride[2]] : 0.0f;
  });
  for (int first = (n - 1) / kChunk * kChunk; n > 0 && first >= 0; first -= kChunk) {
    const int last = min(n, first + kChunk);
    set_each(a, chunk, [&](int i, int c) { return starts[first / kChunk * size + int64_t(i) * a.d_v + c]; });
    for (int t = first; t < last; ++t) {
      load_row(a, s, t, m);
      step_state(a, m, chunk + (t - first) * size, chunk + (t - first + 1) * size);
    }
    for (int t = last - 1; t >= first; --t) {
      load_row(a, s, t, m);
      const int64_t row = a.qs.begin(s) + t;
      const float *before = chunk + (t - first) * size, *after = before + size;
      for (int c = threadIdx.x; c < a.d_v; c += kThreads) m.g_out[c] = to.d_out.get(row, c);
      __syncthreads();
      for (int i = w; i < a.d; i += kWarps) {
        float d_q = 0;
        for (int c = lane; c < a.d_v; c += 32) {
          d_q += after[int64_t(i) * a.d_v + c] * m.g_out[c];
          held[int64_t(i) * a.d_v + c] += a.scale * m.q[i] * m.g_out[c];
        }
        d_q = warp_sum(d_q);
        if (to.q && lane == 0) to.q.set(row, i, a.scale * d_q);
      }
      left_product(a, m, 0, held, [&](int i) { return m.k[i]; });
      if (delta) left_product(a, m, 1, before, [&](int i) { return m.decay[i] * m.k[i]; });
      if (low_rank) {
        left_product(a, m, 1, before, [&](int i) { return m.a[i]; });
        left_product(a, m, 2, held, [&](int i) { return m.b[i]; });
      }
      for (int i = w; i < a.d; i += kWarps) {
        float d_k = 0, through_known = 0, d_a = 0, d_b = 0, d_g = 0;
        for (int c = lane; c < a.d_v; c += 32) {
          float& x = held[int64_t(i) * a.d_v + c];
          const float was = before[int64_t(i) * a.d_v + c], d_value = m.beta * m.left[0][c];
          float d_decayed = x, d_before = 0;
          if (delta) {
            d_k += x * (m.v[c] - m.left[1][c]);
            through_known += m.decay[i] * was * d_value;
            d_decayed -= m.k[i] * d_value;
          } else {
            d_k += x * m.v[c];
          }
          if (low_rank) {
            d_b += x * m.left[1][c];
            d_a += was * m.left[2][c];
            d_before = m.a[i] * m.left[2][c];
          }
          const float through = m.decay[i] * d_decayed;
          d_g += through * was;
          x = d_before + through;
        }
        d_k = warp_sum(d_k);
        d_g = warp_sum(d_g);
        if (delta) d_k = m.beta * d_k - warp_sum(through_known);
        if (low_rank) {
          d_a = warp_sum(d_a);
          d_b = warp_sum(d_b);
        }
        if (lane != 0) continue;
        m.d_g[i] = d_g;
        if (to.k) to.k.set(a.ks.begin(s) + t, i, d_k);
        if (to.a) to.a.set(row, i, d_a);
        if (to.b) to.b.set(row, i, d_b);
        if (to.g && to.g_vector) to.g.set(row, i, d_g);
      }
      if (to.v)
        for (int c = threadIdx.x; c < a.d_v; c += kThreads) to.v.set(a.vs.begin(s) + t, c, m.beta * m.left[0][c]);
      __syncthreads();
      if (w == 0 && to.beta && delta) {
        float d_beta = 0;
        for (int c = lane; c < a.d_v; c += 32) d_beta += m.left[0][c] * (m.v[c] - m.left[1][c]);
        d_beta = warp_sum(d_beta);
        if (lane == 0) to.beta[row] = d_beta;
      }
      if (w == 1 && to.g && !to.g_vector) {
        float sum = 0;
        for (int i = lane; i < a.d; i += 32) sum += m.d_g[i];
        sum = warp_sum(sum);
        if (lane == 0) to.g.set(row, 0, sum);
      }
    }
  }
  if (to.state)
    for (int i = w; i < a.d; i += kWarps)
      for (int c = lane; c < a.d_v; c += 32)
        to.state[s * to.state_stride[0] + i * to.state_stride[1] + c * to.state_stride[2]] = held[int64_t(i) * a.d_v + c];
}

}  // namespace

void recur_backward(Queue& queue, const RecurInputs& in, const Recur& how, Tensor d_out, Tensor d_state,
                    const RecurGrads& grads) {
  constexpr const char* where = "recur_backward";
  const RecurView a = recur_view(where, in, how);
  require(!how.normalise, where, "there is no gradient of the normalised form");
  if (a.d_v > kMostColumns) throw Error(Code::Unsupported, where, "values of more than 512 numbers on the GPU");
  const int64_t segments_of = in.q.segments(), rows = in.q.values.size[0];
  check_tensor(where, "d_out", d_out, {rows, a.d_v});
  check_tensor(where, "d_state", d_state, {segments_of, a.d, a.d_v}, true);
  for (const Tensor& t : {grads.q, grads.k, grads.a, grads.b}) check_tensor(where, "a gradient", t, {rows, a.d}, true);
  check_tensor(where, "gradient of v", grads.v, {rows, a.d_v}, true);
  check_tensor(where, "gradient of beta", grads.beta, {rows}, true);
  check_tensor(where, "gradient of state", grads.state, {segments_of, a.d, a.d_v}, true);
  const bool vector = how.decay == Recur::Decay::Vector;
  if (vector) check_tensor(where, "gradient of g", grads.g, {rows, a.d}, true);
  else check_tensor(where, "gradient of g", grads.g, {rows}, true);
  Scratch scope(queue.scratch);
  auto states = [&](int64_t count) {
    return queue.scratch.take(Dtype::F32, {std::max<int64_t>(1, count), a.d, a.d_v}).as<float>();
  };
  Backward to{};
  to.d_out = matrix(d_out);
  to.d_state = d_state.as<float>();
  to.q = matrix(grads.q);
  to.k = matrix(grads.k);
  to.v = matrix(grads.v);
  to.g = matrix(grads.g);
  to.a = matrix(grads.a);
  to.b = matrix(grads.b);
  to.beta = grads.beta.as<float>();
  to.state = grads.state.as<float>();
  for (size_t axis = 0; axis < 3; ++axis) {
    to.d_state_stride[axis] = d_state ? d_state.stride[axis] : 0;
    to.state_stride[axis] = grads.state ? grads.state.stride[axis] : 0;
  }
  if (recur_backward_sm90_fits(a, to, rows, in.q.bound) && hopper()) {
    const Tensor scratch = queue.scratch.take(Dtype::U8, {recur_backward_sm90_scratch(a, rows)});
    check(recur_backward_sm90(a, to, rows, in.q.bound, scratch.data, cuda::stream(queue)), where);
    return;
  }
  to.g_vector = vector;
  to.starts = states(rows / kChunk + 2 * segments_of + 1);
  to.chunk = states(segments_of * (kChunk + 1));
  to.held = states(segments_of);
  launch(queue, where, recur_backward_kernel, dim3(unsigned(segments_of)), kThreads, sizeof(RowMemory), a, to);
}

}  // namespace heed::cuda
