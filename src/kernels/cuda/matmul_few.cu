// Products of block-quantised weights with up to 16 tokens, on the tensor cores' 8-bit integers. Bound by reading the weights: every
// warp owns a ring in shared memory that it keeps full, and fills it before the kernels in front are done.
//
// A piece, 512 columns of eight rows of weights, is multiplied at once: tokens are the product's rows, rows of weights its columns,
// as they lie in memory. Warps take one piece of tile after tile, so that the tokens' codes stay in registers.
#include "kernels/cuda/matmul.cuh"

namespace heed::cuda {
namespace {

constexpr int kMostWarps = 16, kMostTokens = 16, kRows = 8, kColumns = 512;
/// Bytes of a warp's ring; what a block gathers of sums before it adds them up.
constexpr int kRingBytes = 11264, kSumBytes = 24 << 10;

/// A piece in shared memory.
template <Dtype kType> struct Piece {
  static constexpr int kBytes = kColumns / info(kType).block * info(kType).bytes;  // of a row
  static constexpr int kRuns = kColumns / 32, kGroups = kColumns / kGroup<kType>;
  /// Rows are copied in units of 16 bytes and begin anywhere in the first, or at it; four bytes behind them may be read. An odd
  /// number of units from row to row: words of eight rows then lie in different banks.
  static constexpr bool kAnywhere = info(kType).bytes % 16 != 0;
  static constexpr int kUnits = (kBytes + 15) / 16 + kAnywhere, kStride = 16 * (kUnits | 1), kSlot = kRows * kStride;
  static constexpr int kStages = kRingBytes / kSlot;
  static_assert(kStages >= 2);
  /// A warp's scales and least values of a tile's groups, in float4: two rows each.
  static constexpr int kAffines = kGroups * kRows / 2, kWarpBytes = kStages * kSlot + kAffines * 16;
};

/// x rounded to 8 bits, a run of 32 at a time: its words 0 … 7 as pairs (i, i + 4), as lanes take them, [run][token][4], and for
/// each group its scale and Σ scale · code, [group][token].
struct Rounded {
  uint2* codes;
  float2* scales;
};

struct Few {
  struct Part {
    const uint8_t* w;
    int64_t row_bytes;
    const float* bias;
    float* y;
    int64_t y_stride;
    int outputs, tiles;
    bool add;
  } part[kMostAtOnce];  // matrices of one type
  Rounded x;
  int tokens, width, pieces, tiles;
  int batch;    // tiles whose sums a block adds up at a time
  int buffers;  // of sums: two when there are several batches
};

/// Row r of a tile. The last one may be there again.
struct Row {
  const Few::Part* part;
  int number;
  bool again;
};
__device__ inline Row row_of(const Few& a, int tile, int r) {
  const Few::Part* part = a.part;
  while (tile >= part->tiles) tile -= part++->tiles;
  const int number = kRows * tile + r, last = part->outputs - 1;
  return {part, min(number, last), number > last};
}

/// All tokens of x, and zeros past its columns: eight lanes for each of a piece's runs of each token.
template <Dtype kType> __global__ void round_kernel(Matrix x, int tokens, Rounded to) {
  await();
  const int at = int(blockIdx.x * blockDim.x + threadIdx.x) / 8, eighth = threadIdx.x % 8, run = at / tokens;
  float4 v = {};
  if (run < x.width / 32) {
    const float* from = x.row<float>(at % tokens) + 32 * run + 4 * eighth;
    v = {from[0], from[1], from[2], from[3]};
  }
  const RoundedFour four = round_four(v);
  const int token = at % tokens;
  reinterpret_cast<uint32_t*>(to.codes + (run * kMostTokens + token) * 4 + eighth % 4)[eighth / 4] = four.codes;
  if constexpr (kHalves<kType>) {
    if (eighth % 4 == 0) to.scales[(2 * run + eighth / 4) * kMostTokens + token] = make_float2(four.scale, four.half);
  } else {
    if (eighth == 0) to.scales[run * kMostTokens + token] = make_float2(four.scale, four.all);
  }
}

/// A row's piece at `from`, by four lanes of which this is number `lane`; of the row `left` bytes are left, and zeros follow.
template <class P> __device__ inline void copy_row(uint8_t* to, const uint8_t* from, int left, int lane) {
  constexpr int kAll = 16 * P::kUnits, kStep = 16 * 4, kWhole = P::kBytes / kStep * kStep;
  const int offset = P::kAnywhere ? int(reinterpret_cast<uint64_t>(from) & 15) : 0;
  const int end = offset + min(P::kBytes, left) - 16 * lane;
  from += 16 * lane - offset, to += 16 * lane;
  const auto copy = [&](int i) {
    if (i + kStep <= kAll || i + 16 * lane < kAll) copy16(to + i, end > i ? from + i : from, min(16, max(0, end - i)));
  };
  if (left >= P::kBytes) {
#pragma unroll
    for (int i = 0; i < kWhole; i += kStep) copy16(to + i, from + i, 16);
  } else {
#pragma unroll
    for (int i = 0; i < kWhole; i += kStep) copy(i);
  }
#pragma unroll
  for (int i = kWhole; i < kAll; i += kStep) copy(i);
}

// Of a product of 16 rows and 8 columns lane l holds, in sum[2 i + j], row l / 4 + 8 i of column 2 · (l % 4) + j. Of the rows'
// codes it has words l % 4 and, of 32 codes, l % 4 + 4 of rows l / 4 and l / 4 + 8; of the columns' those of column l / 4.

__device__ inline void multiply(int (&sum)[4], const uint32_t (&low)[2], const uint32_t (&high)[2], uint2 column) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(low[0]), "r"(low[1]), "r"(high[0]), "r"(high[1]), "r"(column.x), "r"(column.y));
}
__device__ inline void multiply(int (&sum)[4], const uint32_t (&rows)[2], uint32_t column) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(rows[0]), "r"(rows[1]), "r"(column));
}

