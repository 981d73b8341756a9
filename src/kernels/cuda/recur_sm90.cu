// The recurrence in chunks of 64 rows on Hopper's tensor cores. Three steps: `prepare` makes of every chunk, all at
// once, what does not depend on the state (products of rows inside the chunk and, for the delta rule, the inverse of I
// + N; Yang et al. 2024); `scan` walks chunks with the state in registers. Where segments are few, each is cut into
// parts: a first scan finds what a part makes of no state, and of any state (a matrix, or decay alone), `join` hands
// states on, the second scan knows them.
//
// Numbers that are no bf16 are multiplied as two bf16, high and low, without the product of the lows: sixteen bits of
// each operand.
#include "kernels/cuda/recur_sm90_scan.cuh"

namespace heed::cuda {
namespace {

template <class K>
cudaError_t start(K kernel, dim3 grid, int threads, size_t shared, const Job& a, cudaStream_t stream) {
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (status != cudaSuccess) return status;
  kernel<<<grid, threads, shared, stream>>>(a);
  return cudaGetLastError();
}

/// Starts one of the steps: prepare, scan for what parts make of states, join, scan for outputs.
template <class F>
cudaError_t run_step(int step, const Job& a, int64_t bound, cudaStream_t stream) {
  const unsigned segments = unsigned(a.in.qs.count);
  switch (step) {
    case 0:
      return start(prepare_kernel<F>, dim3(blocks_for(ceil_div(bound, kChunk), segments), segments), 128,
                   sizeof(PrepareShared<F>), a, stream);
    case 1:
      return start(scan_kernel<F, false>, dim3(unsigned((a.slices + F::delta) * a.parts), segments), 384,
                   F::template stages<false>() * F::template stage<false>() + 64, a, stream);
    case 2: return start(join_kernel<F>, dim3(unsigned(ceil_div(a.in.d_v, kJoined)), segments), 256, 0, a, stream);
    default:
      return start(scan_kernel<F, true>, dim3(unsigned(a.slices * a.parts), segments), 384,
                   F::template stages<true>() * F::template stage<true>() + 64, a, stream);
  }
}

/// Calls `use` with the form that fits. With at most one decay a row, bf16 is rare here: it takes the form of f32.
template <class Use>
auto with_form(const RecurView& in, Use use) {
  const bool delta = in.correction == Recur::Correction::Delta, vector = in.decay == Recur::Decay::Vector;
  const bool low = in.q.type != Dtype::BF16 || in.k.type != Dtype::BF16 || in.v.type != Dtype::BF16;
  auto of = [&]<int D>() {
    if (delta) {
      if (vector) return low ? use(Form<D, true, true, true>()) : use(Form<D, true, true, false>());
      return use(Form<D, true, false, true>());
    }
    if (vector) return low ? use(Form<D, false, true, true>()) : use(Form<D, false, true, false>());
    return use(Form<D, false, false, true>());
  };
  return in.d <= 64 ? of.template operator()<64>() : of.template operator()<128>();
}

/// Whether rows of q, k and v can be read 16 bytes at a time (if they are bf16).
bool lined(const RecurView& in) {
  auto fits = [](const Matrix& m) {
    return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride % 8 == 0 && m.width % 8 == 0;
  };
  return fits(in.q) && fits(in.k) && fits(in.v);
}

struct Sizes {
  int slices, parts;
  int64_t packet, packets, local, transit;  // bytes
  int64_t total() const { return packets + local + transit; }
};

/// Parts by shapes alone: as many as make one wave of an H100's multiprocessors, of eight chunks or more.
Sizes sizes(const RecurView& in, int64_t rows, int64_t bound) {
  Sizes out{};
  out.slices = int(ceil_div(in.d_v, kSlice));
  const int64_t wave = 132 / std::max<int64_t>(1, int64_t(in.qs.count) * out.slices);
  out.parts = int(std::clamp<int64_t>(wave, 1, std::max<int64_t>(1, ceil_div(bound, kChunk) / 8)));
  out.packet = with_form(in, [&](auto form) { return decltype(form)::packet(out.slices); });
  out.packets = (rows / kChunk + in.qs.count + 1) * out.packet;
  if (out.parts > 1) {
    out.local = ceil_div(int64_t(in.qs.count) * out.parts * in.d * in.d_v * 4, 256) * 256;
    if (in.correction == Recur::Correction::Delta) out.transit = int64_t(in.qs.count) * out.parts * in.d * in.d * 4;
  }
  return out;
}

}  // namespace

bool recur_sm90_fits(const RecurView& in, int64_t bound) {
  const bool low = in.q.type != Dtype::BF16 || in.k.type != Dtype::BF16 || in.v.type != Dtype::BF16;
  return in.d > 32 && in.d <= 128 && !in.normalise && in.correction != Recur::Correction::LowRank &&
         bound >= (low ? 256 : 16);
}

int64_t recur_sm90_scratch(const RecurView& in, int64_t rows, int64_t bound) { return sizes(in, rows, bound).total(); }

cudaError_t recur_sm90(const RecurView& in, const RecurOut& to, int64_t rows, int64_t bound, void* scratch,
                       cudaStream_t stream) {
  const Sizes size = sizes(in, rows, bound);
  Job a{in, to, static_cast<uint8_t*>(scratch), size.packet, size.parts, size.slices, nullptr, nullptr, lined(in)};
  a.local = reinterpret_cast<float*>(a.packets + size.packets);
  a.transit = reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(a.local) + size.local);
  return with_form(in, [&](auto form) {
    cudaError_t status = cudaSuccess;
    for (int step = 0; step < 4 && status == cudaSuccess; ++step)
      if (a.parts > 1 || step == 0 || step == 3) status = run_step<decltype(form)>(step, a, bound, stream);
    return status;
  });
}

}  // namespace heed::cuda
