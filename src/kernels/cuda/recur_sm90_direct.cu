// Starts the forms of recur_sm90_direct.cuh: inverses of the delta rule, then one walk, or where segments are few one for
// what parts make of states and one for outputs.
#include "kernels/cuda/recur_sm90_decay.cuh"
#include "kernels/cuda/recur_sm90_inverse.cuh"

namespace heed::cuda {
namespace {

struct DirectSizes {
  int slices, parts;
  int64_t inverse = 0, norms = 0, local = 0, transit = 0, decays = 0, forgets = 0;  // bytes
  int64_t total() const { return inverse + norms + local + transit + decays + forgets; }
};

/// Channels that the forms have.
int padded(const RecurView& in) { return in.d <= 64 && in.decay != Recur::Decay::Vector ? 64 : 128; }

/// Parts by shapes alone: as many as make one wave of an H100's multiprocessors, of eight chunks or more.
DirectSizes direct_sizes(const RecurView& in, int64_t rows, int64_t bound) {
  DirectSizes out{};
  out.slices = int(ceil_div(in.d_v, kSlice));
  const int64_t wave = 132 / std::max<int64_t>(1, int64_t(in.qs.count) * out.slices), d = padded(in);
  out.parts = int(std::clamp<int64_t>(wave, 1, std::max<int64_t>(1, ceil_div(bound, kChunk) / 8)));
  const bool delta = in.correction == Recur::Correction::Delta;
  if (delta) {
    const int64_t chunks = rows / kChunk + in.qs.count + 1;
    out.inverse = chunks * 2 * kPanel, out.norms = ceil_div(chunks, 64) * 256;
  }
  if (out.parts > 1) {
    const int64_t pieces = int64_t(in.qs.count) * out.parts;
    out.local = pieces * out.slices * kSlice * d * 4;
    if (delta) out.transit = pieces * 2 * d * d * 2, out.forgets = pieces * 4;
    out.decays = pieces * d * 4;
  }
  return out;
}

template <class P>
cudaError_t walk_with(const Direct& a, cudaStream_t stream) {
  const cudaError_t status = cudaFuncSetAttribute(direct_kernel<P>, cudaFuncAttributeMaxDynamicSharedMemorySize, P::shared);
  if (status != cudaSuccess) return status;
  const int slices = a.slices + (P::delta && !P::out);
  direct_kernel<P><<<dim3(unsigned(slices * a.parts), unsigned(a.in.qs.count)), 256 + P::makers, P::shared, stream>>>(a);
  return cudaGetLastError();
}

/// Step 0: inverses; 1: what parts make of states; 2: outputs. Those that the job does not need do nothing.
template <int D>
cudaError_t direct_step(const Direct& a, int step, int64_t bound, cudaStream_t stream) {
  const bool delta = a.in.correction == Recur::Correction::Delta;
  if constexpr (D == 128)
    if (a.in.decay == Recur::Decay::Vector) {
      if (step == 2) return walk_with<Layout<D, false, true, true>>(a, stream);
      return step == 1 && a.parts > 1 ? walk_with<Layout<D, false, false, true>>(a, stream) : cudaSuccess;
    }
  if (step == 2)
    return delta ? walk_with<Layout<D, true, true>>(a, stream) : walk_with<Layout<D, false, true>>(a, stream);
  if (step == 1 && a.parts > 1)
    return delta ? walk_with<Layout<D, true, false>>(a, stream) : walk_with<Layout<D, false, false>>(a, stream);
  if (step == 1 || !delta) return cudaSuccess;
  constexpr int kShared = sizeof(InverseShared<D>);
  const cudaError_t status = cudaFuncSetAttribute(inverse_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (status != cudaSuccess) return status;
  const unsigned segments = unsigned(a.in.qs.count);
  const int64_t wave = std::max<int64_t>(1, 4 * 132 / segments);
  inverse_kernel<D><<<dim3(unsigned(std::min(wave, ceil_div(bound, kChunk))), segments), 128, kShared, stream>>>(a);
  return cudaGetLastError();
}

bool direct_job(Direct& a, const RecurView& in, const RecurOut& to, int64_t rows, int64_t bound, void* scratch) {
  const DirectSizes size = direct_sizes(in, rows, bound);
  a.in = in, a.to = to, a.parts = size.parts, a.slices = size.slices;
  uint8_t* at = static_cast<uint8_t*>(scratch);
  a.inverse = at, at += size.inverse;
  a.norms = reinterpret_cast<float*>(at), at += size.norms;
  a.local = reinterpret_cast<float4*>(at), at += size.local;
  a.transit = at, at += size.transit;
  a.decays = reinterpret_cast<float*>(at), at += size.decays;
  a.forgets = reinterpret_cast<float*>(at);
  a.out_lined = reinterpret_cast<uintptr_t>(to.out) % 16 == 0 && to.out_stride % 4 == 0 &&
                f32_map(a.out, to.out, rows, in.d_v, to.out_stride, 32);
  auto map = [&](CUtensorMap& map, const Matrix& m) {
    return sm90::make_map(map, static_cast<const __nv_bfloat16*>(m.data), rows, m.width, m.stride, kChunk);
  };
  return map(a.q, in.q) && map(a.k, in.k) && map(a.v, in.v);
}

}  // namespace

bool recur_sm90_direct_fits(const RecurView& in, int64_t rows) {
  auto fits = [&](const Matrix& m) {
    return m.type == Dtype::BF16 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride % 8 == 0 &&
           m.stride >= m.width && rows < int64_t(1) << 31;
  };
  const bool vector = in.decay == Recur::Decay::Vector;
  if (vector && (in.correction == Recur::Correction::Delta || in.d % 2 != 0 || in.g.stride % 2 != 0 ||
                 reinterpret_cast<uintptr_t>(in.g.data) % 8 != 0))
    return false;
  return rows > 0 && fits(in.q) && fits(in.k) && fits(in.v) && sm90::encode_tiled();
}

int64_t recur_sm90_direct_scratch(const RecurView& in, int64_t rows, int64_t bound) {
  return direct_sizes(in, rows, bound).total();
}

cudaError_t recur_sm90_direct(const RecurView& in, const RecurOut& to, int64_t rows, int64_t bound, void* scratch,
                              cudaStream_t stream) {
  Direct a;
  if (!direct_job(a, in, to, rows, bound, scratch)) return cudaErrorInvalidValue;
  cudaError_t status = cudaSuccess;
  for (int step = 0; step < 3 && status == cudaSuccess; ++step)
    status = padded(in) == 64 ? direct_step<64>(a, step, bound, stream) : direct_step<128>(a, step, bound, stream);
  return status;
}

}  // namespace heed::cuda