/// Words i and i + 4 of a row's run in a piece.
template <Dtype kType> __device__ inline uint2 codes_at(const uint8_t* row, int run, int i) {
  const unsigned in = unsigned(run % 8), at = unsigned(i);
  const uint8_t* block = row + run / kBlockRuns<kType> * info(kType).bytes;
  const auto word = [&](unsigned offset) {
    uint32_t w[1];
    InShared::words<kAlign<kType>>(block + offset, w);
    return w[0];
  };
  const uint32_t low = word(low_at<kType>(in, at)), high = kHigh<kType> ? word(high_at<kType>(in, at)) : 0;
  constexpr bool kSame = kBlockRuns<kType> == 1 && kType != Dtype::Q8_0;  // words i and i + 4 are halves of the same bytes
  const uint32_t low4 = kSame ? low : word(low_at<kType>(in, at + 4));
  const uint32_t high4 = !kHigh<kType> || kSame ? high : word(high_at<kType>(in, at + 4));
  return {codes_of<kType>(low, high, in, at), codes_of<kType>(low4, high4, in, at + 4)};
}

/// Scale and least value of a row's group in a piece: a weight is scale · code + least.
template <Dtype kType> __device__ inline Affine affine_at(const uint8_t* row, int group) {
  constexpr int groups = info(kType).block / kGroup<kType>;
  const uint8_t* block = row + group / groups * info(kType).bytes;
  uint32_t head[4];
  load_head<kType, InShared>(block, unsigned(group % groups), head);
  Affine a = affine_of<kType>(block, head, unsigned(group % groups));
  if constexpr (kOffset<kType> != 0) a.shift -= float(kOffset<kType>) * a.scale;
  return a;
}
/// Whether least values are not 0.
template <Dtype kType> constexpr bool kLeast = kShifted<kType> || kOffset<kType> != 0;

/// Where a warp is among its block's items: for every batch of tiles, for each piece, the batch's tiles; of this line each warp
/// has an equal stretch. Pieces change seldom, and with them what a warp holds of x.
struct Walk {
  int first, tiles;       // the batch
  int tile, piece, left;  // in it
};

