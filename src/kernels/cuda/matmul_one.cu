// Products of one token. Bound by reading the weights, so reading never stops: every warp owns a ring in shared memory that
// it keeps full, and fills it before the kernels in front are done (weights are nobody's output), while their little work
// would leave the memory idle. Each block rounds x to 8 bits for itself.
#include "kernels/cuda/matmul.cuh"

namespace heed::cuda {
namespace {

/// Two such blocks fit on a multiprocessor, of one kernel or of two, so that the second may read ahead: their threads, and
/// bytes of a warp's ring.
constexpr int kWarps = 12, kRingBytes = 7168;
constexpr int kMostParts = 3;

/// A warp multiplies two rows at a time, piece by piece; half of its lanes take each.
template <Dtype kType> struct Pieces {
  static constexpr bool kBlocks = is_block(kType);
  static constexpr int kBlock = info(kType).block, kBytes = info(kType).bytes;
  /// Runs of 32 that a lane takes of a piece: two, which share bytes in blocks of 256.
  static constexpr int kRuns = kType == Dtype::Q8_0 ? 1 : 2, kPieceRuns = 16 * kRuns;
  static constexpr int kColumns = kBlocks ? 32 * kPieceRuns : 256;
  static constexpr int kPiece = kColumns / kBlock * kBytes;
  /// Pieces are copied in units of 16 bytes and begin anywhere in the first, or at it; four bytes behind them may be read.
  static constexpr bool kAnywhere = kBlocks && kBytes % 16 != 0;
  static constexpr int kUnits = (kPiece + 15) / 16 + kAnywhere;
  static constexpr int kSlot = 16 * (kUnits + kBlocks), kStages = kRingBytes / (2 * kSlot);
  static_assert(kStages >= 2);

  /// Of a piece, the run that a lane takes first or second.
  __device__ static unsigned run_at(unsigned lane, unsigned which) {
    if (kRuns == 1) return lane;
    return kType == Dtype::Q6_K ? lane / 2 * 4 + lane % 2 + 2 * which : 2 * lane + which;
  }
};

struct One {
  struct Part {
    const uint8_t* w;
    int64_t row_bytes;
    const float* bias;
    float* y;
    int outputs, pairs;
  } part[kMostParts];  // matrices of one type
  const float* x;
  int width, parts, pairs;
  bool accumulate, glu;  // glu: parts 0 and 1 are gate and up, y is part 0's
  Activation activation;
};

/// Row `half` of a pair: two rows of one part (the last may be there twice), or gate and up.
struct Row {
  const One::Part* part;
  int number;
  bool again;
};
__device__ inline Row row_of(const One& a, int pair, int half) {
  if (a.glu) return {a.part + half, pair, half == 1};
  const One::Part* part = a.part;
  while (pair >= part->pairs) pair -= part++->pairs;
  const bool again = 2 * pair + half >= part->outputs;
  return {part, 2 * pair + (again ? 0 : half), again};
}

/// What x is to a piece, rounded to 8 bits, runs in the order in which lanes take them: zeros past the row's end.
template <Dtype kType> struct Rounded {
  static constexpr int kRuns = Pieces<kType>::kPieceRuns;
  int4 low[kRuns], high[kRuns];  // codes 0 … 15 and 16 … 31 of each run
  float scale[kRuns];
  float sum[kHalves<kType> ? 2 : 1][kRuns];  // as dot wants them
};

/// Eight lanes a run of 32; the rounding of quantise_kernel.
template <Dtype kType> __device__ inline void round_runs(const float* x, int runs, int pieces, Rounded<kType>* to) {
  using P = Pieces<kType>;
  const int eighth = threadIdx.x % 8;
#pragma unroll 4
  for (int at = threadIdx.x / 8; at < pieces * P::kPieceRuns; at += 4 * kWarps) {
    const int place = at % P::kPieceRuns, run = at - place + int(P::run_at(place % 16, place / 16));
    float4 v = {};
    if (run < runs) {
      const float* from = x + 32 * run + 4 * eighth;
      v = {from[0], from[1], from[2], from[3]};
    }
    const float most = warp_max(fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))), 8);
    const float by = most > 0 ? __fdividef(127, most) : 0, scale = most * (1.0f / 127);
    const int c0 = __float2int_rn(v.x * by), c1 = __float2int_rn(v.y * by), c2 = __float2int_rn(v.z * by),
              c3 = __float2int_rn(v.w * by);
    const int sum = warp_sum(c0 + c1 + c2 + c3, 4), all = sum + __shfl_xor_sync(~0u, sum, 4);
    Rounded<kType>& piece = to[at / P::kPieceRuns];
    reinterpret_cast<int*>(eighth < 4 ? piece.low + place : piece.high + place)[eighth % 4] = (c0 & 255) | (c1 & 255) << 8 |
                                                                                              (c2 & 255) << 16 | c3 << 24;
    if (eighth == 0) piece.scale[place] = scale;
    if constexpr (kHalves<kType>) {
      if (eighth % 4 == 0) piece.sum[eighth / 4][place] = scale * float(sum);
    } else {
      if (eighth == 0) piece.sum[0][place] = scale * float(all);
    }
  }
}

