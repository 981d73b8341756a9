// Products of one token. Bound by reading the weights, so reading never stops: every warp owns a ring in shared memory that
// it keeps full, and fills it before the kernels in front are done (weights are nobody's output), while their little work
// would leave the memory idle. Each block rounds x to 8 bits for itself.
#include "kernels/cuda/matmul.cuh"

namespace heed::cuda {
namespace {

/// A block has a multiprocessor, so that x is rounded once for all of its warps: as many as shared memory has rings for. Two
/// blocks of twelve, of which the next kernel's may begin to read beside the last one's, made 352 tokens a second of 360
/// (llama-8b Q4_K behind 8192). Bytes of a warp's ring.
constexpr int kMostWarps = 24, kRingBytes = 7168;

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
    bool add;
  } part[kMostAtOnce];  // matrices of one type
  const float* x;
  const float* norm;  // weights of a norm of x, or null
  float eps;
  int width, parts, pairs;
  bool normed, glu, early;  // glu: parts 0 and 1 are gate and up, y is part 0's; early: matrices may be fetched before await()
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

/// Eight lanes a run of 32, of x times the norm's weights. What the norm divides by is one
/// number, which the products are multiplied by; the return value is the sum of squares of this thread's share of x.
template <Dtype kType>
__device__ inline float round_runs(const float* x, const float* norm, int runs, int pieces, Rounded<kType>* to) {
  using P = Pieces<kType>;
  const int eighth = threadIdx.x % 8;
  float squares = 0;
#pragma unroll 4
  for (int at = threadIdx.x / 8; at < pieces * P::kPieceRuns; at += int(blockDim.x / 8)) {
    const int place = at % P::kPieceRuns, run = at - place + int(P::run_at(place % 16, place / 16));
    float4 v = {};
    if (run < runs) {
      const float* from = x + 32 * run + 4 * eighth;
      v = {from[0], from[1], from[2], from[3]};
      squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
      if (norm) {
        const float* by = norm + 32 * run + 4 * eighth;
        v.x *= by[0], v.y *= by[1], v.z *= by[2], v.w *= by[3];
      }
    }
    const RoundedFour four = round_four(v);
    Rounded<kType>& piece = to[at / P::kPieceRuns];
    reinterpret_cast<uint32_t*>(eighth < 4 ? piece.low + place : piece.high + place)[eighth % 4] = four.codes;
    if (eighth == 0) piece.scale[place] = four.scale;
    if constexpr (kHalves<kType>) {
      if (eighth % 4 == 0) piece.sum[eighth / 4][place] = four.half;
    } else {
      if (eighth == 0) piece.sum[0][place] = four.all;
    }
  }
  return squares;
}

/// The sum of x over the block's threads, for every thread; `sums` is not used before.
__device__ inline float sum_of_warps(float x, float (&sums)[kMostWarps]) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  float out = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) out += sums[w];
  return out;
}