/// Codes of kSlices times eight tokens.
template <Dtype kType, int kSlices> struct Held {
  static constexpr int kRuns = Piece<kType>::kRuns, kGroups = Piece<kType>::kGroups;
  uint32_t x[2 * kRuns][kSlices];
  const float2* scale;  // this lane's token's, of the piece's groups
  bool there[kSlices];

  __device__ void load(const Rounded& from, int piece, int tokens, int lane) {
    const int token = lane / 4;
    scale = from.scales + piece * kGroups * kMostTokens + token;
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      there[i] = 8 * i + token < tokens;
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        uint2 word = {};
        if (there[i]) word = from.codes[((piece * kRuns + run) * kMostTokens + 8 * i + token) * 4 + lane % 4];
        x[2 * run][i] = word.x, x[2 * run + 1][i] = word.y;
      }
    }
  }

  /// out[2 i + j]: token lane / 4 + 8 i, row 2 · (lane % 4) + j. `affine`: the warp's, for scales of the tile's groups.
  template <class Row> __device__ void multiply_tile(Row row, int lane, float4* affine, float (&out)[2 * kSlices]) const {
    __syncwarp();
    {
      const uint8_t *first = row(2 * (lane % 4)), *second = row(2 * (lane % 4) + 1);
#pragma unroll
      for (int e = 0; e < kGroups; e += 8) {
        const Affine a = affine_at<kType>(first, e + lane / 4), b = affine_at<kType>(second, e + lane / 4);
        affine[(e + lane / 4) * 4 + lane % 4] = make_float4(a.scale, a.shift, b.scale, b.shift);
      }
    }
    __syncwarp();
#pragma unroll
    for (float& o : out) o = 0;
    const uint8_t* codes = row(lane / 4);
    const auto add = [&](const int(&sum)[4], int group) {
      const float4 by = affine[group * 4 + lane % 4];
#pragma unroll
      for (int i = 0; i < kSlices; ++i) {
        float2 s = {};
        if (there[i]) s = scale[group * kMostTokens + 8 * i];
        out[2 * i] += by.x * (s.x * float(sum[2 * i]));
        out[2 * i + 1] += by.z * (s.x * float(sum[2 * i + 1]));
        if constexpr (kLeast<kType>) out[2 * i] += by.y * s.y, out[2 * i + 1] += by.w * s.y;
      }
    };
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const uint2 w = codes_at<kType>(codes, run, lane % 4);
      const uint32_t low[2] = {x[2 * run][0], kSlices == 2 ? x[2 * run][kSlices - 1] : 0},
                     high[2] = {x[2 * run + 1][0], kSlices == 2 ? x[2 * run + 1][kSlices - 1] : 0};
      if constexpr (kHalves<kType>) {
        int first[4] = {}, second[4] = {};
        multiply(first, low, w.x);
        multiply(second, high, w.y);
        add(first, 2 * run);
        add(second, 2 * run + 1);
      } else {
        int sum[4] = {};
        multiply(sum, low, high, w);
        add(sum, run);
      }
    }
  }
};