/// 16 bytes to shared memory without waiting; of `from` only the first `bytes` are read, the rest are zeros.
__device__ inline void copy16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))),
               "l"(from), "r"(bytes)
               : "memory");
}

template <Dtype kType>
__global__ void __launch_bounds__(32 * kWarps, 2) one_kernel(const __grid_constant__ One a) {
#if __CUDA_ARCH__ >= 800
  using P = Pieces<kType>;
  extern __shared__ __align__(128) uint8_t shared[];
  const int warp = threadIdx.x / 32, half = threadIdx.x / 16 % 2, lane = threadIdx.x % 16;
  uint8_t* const ring = shared + (2 * warp + half) * P::kStages * P::kSlot;
  void* const x_at = shared + 2 * kWarps * P::kStages * P::kSlot;

  const int pieces = (a.width + P::kColumns - 1) / P::kColumns, row_length = a.width / P::kBlock * P::kBytes;
  // Pairs are dealt to blocks one by one, so that no multiprocessor has more than another.
  const int first = int(blockIdx.x + gridDim.x * warp), stride = int(gridDim.x * kWarps);
  const auto row_at = [](const Row& row) { return row.part->w + row.number * row.part->row_bytes; };

  // Each half of the warp copies its own row's pieces, a lane every sixteenth unit.
  int next = first, next_left = -16 * lane,
      next_offset = 0;  // bytes of the row left, less this lane's first; where it begins in a unit
  const uint8_t* next_from = nullptr;
  const auto fetch = [&](int slot) {
    if (next < a.pairs) {
      if (next_left <= -16 * lane) {
        const Row row = row_of(a, next, half);
        next_from = row_at(row) + 16 * lane, next_left = row_length - 16 * lane;
        if (P::kAnywhere) next_offset = int(reinterpret_cast<uint64_t>(row_at(row)) & 15);
      }
      const int offset = P::kAnywhere ? next_offset : 0, left = offset + min(P::kPiece - 16 * lane, next_left);
      uint8_t* to = ring + slot + 16 * lane;
      const uint8_t* from = next_from - offset;
#pragma unroll
      for (int i = 0; i < P::kUnits * 16; i += 256)
        if (left > i) copy16(to + i, from + i, P::kAnywhere ? min(16, left - i) : 16);
      next_from += P::kPiece;
      next_left -= P::kPiece;
      if (P::kAnywhere) next_offset = (next_offset + P::kPiece) & 15;
      if (next_left <= -16 * lane) next += stride;
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };

  // Plain numbers may be what the kernel before computes; blocks never are.
  if constexpr (!P::kBlocks) await();
#pragma unroll
  for (int s = 0; s < P::kStages - 1; ++s) fetch(s * P::kSlot);
  if constexpr (P::kBlocks) await();

  const int runs = a.width / 32;
  Rounded<kType>* const rounded = static_cast<Rounded<kType>*>(x_at);
  float* const plain = static_cast<float*>(x_at);
  if constexpr (P::kBlocks) round_runs<kType>(a.x, runs, pieces, rounded);
  else
    for (int c = threadIdx.x; c < a.width; c += 32 * kWarps) plain[c] = a.x[c];
  __syncthreads();

  int slot = 0, before = (P::kStages - 1) * P::kSlot;  // this piece's, and that of the piece before: free again
  for (int pair = first; pair < a.pairs; pair += stride) {
    const Row row = row_of(a, pair, half);
    int offset = P::kAnywhere ? int(reinterpret_cast<uint64_t>(row_at(row)) & 15) : 0;
    float sum = 0;
    for (int piece = 0; piece < pieces; ++piece) {
      fetch(before);
      asm volatile("cp.async.wait_group %0;" ::"n"(P::kStages - 1) : "memory");
      __syncwarp();
      const uint8_t* at = ring + slot + offset;
      if constexpr (P::kBlocks) {
        const Rounded<kType>& x = rounded[piece];
        const int left = runs - piece * P::kPieceRuns;
        const auto product = [&](const Raw<kType>& raw, unsigned which) {
          const int i = lane + int(16 * which);
          float sums[kHalves<kType> ? 2 : 1];
          sums[0] = x.sum[0][i];
          if constexpr (kHalves<kType>) sums[1] = x.sum[1][i];
          return dot<kType>(run_of<kType>(raw, P::run_at(unsigned(lane), which)), x.low[i], x.high[i], x.scale[i], sums);
        };
        const unsigned r0 = P::run_at(unsigned(lane), 0), r1 = P::run_at(unsigned(lane), 1);
        if (int(r0) < left) {
          const Raw<kType> raw = load_run<kType, InShared>(at, r0);
          sum += product(raw, 0);
          if constexpr (P::kRuns == 2) {
            if constexpr (kShares<kType>) sum += product(raw, 1);  // whole blocks
            else if (int(r1) < left) sum += product(load_run<kType, InShared>(at, r1), 1);
          }
        }
      } else {
        using T = std::conditional_t<kType == Dtype::F16, __half, __nv_bfloat16>;
#pragma unroll
        for (int c = 8 * lane; c < P::kColumns; c += 128) {
          const int column = piece * P::kColumns + c;
          if (column >= a.width) break;
          const float4* by = reinterpret_cast<const float4*>(plain + column);
          const float4 low = by[0], high = by[1];
          float w[8];
          unpack8<T>(*reinterpret_cast<const uint4*>(at + 2 * c), w);
          sum += w[0] * low.x + w[1] * low.y + w[2] * low.z + w[3] * low.w + w[4] * high.x + w[5] * high.y +
                 w[6] * high.z + w[7] * high.w;
        }
      }
      __syncwarp();
      if (P::kAnywhere) offset = (offset + P::kPiece) & 15;
      before = slot;
      slot = slot == (P::kStages - 1) * P::kSlot ? 0 : slot + P::kSlot;
    }
    float total = warp_sum(sum, 16);
    if (row.part->bias) total += row.part->bias[row.number];
    const float other = __shfl_xor_sync(~0u, total, 16);
    if (a.glu) total = activate(a.activation, total) * other;
    if (lane > 0 || row.again) continue;
    float* y = row.part->y + row.number;
    *y = total + (a.accumulate ? *y : 0.0f);
  }
#endif
}

template <Dtype kType> bool one(Queue& queue, const One& a) {
  using P = Pieces<kType>;
  const size_t x_bytes = P::kBlocks ? size_t(ceil_div(a.width, P::kColumns)) * sizeof(Rounded<kType>) : 4 * size_t(a.width);
  const size_t shared = size_t(2 * kWarps * P::kStages * P::kSlot) + x_bytes;
  for (int i = 0; i < a.parts; ++i)
    if (!P::kAnywhere && (reinterpret_cast<uint64_t>(a.part[i].w) | uint64_t(a.part[i].row_bytes)) % 16 != 0)
      return false;
  if (shared > most_shared() || (!P::kBlocks && a.width % 8 != 0)) return false;
  const unsigned blocks = unsigned(std::min(a.pairs, 2 * multiprocessors()));
  launch_early(queue, "matmul", one_kernel<kType>, dim3(blocks), 32 * kWarps, shared, a);
  return true;
}

}  // namespace

