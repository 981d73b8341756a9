// Starts the forms of recur_sm90_direct.cuh: one walk, or where segments are few one for what parts make of states and one
// for outputs.
#include "kernels/cuda/recur_sm90_direct.cuh"

namespace heed::cuda {
namespace {

struct DirectSizes {
  int slices, parts;
  int64_t local, transit, decays;  // bytes
  int64_t total() const { return local + transit + decays; }
};

/// Parts by shapes alone: as many as make one wave of an H100's multiprocessors, of eight chunks or more.
DirectSizes direct_sizes(const RecurView& in, int64_t bound) {
  DirectSizes out{};
  out.slices = int(ceil_div(in.d_v, kSlice));
  const int64_t wave = 132 / std::max<int64_t>(1, int64_t(in.qs.count) * out.slices), d = in.d <= 64 ? 64 : 128;
  out.parts = int(std::clamp<int64_t>(wave, 1, std::max<int64_t>(1, ceil_div(bound, kChunk) / 8)));
  if (out.parts > 1) {
    const int64_t pieces = int64_t(in.qs.count) * out.parts;
    out.local = pieces * out.slices * kSlice * d * 4;
    if (in.correction == Recur::Correction::Delta) out.transit = pieces * 2 * d * d * 2;
    out.decays = ceil_div(pieces * 4, 256) * 256;
  }
  return out;
}

template <class P>
cudaError_t walk_with(const Direct& a, cudaStream_t stream) {
  const cudaError_t status = cudaFuncSetAttribute(direct_kernel<P>, cudaFuncAttributeMaxDynamicSharedMemorySize, P::shared);
  if (status != cudaSuccess) return status;
  const int slices = a.slices + (P::delta && !P::out);
  direct_kernel<P><<<dim3(unsigned(slices * a.parts), unsigned(a.in.qs.count)), 384, P::shared, stream>>>(a);
  return cudaGetLastError();
}

template <int D>
cudaError_t direct_step(const Direct& a, bool out, cudaStream_t stream) {
  if (a.in.correction == Recur::Correction::Delta)
    return out ? walk_with<Plan<D, true, true>>(a, stream) : walk_with<Plan<D, true, false>>(a, stream);
  return out ? walk_with<Plan<D, false, true>>(a, stream) : walk_with<Plan<D, false, false>>(a, stream);
}

bool direct_job(Direct& a, const RecurView& in, const RecurOut& to, int64_t rows, int64_t bound, void* scratch) {
  const DirectSizes size = direct_sizes(in, bound);
  a.in = in, a.to = to, a.parts = size.parts, a.slices = size.slices;
  uint8_t* at = static_cast<uint8_t*>(scratch);
  a.local = reinterpret_cast<float4*>(at);
  a.transit = at + size.local;
  a.decays = reinterpret_cast<float*>(at + size.local + size.transit);
  auto map = [&](CUtensorMap& map, const Matrix& m) {
    return sm90::make_map(map, static_cast<const __nv_bfloat16*>(m.data), rows, m.width, m.stride, kChunk);
  };
  return map(a.q, in.q) && map(a.k, in.k) && map(a.v, in.v);
}

}  // namespace

bool recur_sm90_direct_fits(const RecurView& in, int64_t rows) {
  auto fits = [&](const Matrix& m) {
    return m.type == Dtype::BF16 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride % 8 == 0 &&
           rows < int64_t(1) << 31;
  };
  return rows > 0 && in.decay != Recur::Decay::Vector && fits(in.q) && fits(in.k) && fits(in.v) && sm90::encode_tiled();
}

int64_t recur_sm90_direct_scratch(const RecurView& in, int64_t bound) { return direct_sizes(in, bound).total(); }

cudaError_t recur_sm90_direct(const RecurView& in, const RecurOut& to, int64_t rows, int64_t bound, void* scratch,
                              cudaStream_t stream) {
  Direct a;
  if (!direct_job(a, in, to, rows, bound, scratch)) return cudaErrorInvalidValue;
  auto step = [&](bool out) {
    return in.d <= 64 ? direct_step<64>(a, out, stream) : direct_step<128>(a, out, stream);
  };
  const cudaError_t status = a.parts > 1 ? step(false) : cudaSuccess;
  return status == cudaSuccess ? step(true) : status;
}

}  // namespace heed::cuda
