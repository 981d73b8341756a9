// The recurrence for a row or a few a segment (decoding): what counts is to read and write the state once, at the
// memory's rate.
#include "kernels/cuda/recur_sm90.h"
#include "kernels/cuda/sm90.h"

namespace heed::cuda {
namespace {

// Columns of a block, of which a lane has four neighbours: small blocks, of which several share a multiprocessor, read
// while others write.
constexpr int kWarps = 8, kStepColumns = 64, kStepLanes = kStepColumns / 4, kStepRows = 32 / kStepLanes * kWarps;

/// Rows i, i + 16, … of the state lie in half-warp i. Grid: column slices, segments.
template <int D>
__global__ void __launch_bounds__(32 * kWarps, D <= 128 ? 4 : 2)
    step_kernel(const __grid_constant__ RecurView a, const __grid_constant__ RecurOut to) {
  constexpr int kRows = D / kStepRows;
  __shared__ float q[D], k[D], decay[D], left[D], right[D], z[D];
  __shared__ float4 partial[2][kWarps][kStepLanes];
  __shared__ float dots[3][kWarps];  // of q with k, b and z
  const int s = blockIdx.y, n = a.qs.length(s), tid = threadIdx.x, warp = tid / 32, lane = tid % 32,
            row0 = tid / kStepLanes, own = lane % kStepLanes, column = blockIdx.x * kStepColumns + 4 * own;
  const bool in = column < a.d_v, delta = a.correction == Recur::Correction::Delta,
             low_rank = a.correction == Recur::Correction::LowRank;
  float4 state[kRows];
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const int i = row0 + kStepRows * j;
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
      const int i = row0 + kStepRows * j;
      const float l = left[i], e = decay[i], by = q[i];
      float4& x = state[j];
      known.x += l * x.x, known.y += l * x.y, known.z += l * x.z, known.w += l * x.w;
      x.x *= e, x.y *= e, x.z *= e, x.w *= e;
      seen.x += by * x.x, seen.y += by * x.y, seen.z += by * x.z, seen.w += by * x.w;
    }
#pragma unroll
    for (float4* x : {&known, &seen}) {
      x->x += __shfl_xor_sync(~0u, x->x, kStepLanes), x->y += __shfl_xor_sync(~0u, x->y, kStepLanes);
      x->z += __shfl_xor_sync(~0u, x->z, kStepLanes), x->w += __shfl_xor_sync(~0u, x->w, kStepLanes);
    }
    if (lane < kStepLanes) partial[0][warp][own] = known, partial[1][warp][own] = seen;
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
      const float by = k[row0 + kStepRows * j], other = right[row0 + kStepRows * j];
      float4& x = state[j];
      x.x += by * v[0] + other * corrects[0], x.y += by * v[1] + other * corrects[1];
      x.z += by * v[2] + other * corrects[2], x.w += by * v[3] + other * corrects[3];
    }
    if (tid < kStepLanes && in)
#pragma unroll
      for (int i = 0; i < 4; ++i) to.out[q_row * to.out_stride + column + i] = out[i];
    __syncthreads();
  }
  if (to.state && in)
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int i = row0 + kStepRows * j;
      if (i < a.d)
        *reinterpret_cast<float4*>(to.state + s * to.state_stride[0] + i * to.state_stride[1] + column) = state[j];
    }
}

constexpr int kStreamStages = 3;

struct StreamShared {
  float state[kStreamStages][128 * 128];
  float4 partial[2][8][32];
  float4 rows[2][128];  // q, k, decay, k times decay of a channel
  float dots[2][4];     // of q with k
  uint64_t full[kStreamStages];
};

