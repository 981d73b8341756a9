// Starts the gradient's chunked form: numbers of rows and inverses of the delta rule, the two walks, gradients of blocks of
// rows.
#include <utility>

#include "kernels/cuda/recur_backward_sm90_blocks.cuh"

namespace heed::cuda {
namespace {

struct BackwardSizes {
  int64_t held, inverse, norms, numbers;  // bytes; held: of one array of blocks
  bool delta;
  int64_t total() const { return (delta ? 5 : 3) * held + inverse + norms + numbers; }
};

BackwardSizes backward_sizes(const RecurView& in, int64_t rows) {
  const bool delta = in.correction == Recur::Correction::Delta;
  const int64_t chunks = rows / kChunk + in.qs.count + 1;
  const bool numbers = delta || in.decay == Recur::Decay::Scalar;
  return {(rows / kBlock + in.qs.count + 1) * kHeld, delta ? chunks * 2 * kPanel : 0,
          delta ? ceil_div(chunks, 64) * 256 : 0, numbers ? chunks * kNumbers * 4 : 0, delta};
}

/// Whether the copy engine can read and write rows of f32.
bool f32_lined(const Matrix& m) {
  return m && reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride % 4 == 0 && m.stride >= m.width;
}

bool backward_job(Back& a, const RecurView& in, const RecurBackward& to, int64_t rows, void* scratch) {
  const BackwardSizes size = backward_sizes(in, rows);
  a.in = in, a.to = to;
  uint8_t* at = static_cast<uint8_t*>(scratch);
  auto next = [&](int64_t bytes) { return std::exchange(at, at + bytes); };
  a.states = next(size.held), a.d_states = next(size.held), a.d_outs = next(size.held);
  a.values = a.d_values = nullptr;
  if (size.delta) a.values = next(size.held), a.d_values = next(size.held);
  a.inverse = next(size.inverse), next(size.norms);
  a.numbers = size.numbers ? reinterpret_cast<float*>(next(size.numbers)) : nullptr;
  auto map = [&](CUtensorMap& map, const Matrix& m) {
    return sm90::make_map(map, static_cast<const __nv_bfloat16*>(m.data), rows, m.width, m.stride, kChunk);
  };
  auto lined = [&](CUtensorMap& map, const Matrix& m) {
    return f32_lined(m) && f32_map(map, static_cast<const float*>(m.data), rows, m.width, m.stride, kChunk);
  };
  a.lined_q = lined(a.d_q, to.q), a.lined_k = lined(a.d_k, to.k), a.lined_v = lined(a.d_v, to.v);
  return map(a.q, in.q) && map(a.k, in.k) && map(a.v, in.v) && lined(a.d_out, to.d_out);
}

template <class K>
cudaError_t start(K kernel, dim3 grid, int threads, int shared, const auto& a, cudaStream_t stream) {
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (status != cudaSuccess) return status;
  kernel<<<grid, threads, shared, stream>>>(a);
  return cudaGetLastError();
}

/// Step 0: numbers of rows and inverses; 1: walks; 2: gradients of blocks.
cudaError_t backward_step(const Back& a, int step, int64_t rows, int64_t bound, cudaStream_t stream) {
  const bool delta = a.in.correction == Recur::Correction::Delta;
  const unsigned segments = unsigned(a.in.qs.count);
  auto blocks = [&](int64_t most, int64_t items) {
    return dim3(unsigned(std::min(std::max<int64_t>(1, most / segments), ceil_div(bound, items))), segments);
  };
  if (step == 0) {
    if (a.numbers) numbers_kernel<<<blocks(4 * 132, 8 * kChunk), 256, 0, stream>>>(a);
    if (!delta) return cudaGetLastError();
    Direct of{};
    of.in = a.in, of.k = a.k, of.inverse = const_cast<uint8_t*>(a.inverse);
    of.norms = reinterpret_cast<float*>(of.inverse + backward_sizes(a.in, rows).inverse);
    return start(inverse_kernel<128>, blocks(4 * 132, kChunk), 128, int(sizeof(InverseShared<128>)), of, stream);
  }
  if (step == 1)
    return delta ? start(walk_kernel<WalkLayout<true>>, dim3(4, segments), 384, WalkLayout<true>::shared, a, stream)
                 : start(walk_kernel<WalkLayout<false>>, dim3(8, segments), 384, WalkLayout<false>::shared, a, stream);
  const dim3 grid = blocks(132, kBlock);
  auto run = [&](auto kernel) { return start(kernel, grid, 384, Slots::shared, a, stream); };
  if (a.in.decay == Recur::Decay::Scalar || a.to.g)
    return delta ? run(blocks_kernel<true, true>) : run(blocks_kernel<false, true>);
  return delta ? run(blocks_kernel<true, false>) : run(blocks_kernel<false, false>);
}

}  // namespace

bool recur_backward_sm90_fits(const RecurView& in, const RecurBackward& to, int64_t rows, int64_t bound) {
  auto fits = [](const Matrix& m) {
    return m.type == Dtype::BF16 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride % 8 == 0 && m.stride >= m.width;
  };
  return in.d > 32 && in.d <= 128 && in.d_v <= 128 && !in.normalise && in.correction != Recur::Correction::LowRank &&
         in.decay != Recur::Decay::Vector && bound >= 16 && rows > 0 && rows < int64_t(1) << 31 && in.qs.count > 0 &&
         in.qs.count < 65536 && fits(in.q) && fits(in.k) && fits(in.v) && f32_lined(to.d_out) && sm90::encode_tiled();
}

int64_t recur_backward_sm90_scratch(const RecurView& in, int64_t rows) { return backward_sizes(in, rows).total(); }

cudaError_t recur_backward_sm90(const RecurView& in, const RecurBackward& to, int64_t rows, int64_t bound,
                                void* scratch, cudaStream_t stream) {
  Back a;
  if (!backward_job(a, in, to, rows, scratch)) return cudaErrorInvalidValue;
  cudaError_t status = cudaSuccess;
  for (int step = 0; step < 3 && status == cudaSuccess; ++step) status = backward_step(a, step, rows, bound, stream);
  return status;
}

}  // namespace heed::cuda
