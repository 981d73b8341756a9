// recur: which form takes a call, and the plain one, row after row: each column of the state is its own problem, so a
// block holds 32 columns in registers, eight threads to a column.
#include "kernels/cuda/recur.cuh"
#include "kernels/cuda/recur_sm90.h"

namespace heed::cuda {

RecurView recur_view(const char* where, const RecurInputs& in, const Recur& how) {
  const int64_t segments_of = in.q.segments(), rows = in.q.values.size[0], d = in.q.values.size[1],
                d_v = in.v.values.size[1];
  require(is_float(in.q.values.type) && is_float(in.k.values.type) && is_float(in.v.values.type), where,
          "q, k and v are F32, BF16 or F16");
  require(in.k.segments() == segments_of && in.v.segments() == segments_of, where, "q, k and v have the same segments");
  require(in.k.values.size[1] == d, where, "q and k differ in width");
  require(in.k.values.size[0] == rows && in.v.values.size[0] == rows, where, "q, k and v have the same rows");
  if (how.decay == Recur::Decay::Scalar) check_tensor(where, "g", in.g, {rows});
  if (how.decay == Recur::Decay::Vector) check_tensor(where, "g", in.g, {rows, d});
  if (how.correction == Recur::Correction::Delta) check_tensor(where, "beta", in.beta, {rows});
  if (how.correction == Recur::Correction::LowRank) {
    check_tensor(where, "a", in.a, {rows, d});
    check_tensor(where, "b", in.b, {rows, d});
  }
  check_tensor(where, "state", in.state, {segments_of, d, d_v}, true);
  check_tensor(where, "z", in.z, {segments_of, d}, true);
  if (d > 256) throw Error(Code::Unsupported, where, "states of more than 256 rows on the GPU");
  RecurView out{};
  out.q = matrix(in.q.values);
  out.k = matrix(in.k.values);
  out.v = matrix(in.v.values);
  out.g = matrix(in.g);
  out.a = matrix(in.a);
  out.b = matrix(in.b);
  out.qs = segments(in.q);
  out.ks = segments(in.k);
  out.vs = segments(in.v);
  out.beta = how.correction == Recur::Correction::Delta ? in.beta.as<float>() : nullptr;
  out.state = in.state.as<float>();
  out.z = in.z.as<float>();
  for (size_t axis = 0; axis < 3; ++axis) out.state_stride[axis] = in.state ? in.state.stride[axis] : 0;
  out.z_stride = in.z ? in.z.stride[0] : 0;
  out.d = int(d);
  out.d_v = int(d_v);
  out.decay = how.decay;
  out.correction = how.correction;
  out.normalise = how.normalise;
  out.scale = how.scale != 0 ? how.scale : 1 / std::sqrt(float(d));
  return out;
}

namespace {

constexpr int kColumns = 32, kLanes = 8, kThreads = kColumns * kLanes, kBatch = 8, kMostD = 256;

/// Thread (column, lane) holds rows lane, lane + 8, … of its column. Grid: column slices, segments.
template <int kPer>
__global__ void __launch_bounds__(kThreads)
    recur_kernel(const __grid_constant__ RecurView a, const __grid_constant__ RecurOut to) {
  __shared__ float q[kBatch][kMostD], k[kBatch][kMostD], decay[kBatch][kMostD], extra[2][kBatch / 2][kMostD],
      v[kBatch][kColumns], beta[kBatch];
  const int s = blockIdx.y, own = threadIdx.x / kLanes, lane = threadIdx.x % kLanes,
            column = blockIdx.x * kColumns + own, n = a.qs.length(s);
  const bool low_rank = a.correction == Recur::Correction::LowRank, delta = a.correction == Recur::Correction::Delta;
  const int batch = low_rank ? kBatch / 2 : kBatch;
  float state[kPer], z[kPer];
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    const int i = lane + kLanes * j;
    state[j] = i < a.d && column < a.d_v ? a.state_at(s, i, column) : 0;
    z[j] = a.normalise && a.z && i < a.d ? a.z[s * a.z_stride + i] : 0;
  }
  for (int t0 = 0; t0 < n; t0 += batch) {
    const int rows = min(batch, n - t0);
    const int64_t q_row = a.qs.begin(s) + t0, k_row = a.ks.begin(s) + t0, v_row = a.vs.begin(s) + t0;
    __syncthreads();
    for (int e = threadIdx.x; e < rows * kMostD; e += kThreads) {
      const int r = e / kMostD, i = e % kMostD;
      if (i >= kPer * kLanes) continue;
      const bool in = i < a.d;
      q[r][i] = in ? a.q.get(q_row + r, i) : 0;
      k[r][i] = in ? a.k.get(k_row + r, i) : 0;
      decay[r][i] = in ? a.decay_at(q_row + r, i) : 1;
      if (low_rank) {
        extra[0][r][i] = in ? a.a.get(q_row + r, i) : 0;
        extra[1][r][i] = in ? a.b.get(q_row + r, i) : 0;
      }
    }
    for (int e = threadIdx.x; e < rows * kColumns; e += kThreads) {
      const int r = e / kColumns, c = blockIdx.x * kColumns + e % kColumns;
      v[r][e % kColumns] = c < a.d_v ? a.v.get(v_row + r, c) : 0;
    }
    if (threadIdx.x < rows) beta[threadIdx.x] = delta ? a.beta[q_row + threadIdx.x] : 1;
    __syncthreads();
    for (int r = 0; r < rows; ++r) {
      float correction = 0;
      if (low_rank) {  // of the state before it decays
#pragma unroll
        for (int j = 0; j < kPer; ++j) correction += state[j] * extra[0][r][lane + kLanes * j];
        correction = warp_sum(correction, kLanes);
      }
#pragma unroll
      for (int j = 0; j < kPer; ++j) state[j] *= decay[r][lane + kLanes * j];
      float value = v[r][own];
      if (delta) {
        float known = 0;
#pragma unroll
        for (int j = 0; j < kPer; ++j) known += state[j] * k[r][lane + kLanes * j];
        value -= warp_sum(known, kLanes);
      }
      value *= beta[r];
      float result = 0, divisor = 0;
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const int i = lane + kLanes * j;
        if (low_rank) state[j] += extra[1][r][i] * correction;
        state[j] += k[r][i] * value;
        result += state[j] * q[r][i];
        if (a.normalise) {
          z[j] = decay[r][i] * z[j] + k[r][i];
          divisor += z[j] * q[r][i];
        }
      }
      result = warp_sum(result, kLanes);
      divisor = a.normalise ? warp_sum(divisor, kLanes) : 1;
      if (lane == 0 && column < a.d_v)
        to.out[(q_row + r) * to.out_stride + column] = divisor == 0 ? 0 : a.scale * result / divisor;
    }
  }
  if (to.state && column < a.d_v)
#pragma unroll
    for (int j = 0; j < kPer; ++j)
      if (lane + kLanes * j < a.d)
        to.state[s * to.state_stride[0] + (lane + kLanes * j) * to.state_stride[1] + column * to.state_stride[2]] = state[j];
}