/// One row a segment of a state of 128 × 128 that lies in one piece. A block on each multiprocessor: the copy engine
/// brings the state after next and writes the last one back meanwhile. Warp w holds rows w, w + 8, …
template <class T>
__global__ void __launch_bounds__(256, 1)
    stream_kernel(const __grid_constant__ RecurView a, const __grid_constant__ RecurOut to) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // the build also makes PTX for GPUs that lack all this; nothing starts it there
  extern __shared__ __align__(128) uint8_t memory[];
  StreamShared& sh = *reinterpret_cast<StreamShared*>(memory);
  constexpr int kRows = 16;
  constexpr uint32_t kBytes = sizeof sh.state[0];
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, step = gridDim.x, count = a.qs.count;
  const bool delta = a.correction == Recur::Correction::Delta;
  auto bring = [&](int s, int slot) {
    if (s >= count) return;
    sm90::barrier_expect(sh.full + slot, kBytes);
    sm90::bulk_load(sh.state[slot], a.state + s * a.state_stride[0], kBytes, sh.full + slot);
  };
  if (tid == 0) {
    for (int i = 0; i < kStreamStages; ++i) sm90::barrier_init(sh.full + i, 1);
    sm90::barrier_init_fence();
    for (int i = 0; i < kStreamStages - 1; ++i) bring(blockIdx.x + i * step, i);
  }
  // What a segment's row holds is fetched while the one before is worked on, where it begins one earlier still.
  int64_t q_row = 0, k_row = 0, v_row = 0, q_next = 0, k_next = 0, v_next = 0;
  bool there = false, there_next = false;
  float q = 0, k = 0, g = 0, beta = 1;
  float4 v{};
  auto find = [&](int s) {
    if (s >= count) return;
    q_next = a.qs.begin(s), k_next = a.ks.begin(s), v_next = a.vs.begin(s), there_next = a.qs.length(s) > 0;
  };
  auto fetch = [&] {
    q_row = q_next, k_row = k_next, v_row = v_next, there = there_next;
    if (!there) return;
    if (tid < 128) {
      q = to_float(a.q.row<T>(q_row)[tid]), k = to_float(a.k.row<T>(k_row)[tid]);
      if (a.decay != Recur::Decay::None) g = a.g.row<float>(q_row)[a.decay == Recur::Decay::Vector ? tid : 0];
    }
    const T* values = a.v.row<T>(v_row) + 4 * lane;
    v = {to_float(values[0]), to_float(values[1]), to_float(values[2]), to_float(values[3])};
    if (delta) beta = a.beta[q_row];
  };
  find(blockIdx.x), fetch(), find(blockIdx.x + step);
  __syncthreads();
  for (int s = blockIdx.x, i = 0; s < count; s += step, ++i) {
    const int slot = i % kStreamStages;
    float4* held = reinterpret_cast<float4*>(sh.state[slot]);
    if (tid < 128) {
      const float decay = expf(g), dot = warp_sum(q * k);
      sh.rows[i % 2][tid] = {q, k, decay, k * decay};
      if (lane == 0) sh.dots[i % 2][warp] = dot;
    }
    const float4 value = v;
    const float by = beta;
    const int64_t row = q_row;
    const bool now = there;
    if (s + step < count) fetch(), find(s + 2 * step);
    __syncthreads();
    sm90::barrier_wait(sh.full + slot, uint32_t(i / kStreamStages) & 1);
    if (now) {
      float4 state[kRows], known{0, 0, 0, 0}, seen{0, 0, 0, 0};
      const float4* rows = sh.rows[i % 2];
#pragma unroll
      for (int j = 0; j < kRows; ++j) state[j] = held[(warp + 8 * j) * 32 + lane];
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const float4 r = rows[warp + 8 * j];
        float4& x = state[j];
        known.x += r.w * x.x, known.y += r.w * x.y, known.z += r.w * x.z, known.w += r.w * x.w;
        x.x *= r.z, x.y *= r.z, x.z *= r.z, x.w *= r.z;
        seen.x += r.x * x.x, seen.y += r.x * x.y, seen.z += r.x * x.z, seen.w += r.x * x.w;
      }
      sh.partial[0][warp][lane] = known, sh.partial[1][warp][lane] = seen;
      __syncthreads();
      float4 corrects{0, 0, 0, 0}, out{0, 0, 0, 0};
#pragma unroll
      for (int w = 0; w < 8; ++w) {
        const float4 x = sh.partial[0][w][lane], y = sh.partial[1][w][lane];
        corrects.x += x.x, corrects.y += x.y, corrects.z += x.z, corrects.w += x.w;
        out.x += y.x, out.y += y.y, out.z += y.z, out.w += y.w;
      }
      const float with = delta ? 1 : 0, qk = sh.dots[i % 2][0] + sh.dots[i % 2][1] + sh.dots[i % 2][2] + sh.dots[i % 2][3];
      const float4 added = {by * (value.x - with * corrects.x), by * (value.y - with * corrects.y),
                            by * (value.z - with * corrects.z), by * (value.w - with * corrects.w)};
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const float k_of = rows[warp + 8 * j].y;
        const float4 x = state[j];
        held[(warp + 8 * j) * 32 + lane] = {x.x + k_of * added.x, x.y + k_of * added.y, x.z + k_of * added.z,
                                            x.w + k_of * added.w};
      }
      if (warp == 0)
        *reinterpret_cast<float4*>(to.out + row * to.out_stride + 4 * lane) = {
            a.scale * (out.x + qk * added.x), a.scale * (out.y + qk * added.y), a.scale * (out.z + qk * added.z),
            a.scale * (out.w + qk * added.w)};
    }
    sm90::proxy_fence();
    __syncthreads();
    if (tid == 0) {
      sm90::bulk_store(to.state + s * to.state_stride[0], held, kBytes);
      sm90::bulk_wait_read<1>();  // the state before this one has left its stage
      bring(s + (kStreamStages - 1) * step, (i + kStreamStages - 1) % kStreamStages);
    }
  }
  if (tid == 0) sm90::bulk_wait();