template <Dtype kType>
__global__ void __launch_bounds__(32 * kMostWarps, 1) one_kernel(const __grid_constant__ One a) {
#if __CUDA_ARCH__ >= 800
  using P = Pieces<kType>;
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ float squares[kMostWarps], shares[kMostWarps][2];
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, half = threadIdx.x / 16 % 2, lane = threadIdx.x % 16;
  uint8_t* const ring = shared + (2 * warp + half) * P::kStages * P::kSlot;
  void* const x_at = shared + 2 * warps * P::kStages * P::kSlot;

  // Pairs are dealt to blocks one by one, so that no multiprocessor has more than another; a block's warps take equal stretches of
  // the line that the pieces of its pairs make.
  const int pieces = (a.width + P::kColumns - 1) / P::kColumns, row_length = a.width / P::kBlock * P::kBytes,
            stride = int(gridDim.x), line = (a.pairs - int(blockIdx.x) + stride - 1) / stride * pieces;
  const auto cut = [&](int w) { return int(unsigned(line) * unsigned(w) / unsigned(warps)); };
  const int begin = cut(warp), count = cut(warp + 1) - begin;
  int pair = int(blockIdx.x) + begin / pieces * stride, first_piece = begin % pieces;
  const auto row_at = [](const Row& row) { return row.part->w + row.number * row.part->row_bytes; };

  // Each half of the warp copies its own row's pieces, a lane every sixteenth unit.
  int next = pair, to_fetch = count, next_left = 0,
      next_offset = 0;  // bytes of the row left, less this lane's first; where it begins in a unit
  const uint8_t* next_from = nullptr;
  const auto begin_row = [&](int piece) {
    const Row row = row_of(a, next, half);
    next_from = row_at(row) + piece * P::kPiece + 16 * lane, next_left = row_length - piece * P::kPiece - 16 * lane;
    if (P::kAnywhere) next_offset = int(reinterpret_cast<uint64_t>(row_at(row) + piece * P::kPiece) & 15);
    next += stride;
  };
  if (count > 0) begin_row(first_piece);
  const auto fetch = [&](int slot) {
    if (to_fetch > 0) {
      --to_fetch;
      if (next_left <= -16 * lane) begin_row(0);
      const int offset = P::kAnywhere ? next_offset : 0, left = offset + min(P::kPiece - 16 * lane, next_left);
      uint8_t* to = ring + slot + 16 * lane;
      const uint8_t* from = next_from - offset;
#pragma unroll
      for (int i = 0; i < P::kUnits * 16; i += 256)
        if (left > i) copy16(to + i, from + i, P::kAnywhere ? min(16, left - i) : 16);
      next_from += P::kPiece;
      next_left -= P::kPiece;
      if (P::kAnywhere) next_offset = (next_offset + P::kPiece) & 15;
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };

  // What is no weight may be what the kernel before computes.
  if (!a.early) await();
#pragma unroll
  for (int s = 0; s < P::kStages - 1; ++s) fetch(s * P::kSlot);
  if (a.early) await();

  const int runs = a.width / 32;
  Rounded<kType>* const rounded = static_cast<Rounded<kType>*>(x_at);
  // Plain x: of every eight numbers the first four, and behind all of these the others, so that lanes read side by side.
  float* const plain = static_cast<float*>(x_at);
  const int eights = (a.width + 7) / 8;
  float squared = 0;
  if constexpr (P::kBlocks) {
    squared = round_runs<kType>(a.x, a.norm, runs, pieces, rounded);
  } else {
    for (int c = threadIdx.x; c < a.width; c += int(blockDim.x)) {
      const float v = a.x[c];
      squared += v * v;
      plain[c / 8 * 4 + c % 4 + (c & 4 ? eights * 4 : 0)] = a.norm ? v * a.norm[c] : v;
    }
  }
  const float mean = sum_of_warps(squared, squares) / float(a.width), factor = a.normed ? 1 / sqrtf(mean + a.eps) : 1;

  const auto write = [&](const Row& row, float total) {
    total *= factor;
    if (row.part->bias) total += row.part->bias[row.number];
    const float other = __shfl_xor_sync(~0u, total, 16);
    if (a.glu) total = activate(a.activation, total) * other;
    if (lane > 0 || row.again) return;
    float* y = row.part->y + row.number;
    *y = total + (row.part->add ? *y : 0.0f);
  };
  int slot = 0, before = (P::kStages - 1) * P::kSlot;  // this piece's, and that of the piece before: free again
  float own = 0;                                       // of a pair that begins here and ends in other warps' stretches
  int own_pieces = 0, own_pair = 0;
  for (int left = count; left > 0; pair += stride, first_piece = 0) {
    const Row row = row_of(a, pair, half);
    int offset = P::kAnywhere ? int(reinterpret_cast<uint64_t>(row_at(row) + first_piece * P::kPiece) & 15) : 0;
    float sum = 0;
    const int end = min(pieces, first_piece + left);
    left -= end - first_piece;
    for (int piece = first_piece; piece < end; ++piece) {
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
          const float4* by = reinterpret_cast<const float4*>(plain) + column / 8;
          const float4 low = by[0], high = by[eights];
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
    const float total = warp_sum(sum, 16);
    if (first_piece > 0) {
      if (lane == 0) shares[warp][half] = total;
    } else if (end < pieces) {
      own = total, own_pieces = end, own_pair = pair;
    } else {
      write(row, total);
    }
  }
  __syncthreads();
  if (own_pieces > 0) {
    for (int w = warp + 1; own_pieces < pieces; ++w) {
      const int here = cut(w + 1) - cut(w);
      if (here > 0) own += shares[w][half], own_pieces += here;
    }
    write(row_of(a, own_pair, half), own);
  }
#endif
}

template <Dtype kType> bool one(Queue& queue, const One& a) {
  using P = Pieces<kType>;
  const int64_t x_bytes = P::kBlocks ? ceil_div(a.width, P::kColumns) * int64_t(sizeof(Rounded<kType>))
                                     : 32 * ceil_div(a.width, 8);
  constexpr int64_t ring = 2 * P::kStages * P::kSlot, others = 1024;
  const int64_t warps = std::min<int64_t>(kMostWarps, (int64_t(most_shared()) - others - x_bytes) / ring);
  for (int i = 0; i < a.parts; ++i)
    if (!P::kAnywhere && (reinterpret_cast<uint64_t>(a.part[i].w) | uint64_t(a.part[i].row_bytes)) % 16 != 0)
      return false;
  if (warps < 4 || (!P::kBlocks && a.width % 8 != 0)) return false;
  const unsigned blocks = unsigned(std::min(a.pairs, multiprocessors()));
  launch_early(queue, "matmul", one_kernel<kType>, dim3(blocks), int(32 * warps), size_t(warps * ring + x_bytes), a);
  return true;
}

}  // namespace

bool matmul_one(Queue& queue, std::span<const Linear> each, const Tensor& x, const How& how) {
  if (each.size() > kMostAtOnce) return false;
  One a{};
  a.x = x.as<float>();
  a.width = int(x.size[1]);
  a.parts = int(each.size());
  a.early = how.weights || is_block(each[0].w.type);
  a.glu = how.glu != nullptr;
  if (how.glu) a.activation = *how.glu;
  a.normed = how.norm != nullptr;
  if (how.norm) {
    check_tensor("matmul", "norm", how.norm->weight, {x.size[1]}, true);
    a.norm = how.norm->weight.as<float>(), a.eps = how.norm->eps;
  }
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
                 (outputs + 1) / 2,
                 l.add};
    a.pairs += a.part[i].pairs;
  }
  if (a.glu) a.pairs = a.part[0].outputs;
  const Dtype type = each[0].w.type;
  if (type == Dtype::BF16) return one<Dtype::BF16>(queue, a);
  if (type == Dtype::F16) return one<Dtype::F16>(queue, a);
  if (!is_block(type)) return false;
  bool done = false;
  with_block_type(type, [&]<Dtype kType>() { done = one<kType>(queue, a); });
  return done;
}

}  // namespace heed::cuda