/// z after the last row: a kernel of its own behind the other, since z may be overwritten in place.
__global__ void last_z_kernel(const __grid_constant__ RecurView a, float* to, int64_t stride) {
  const int s = blockIdx.y, c = blockIdx.x * blockDim.x + threadIdx.x, n = a.qs.length(s);
  if (c >= a.d) return;
  float z = a.normalise && a.z ? a.z[s * a.z_stride + c] : 0;
  if (a.normalise)
    for (int t = 0; t < n; ++t) z = a.decay_at(a.qs.begin(s) + t, c) * z + a.k.get(a.ks.begin(s) + t, c);
  to[s * stride + c] = z;
}

void recur_plain(Queue& queue, const char* where, const RecurView& a, const RecurOut& to) {
  const dim3 grid(unsigned(ceil_div(a.d_v, kColumns)), unsigned(a.qs.count));
  if (a.d <= 64) launch(queue, where, recur_kernel<8>, grid, kThreads, 0, a, to);
  else if (a.d <= 128) launch(queue, where, recur_kernel<16>, grid, kThreads, 0, a, to);
  else launch(queue, where, recur_kernel<32>, grid, kThreads, 0, a, to);
}

}  // namespace

void recur(Queue& queue, const RecurInputs& in, const Recur& how, Tensor out, Tensor state, Tensor z) {
  constexpr const char* where = "recur";
  const RecurView a = recur_view(where, in, how);
  const int64_t segments_of = in.q.segments();
  check_tensor(where, "out", out, {in.q.values.size[0], a.d_v});
  check_tensor(where, "state", state, {segments_of, a.d, a.d_v}, true);
  check_tensor(where, "z", z, {segments_of, a.d}, true);
  RecurOut to{out.as<float>(), out.stride[0], state.as<float>(), {}};
  for (size_t axis = 0; axis < 3; ++axis) to.state_stride[axis] = state ? state.stride[axis] : 0;
  Scratch scope(queue.scratch);
  if (recur_step_fits(a, to, in.q.bound)) {
    check(recur_step(a, to, in.q.bound, hopper(), cuda::stream(queue)), where);
  } else if (recur_sm90_fits(a, in.q.bound) && hopper()) {
    const int64_t rows = in.q.values.size[0];
    const bool direct = recur_sm90_direct_fits(a, rows);
    const Tensor scratch = queue.scratch.take(
        Dtype::U8, {std::max<int64_t>(1, direct ? recur_sm90_direct_scratch(a, rows, in.q.bound)
                                                : recur_sm90_scratch(a, rows, in.q.bound))});
    auto* run = direct ? recur_sm90_direct : recur_sm90;
    check(run(a, to, rows, in.q.bound, scratch.data, cuda::stream(queue)), where);
  } else {
    recur_plain(queue, where, a, to);
  }
  if (z)
    launch(queue, where, last_z_kernel, dim3(unsigned(ceil_div(a.d, 32)), unsigned(segments_of)), 32, 0, a,
           z.as<float>(), z.stride[0]);
}

}  // namespace heed::cuda