template <Dtype kType, int kSlices>
__global__ void __launch_bounds__(32 * kMostWarps, 1) few_kernel(const __grid_constant__ Few a) {
#if __CUDA_ARCH__ >= 800
  using P = Piece<kType>;
  constexpr int kItem = 8 * kSlices * kRows;  // sums of a tile
  extern __shared__ __align__(128) uint8_t shared[];
  const int warp = threadIdx.x / 32, warps = int(blockDim.x) / 32, lane = threadIdx.x % 32;
  const int stride = int(gridDim.x), own = (a.tiles - int(blockIdx.x) + stride - 1) / stride;
  uint8_t* const ring = shared + warp * P::kStages * P::kSlot;
  uint8_t* const behind = shared + warps * P::kStages * P::kSlot;
  float4* const affine = reinterpret_cast<float4*>(behind) + warp * P::kAffines;
  float* const sums = reinterpret_cast<float*>(behind + warps * P::kAffines * 16);

  const auto enter = [&](Walk& at, int first) {
    at.first = first, at.tiles = min(a.batch, own - first);
    const int items = at.tiles * a.pieces, begin = items * warp / warps;
    at.left = items * (warp + 1) / warps - begin;
    at.piece = begin / at.tiles, at.tile = begin % at.tiles;
  };
  const auto step = [](Walk& at) {
    --at.left;
    if (++at.tile == at.tiles) at.tile = 0, ++at.piece;
  };
  const int row_bytes = a.width / info(kType).block * info(kType).bytes;
  const auto row_at = [&](const Walk& at, int r) {
    const Row row = row_of(a, int(blockIdx.x) + (at.first + at.tile) * stride, r);
    return row.part->w + row.number * row.part->row_bytes + at.piece * P::kBytes;
  };

  Walk ahead;
  enter(ahead, 0);
  const auto fetch = [&](uint8_t* slot) {
    while (ahead.left == 0 && ahead.first + a.batch < own) enter(ahead, ahead.first + a.batch);
    if (ahead.left > 0) {
      copy_row<P>(slot + lane / 4 * P::kStride, row_at(ahead, lane / 4), row_bytes - ahead.piece * P::kBytes, lane % 4);
      step(ahead);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
#pragma unroll
  for (int s = 0; s < P::kStages - 1; ++s) fetch(ring + s * P::kSlot);
  await();

  Held<kType, kSlices> held;
  int slot = 0, free = P::kStages - 1, loaded = -1;
  for (int first = 0, buffer = 0; first < own; first += a.batch, buffer = 1 - buffer) {
    float* const to = sums + (a.buffers == 2 ? buffer : 0) * a.batch * a.pieces * kItem;
    Walk at;
    for (enter(at, first); at.left > 0; step(at)) {
      fetch(ring + free * P::kSlot);
      asm volatile("cp.async.wait_group %0;" ::"n"(P::kStages - 1) : "memory");
      __syncwarp();
      if (at.piece != loaded) held.load(a.x, loaded = at.piece, a.tokens, lane);
      const uint8_t* base = ring + slot * P::kSlot;
      int offset = 0;  // of row lane / 4
      if constexpr (P::kAnywhere) offset = int(reinterpret_cast<uint64_t>(row_at(at, lane / 4)) & 15);
      const auto row = [&](int r) {
        return base + r * P::kStride + (P::kAnywhere ? __shfl_sync(~0u, offset, 4 * r) : 0);
      };
      float* const item = to + (at.piece * at.tiles + at.tile) * kItem;
      float out[2 * kSlices];
      held.multiply_tile(row, lane, affine, out);
#pragma unroll
      for (int i = 0; i < kSlices; ++i)
        *reinterpret_cast<float2*>(item + (8 * i + lane / 4) * kRows + 2 * (lane % 4)) = make_float2(out[2 * i],
                                                                                                     out[2 * i + 1]);
      __syncwarp();
      free = slot;
      slot = slot + 1 == P::kStages ? 0 : slot + 1;
    }
    __syncthreads();
    const int tiles = at.tiles, tile_sums = a.tokens * kRows;
    for (int e = threadIdx.x; e < tiles * tile_sums; e += int(blockDim.x)) {
      const int tile = e / tile_sums, in = e % tile_sums;
      float total = 0;
      for (int piece = 0; piece < a.pieces; ++piece) total += to[(piece * tiles + tile) * kItem + in];
      const Row row = row_of(a, int(blockIdx.x) + (first + tile) * stride, in % kRows);
      if (row.again) continue;
      if (row.part->bias) total += row.part->bias[row.number];
      float* y = row.part->y + in / kRows * row.part->y_stride + row.number;
      *y = total + (row.part->add ? *y : 0.0f);
    }
  }
#endif
}

template <Dtype kType, int kSlices> bool start(Queue& queue, Few& a) {
  using P = Piece<kType>;
  constexpr int64_t own_bytes = P::kWarpBytes, others = 1024, item = kRows * 4 * 8 * kSlices;
  const int blocks = std::min(a.tiles, multiprocessors()), own = int(ceil_div(a.tiles, blocks));
  const int64_t batches = ceil_div(own, std::max<int64_t>(1, kSumBytes / (item * a.pieces)));
  a.batch = int(ceil_div(own, batches)), a.buffers = batches > 1 ? 2 : 1;
  const int64_t sums = a.buffers * a.batch * a.pieces * item;
  const int64_t warps = std::min<int64_t>(kMostWarps, (int64_t(most_shared()) - others - sums) / own_bytes);
  if (warps < 4) return false;
  launch_early(queue, "matmul", few_kernel<kType, kSlices>, dim3(unsigned(blocks)), int(32 * warps),
               size_t(warps * own_bytes + sums), a);
  return true;
}

template <Dtype kType> bool few(Queue& queue, Few& a, const Matrix& x) {
  using P = Piece<kType>;
  if (!P::kAnywhere)
    for (const Few::Part& part : a.part)
      if ((reinterpret_cast<uint64_t>(part.w) | uint64_t(part.row_bytes)) % 16 != 0) return false;
  const Scratch scratch(queue.scratch);
  const auto take = [&](int64_t bytes) { return queue.scratch.take(Dtype::I8, {a.pieces * bytes * kMostTokens}).data; };
  a.x = {static_cast<uint2*>(take(kColumns)), static_cast<float2*>(take(P::kGroups * int64_t(sizeof(float2))))};
  launch_early(queue, "matmul", round_kernel<kType>, dim3(unsigned(a.pieces * a.tokens)), 8 * P::kRuns, 0, x, a.tokens, a.x);
  return a.tokens <= 8 ? start<kType, 1>(queue, a) : start<kType, 2>(queue, a);
}

}  // namespace

bool matmul_few(Queue& queue, std::span<const Linear> each, const Matrix& x, int64_t tokens) {
  if (each.size() > kMostAtOnce || tokens > kMostTokens) return false;
  Few a{};
  a.tokens = int(tokens), a.width = x.width, a.pieces = int(ceil_div(x.width, kColumns));
  for (size_t i = 0; i < each.size(); ++i) {
    const Linear& l = each[i];
    const WeightView w = weight_view("matmul", l.w);
    const int outputs = int(l.w.size[0]), tiles = int(ceil_div(outputs, kRows));
    a.part[i] = {w.blocks, w.row_bytes, l.bias.as<float>(), l.y.as<float>(), l.y.stride[0], outputs, tiles, l.add};
    a.tiles += tiles;
  }
  bool done = false;
  with_block_type(each[0].w.type, [&]<Dtype kType>() { done = few<kType>(queue, a, x); });
  return done;
}

}  // namespace heed::cuda