#endif
}

/// The step for decoding of many heads: enough states for every multiprocessor to have several.
bool streams(const RecurView& in, const RecurOut& to, int64_t bound) {
  auto one_piece = [](const float* data, const int64_t(&stride)[3]) {
    return data && reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride[2] == 1 && stride[1] == 128 && stride[0] % 4 == 0;
  };
  return bound == 1 && in.d == 128 && in.d_v == 128 && in.qs.count >= 264 && !in.normalise &&
         in.correction != Recur::Correction::LowRank && in.q.type == in.k.type && in.q.type == in.v.type &&
         reinterpret_cast<uintptr_t>(to.out) % 16 == 0 && to.out_stride % 4 == 0 &&
         one_piece(in.state, in.state_stride) && one_piece(to.state, to.state_stride);
}

template <class T>
cudaError_t stream_states(const RecurView& in, const RecurOut& to, cudaStream_t queue) {
  const int shared = sizeof(StreamShared);
  int device, blocks;
  cudaError_t status = cudaFuncSetAttribute(stream_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (status == cudaSuccess) status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  stream_kernel<T><<<unsigned(blocks), 256, shared, queue>>>(in, to);
  return cudaGetLastError();
}

bool fours(const float* data, const int64_t (&stride)[3]) {
  return !data ||
         (reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride[2] == 1 && stride[0] % 4 == 0 && stride[1] % 4 == 0);
}

}  // namespace

bool recur_step_fits(const RecurView& in, const RecurOut& to, int64_t bound) {
  return bound < 16 && in.d_v % 4 == 0 && fours(in.state, in.state_stride) && fours(to.state, to.state_stride);
}

cudaError_t recur_step(const RecurView& in, const RecurOut& to, int64_t bound, bool on_hopper, cudaStream_t queue) {
  const dim3 grid(unsigned(ceil_div(in.d_v, kStepColumns)), unsigned(in.qs.count));
  if (grid.x == 0 || grid.y == 0) return cudaSuccess;
  if (on_hopper && streams(in, to, bound))
    return in.q.type == Dtype::BF16  ? stream_states<__nv_bfloat16>(in, to, queue)
           : in.q.type == Dtype::F16 ? stream_states<__half>(in, to, queue)
                                     : stream_states<float>(in, to, queue);
  auto* kernel = in.d <= 64 ? step_kernel<64> : in.d <= 128 ? step_kernel<128> : step_kernel<256>;
  kernel<<<grid, 32 * kWarps, 0, queue>>>(in, to);
  return cudaGetLastError();
}

}  // namespace heed::cuda
