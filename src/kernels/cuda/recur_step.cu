// The recurrence for a row or a few a segment (decoding): what counts is to read and write the state once, at the
// memory's rate.
#include "kernels/cuda/recur_sm90.h"

namespace heed::cuda {
namespace {

// Columns of a block, of which a lane has four neighbours: small blocks, of which several share a multiprocessor, read
// while others write.
constexpr int kWarps = 8, kStepColumns = 64, kLanes = kStepColumns / 4, kAtOnce = 32 / kLanes * kWarps;

/// Rows i, i + 16, … of the state lie in half-warp i. Grid: column slices, segments.
template <int D>
__global__ void __launch_bounds__(32 * kWarps, D <= 128 ? 4 : 2)
    step_kernel(const __grid_constant__ RecurView a, const __grid_constant__ RecurOut to) {
  constexpr int kRows = D / kAtOnce;
  __shared__ float q[D], k[D], decay[D], left[D], right[D], z[D];
  __shared__ float4 partial[2][kWarps][kLanes];
  __shared__ float dots[3][kWarps];  // of q with k, b and z
  const int s = blockIdx.y, n = a.qs.length(s), tid = threadIdx.x, warp = tid / 32, lane = tid % 32,
            row0 = tid / kLanes, own = lane % kLanes, column = blockIdx.x * kStepColumns + 4 * own;
  const bool in = column < a.d_v, delta = a.correction == Recur::Correction::Delta,
             low_rank = a.correction == Recur::Correction::LowRank;
  float4 state[kRows];
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const int i = row0 + kAtOnce * j;
    state[j] = a.state && in && i < a.d
                   ? *reinterpret_cast<const float4*>(a.state + s * a.state_stride[0] + i * a.state_stride[1] + column)
                   : float4{0, 0, 0, 0};
  }
  if (tid < D) z[tid] = a.normalise && a.z && tid < a.d ? a.z[s * a.z_stride + tid] : 0;
  for (int t = 0; t < n; ++t) {
    const int64_t q_row = a.qs.begin(s) + t, k_row = a.ks.begin(s) + t, v_row = a.vs.begin(s) + t;
    float dot[3] = {};
    if (tid < D) {
      const bool there = tid < a.d;
      q[tid] = there ? a.q.get(q_row, tid) : 0;
      k[tid] = there ? a.k.get(k_row, tid) : 0;
      decay[tid] = there ? a.decay_at(q_row, tid) : 1;
      left[tid] = low_rank && there ? a.a.get(q_row, tid) : delta ? k[tid] * decay[tid] : 0;
      right[tid] = low_rank && there ? a.b.get(q_row, tid) : 0;
      z[tid] = decay[tid] * z[tid] + k[tid];
      dot[0] = q[tid] * k[tid], dot[1] = q[tid] * right[tid], dot[2] = q[tid] * z[tid];
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      dot[i] = warp_sum(dot[i]);
      if (lane == 0) dots[i][warp] = dot[i];
    }
    float v[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = in ? a.v.get(v_row, column + i) : 0;
    const float beta = delta ? a.beta[q_row] : 1;
    __syncthreads();
    float4 known{0, 0, 0, 0}, seen{0, 0, 0, 0};  // the state times what corrects it, and times q behind its decay
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int i = row0 + kAtOnce * j;
      const float l = left[i], e = decay[i], by = q[i];
      float4& x = state[j];
      known.x += l * x.x, known.y += l * x.y, known.z += l * x.z, known.w += l * x.w;
      x.x *= e, x.y *= e, x.z *= e, x.w *= e;
      seen.x += by * x.x, seen.y += by * x.y, seen.z += by * x.z, seen.w += by * x.w;
    }
#pragma unroll
    for (float4* x : {&known, &seen}) {
      x->x += __shfl_xor_sync(~0u, x->x, kLanes), x->y += __shfl_xor_sync(~0u, x->y, kLanes);
      x->z += __shfl_xor_sync(~0u, x->z, kLanes), x->w += __shfl_xor_sync(~0u, x->w, kLanes);
    }
    if (lane < kLanes) partial[0][warp][own] = known, partial[1][warp][own] = seen;
    __syncthreads();
    float corrects[4] = {}, out[4] = {}, qk = 0, qb = 0, qz = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float4 x = partial[0][w][own], y = partial[1][w][own];
      corrects[0] += x.x, corrects[1] += x.y, corrects[2] += x.z, corrects[3] += x.w;
      out[0] += y.x, out[1] += y.y, out[2] += y.z, out[3] += y.w;
      qk += dots[0][w], qb += dots[1][w], qz += dots[2][w];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (delta) v[i] = beta * (v[i] - corrects[i]), corrects[i] = 0;
      out[i] = a.scale * (out[i] + qk * v[i] + qb * corrects[i]);
      if (a.normalise) out[i] = qz == 0 ? 0 : out[i] / qz;
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const float by = k[row0 + kAtOnce * j], other = right[row0 + kAtOnce * j];
      float4& x = state[j];
      x.x += by * v[0] + other * corrects[0], x.y += by * v[1] + other * corrects[1];
      x.z += by * v[2] + other * corrects[2], x.w += by * v[3] + other * corrects[3];
    }
    if (tid < kLanes && in)
#pragma unroll
      for (int i = 0; i < 4; ++i) to.out[q_row * to.out_stride + column + i] = out[i];
    __syncthreads();
  }
  if (to.state && in)
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int i = row0 + kAtOnce * j;
      if (i < a.d)
        *reinterpret_cast<float4*>(to.state + s * to.state_stride[0] + i * to.state_stride[1] + column) = state[j];
    }
}

bool fours(const float* data, const int64_t (&stride)[3]) {
  return !data ||
         (reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride[2] == 1 && stride[0] % 4 == 0 && stride[1] % 4 == 0);
}

}  // namespace

bool recur_step_fits(const RecurView& in, const RecurOut& to, int64_t bound) {
  return bound < 16 && in.d_v % 4 == 0 && fours(in.state, in.state_stride) && fours(to.state, to.state_stride);
}

cudaError_t recur_step(const RecurView& in, const RecurOut& to, cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(in.d_v, kStepColumns)), unsigned(in.qs.count));
  if (grid.x == 0 || grid.y == 0) return cudaSuccess;
  auto* kernel = in.d <= 64 ? step_kernel<64> : in.d <= 128 ? step_kernel<128> : step_kernel<256>;
  kernel<<<grid, 32 * kWarps, 0, stream>>>(in, to);
  return cudaGetLastError();
}

}  // namespace heed::cuda