bool matmul_one(Queue& queue, std::span<const Linear> each, const Tensor& x, bool accumulate, const Activation* glu) {
  if (each.size() > kMostParts) return false;
  One a{};
  a.x = x.as<float>();
  a.width = int(x.size[1]);
  a.parts = int(each.size());
  a.accumulate = accumulate;
  a.glu = glu != nullptr;
  if (glu) a.activation = *glu;
  for (size_t i = 0; i < each.size(); ++i) {
    const Linear& l = each[i];
    const WeightView w = weight_view("matmul", l.w);
    const bool blocks = is_block(l.w.type);
    const int outputs = int(l.w.size[0]);
    a.part[i] = {blocks ? w.blocks : static_cast<const uint8_t*>(w.plain.data),
                 blocks ? w.row_bytes : w.plain.stride * 2,
                 l.bias.as<float>(),
                 l.y.as<float>(),
                 outputs,
                 (outputs + 1) / 2};
    a.pairs += a.part[i].pairs;
  }
  if (glu) a.pairs = a.part[0].outputs;
  const Dtype type = each[0].w.type;
  if (type == Dtype::BF16) return one<Dtype::BF16>(queue, a);
  if (type == Dtype::F16) return one<Dtype::F16>(queue, a);
  if (!is_block(type)) return false;
  bool done = false;
  with_block_type(type, [&]<Dtype kType>() { done = one<kType>(queue, a); });
  return done;
}

}  // namespace heed::cuda
