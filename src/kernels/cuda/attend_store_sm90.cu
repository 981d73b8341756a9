// Decode attention over bf16 pages, bound by memory: keys and values go from device memory to registers, where they already are
// operands of mma.m16n8k16, so shared memory is used for merging alone.
//
// S^T = K·Q^T and O^T = V^T·P^T: 16 entries or channels on the long side, 8 (head, row) columns of one KV head on the short one, so
// a group of 4 wastes half a product instead of three quarters. Channels are permuted so that a thread's operands are 16 contiguous
// bytes: product over channels does not mind (q is permuted alike), and output channels are written where they belong.
//
// Entries of a list that are no 16 in a row (tokens, small blocks) make units of 16 of the list: a lane finds where one of them
// lies, and the lanes that load its rows ask it.
//
// All units of 16 entries of all segments form one line, which the blocks cut in equal ranges. A range's warps take units in turn.
// A segment that several blocks share is merged by the last of them to finish, in the order of the ranges: one launch, a fixed order.
#include <cuda_bf16.h>

#include <algorithm>
#include <type_traits>

#include "kernels/cuda/attend_sm90.h"
#include "kernels/cuda/grid.cuh"
#include "kernels/cuda/sm90.h"

namespace heed::sm90 {
namespace {

constexpr int kUnit = 16, kColumns = 8, kMostLists = 4096, kMostBlocks = 512;
constexpr int kNothing = 1 << 30;  // past every entry

/// One (sequence, KV head), or (sequence, query head) where every head has a list of its own.
struct Item {
  int list, chunk, units;
  int start;               // entries before it lie outside every row's window
  int length, n, columns;  // entries, query rows, (row, head) pairs
  int sequence, head;      // first query head
};

struct Shape {
  int lists_per_sequence, heads_per_list;
};

__device__ __forceinline__ Shape lists_of(const AttendStore& a) {
  const bool own = a.k_tile > 0 && a.plan_heads > a.kv_heads;
  return {own ? a.heads : a.kv_heads, own ? 1 : a.heads / a.kv_heads};
}

/// Position of query row i of a segment.
__device__ __forceinline__ int position_of(const AttendStore& a, const Item& x, int64_t row, int i) {
  return a.q_pos ? a.q_pos[row] : x.length - x.n + i;
}

/// Positions ascend in a segment. As a rule they count entries, so the last `window` hold all that is seen; one look at the entry
/// before these tells whether they do.
__device__ __forceinline__ int window_start(const AttendStore& a, const Item& x) {
  const int guess = x.length - x.n - a.window;
  if (a.window == 0 || a.k_tile > 0 || guess <= 0) return 0;
  int64_t first = a.q_begin[int64_t(x.sequence) * a.heads + x.head];
  int least = position_of(a, x, first, 0);
  for (int i = 1; i < x.n; ++i) least = min(least, position_of(a, x, first + i, i));
  const int kv = x.sequence * a.kv_heads + x.head / (a.heads / a.kv_heads);
  const int before = reinterpret_cast<const int32_t*>(a.table[kv * a.capacity + (guess - 1) / 64] +
                                                      a.position_at)[(guess - 1) % 64];
  return least - before >= a.window ? guess / kUnit * kUnit : 0;
}

__device__ __forceinline__ void describe(const AttendStore& a, int list, Item& x) {
  const Shape s = lists_of(a);
  x.list = list, x.sequence = list / s.lists_per_sequence, x.head = list % s.lists_per_sequence * s.heads_per_list;
  const int64_t segment = int64_t(x.sequence) * a.heads + x.head;
  x.n = int(a.q_end[segment] - a.q_begin[segment]), x.columns = x.n * s.heads_per_list;
  x.length = a.length[int64_t(x.sequence) * a.kv_heads + x.head / (a.heads / a.kv_heads)];
  x.start = x.n > 0 ? window_start(a, x) : 0;
}

__device__ __forceinline__ int64_t plan_row(const AttendStore& a, const Item& x, int rows_before) {
  return rows_before + x.head * a.plan_heads / a.heads;
}

/// Steps of 16 entries; at least one, so that rows that see nothing are written too.
__device__ __forceinline__ int listed(const AttendStore& a, const Item& x, int rows_before) {
  const int64_t row = plan_row(a, x, rows_before);
  return a.count ? a.count[row] : int(a.rowptr[row + 1] - a.rowptr[row]);
}

__device__ __forceinline__ int units_of(const AttendStore& a, const Item& x, int rows_before) {
  if (x.n == 0) return 0;
  if (a.k_tile == 0) return max(1, (x.length - x.start + kUnit - 1) / kUnit);
  const int entries = listed(a, x, rows_before);
  return max(1, int((int64_t(entries) * a.k_tile + kUnit - 1) / kUnit));
}

__device__ __forceinline__ uint4 load16(const void* p) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(p));
  return x;
}

__device__ __forceinline__ uint32_t transpose8x8(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

template <int DV>
struct __align__(16) Partial {
  float o[kColumns][DV], top[kColumns], sum[kColumns];
};

__device__ __forceinline__ void add(float4& to, float factor, const float4& x) {
  to.x += factor * x.x, to.y += factor * x.y, to.z += factor * x.z, to.w += factor * x.w;
}

template <int DV, int kWarps>
struct Memory {
  Partial<DV> warps[kWarps];
  int2 first[kMostLists + 1];                        // units and plan rows before a list
  int chunks[kMostBlocks], blocks[kMostBlocks + 1];  // of a list, and blocks before it, where items have blocks of their own
  int2 scan[kWarps];
  int last;
};

/// The sum of `own` over the threads before this one, on top of `base`, to which the sum of all is added.
template <int kWarps> __device__ __forceinline__ int sum_before(int2 (&scan)[kWarps], int own, int& base) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int all = own;
  for (int step = 1; step < 32; step *= 2) {
    const int x = __shfl_up_sync(~0u, all, step);
    if (lane >= step) all += x;
  }
  if (lane == 31) scan[warp].x = all;
  __syncthreads();
  int before = base;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += scan[w].x;
    base += scan[w].x;
  }
  __syncthreads();
  return before + all - own;
}

constexpr int kAhead = 2;  // pages of a block's own that it asks for

/// Keys and values that the block will read first go to the L2 cache while the kernels before end. Full pages stay where they are
/// whatever these do, and what is asked for in vain does no harm; lengths and table are read past L1, which would keep them.
template <int D, int DV>
__device__ __forceinline__ void ask_ahead(const AttendStore& a) {
  const int lists = a.sequences * a.kv_heads, lane = threadIdx.x % 32;
  if (a.k_tile > 0 || a.window > 0 || lists > 32 || threadIdx.x >= 32) return;
  int all = lane < lists ? __ldcg(a.length + lane) / 64 : 0;
  const int own = all;
  for (int step = 1; step < 32; step *= 2) {
    const int x = __shfl_up_sync(~0u, all, step);
    if (lane >= step) all += x;
  }
  const int total = __shfl_sync(~0u, all, 31);
  const auto cut = [&](unsigned b) { return int(int64_t(total) * b / gridDim.x); };
  const int last = min(cut(blockIdx.x + 1), cut(blockIdx.x) + kAhead);
  for (int page = cut(blockIdx.x); page < last; ++page) {
    const int list = __ffs(int(__ballot_sync(~0u, all > page))) - 1, before = __shfl_sync(~0u, all - own, list);
    if (lane >= 2) continue;
    const uint64_t at = __ldcg(reinterpret_cast<const unsigned long long*>(a.table) + list * a.capacity + page - before) +
                        uint64_t(lane == 0 ? a.k_at : a.v_at);
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(at), "r"(64 * 2 * (lane == 0 ? D : DV)) : "memory");
#endif
  }
}

__global__ void clear_kernel(int* arrived, int count) {
  cuda::await();
  if (int(threadIdx.x) < count) arrived[threadIdx.x] = 0;
}

/// kGathers: blocks of a list are smaller than a unit.
template <int D, int DV, int kWarps, int PerSm, bool kGathers>
__global__ void __launch_bounds__(32 * kWarps, PerSm)
    attend_store_kernel(const AttendStore a, Partial<DV>* partials, int* arrived) {
  ask_ahead<D, DV>(a);
  cuda::await();
  extern __shared__ uint8_t raw[];
  Memory<DV, kWarps>& sh = *reinterpret_cast<Memory<DV, kWarps>*>(raw);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, c = lane % 4;
  const Shape shape = lists_of(a);
  const int lists = a.sequences * shape.lists_per_sequence;

  // Prefix sums over the lists.
  if (a.k_tile > 0) {  // plan rows of the sequences before
    int before = 0;
    for (int from = 0; from < a.sequences; from += 32 * kWarps) {
      const int s = from + thread;
      const int own = s < a.sequences && a.q_end[int64_t(s) * a.heads] > a.q_begin[int64_t(s) * a.heads] ? a.plan_heads : 0;
      int all = own;
      for (int step = 1; step < 32; step *= 2) {
        const int x = __shfl_up_sync(~0u, all, step);
        if (lane >= step) all += x;
      }
      if (lane == 31) sh.scan[warp].x = all;
      __syncthreads();
      int base = before;
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp) base += sh.scan[w].x;
        before += sh.scan[w].x;
      }
      if (s < a.sequences)
        for (int l = 0; l < shape.lists_per_sequence; ++l)
          sh.first[s * shape.lists_per_sequence + l].y = base + all - own;
      __syncthreads();
    }
  }
  int total = 0, items = 0;
  for (int from = 0; from < lists; from += 32 * kWarps) {
    const int l = from + thread;
    int own = 0, chunks = 0;
    if (l < lists) {
      Item x;
      describe(a, l, x);
      chunks = (x.columns + kColumns - 1) / kColumns;
      own = units_of(a, x, a.k_tile > 0 ? sh.first[l].y : 0) * chunks;
      if (l < kMostBlocks) sh.chunks[l] = chunks;
    }
    int all = own;
    for (int step = 1; step < 32; step *= 2) {
      const int x = __shfl_up_sync(~0u, all, step);
      if (lane >= step) all += x;
    }
    chunks = __reduce_add_sync(~0u, chunks);
    if (lane == 31) sh.scan[warp] = {all, chunks};
    __syncthreads();
    int base = total;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) base += sh.scan[w].x;
      total += sh.scan[w].x;
      items += sh.scan[w].y;
    }
    if (l < lists) sh.first[l].x = base + all - own;
    __syncthreads();
  }
  if (thread == 0) sh.first[lists].x = total;
  __syncthreads();

  if (total == 0) return;
  // Where items are few each has blocks of its own, in proportion to its units: a block that ends one and begins the next takes
  // twice as long as others, and with lists of a few thousand entries that is waiting. Else all units are one line, cut in
  // equal ranges: every block has a unit or more, better one for each warp; but no two items, which would come one after the
  // other.
  const int most = int(gridDim.x), block = blockIdx.x;
  const bool apart = lists <= kMostBlocks && 2 * items <= most;
  const int blocks = max(1, min(apart ? most - items : most, max(items, total / kWarps)));
  const auto units_each = [&](int l) { return (sh.first[l + 1].x - sh.first[l].x) / max(1, sh.chunks[l]); };
  const auto blocks_each = [&](int l) { return int(ceil(double(units_each(l)) * blocks / total)); };
  if (apart) {
    int before = 0;
    for (int from = 0; from < lists; from += 32 * kWarps) {
      const int l = from + thread, own = l < lists ? blocks_each(l) * sh.chunks[l] : 0;
      const int mine = sum_before(sh.scan, own, before);
      if (l < lists) sh.blocks[l] = mine;
    }
    if (thread == 0) sh.blocks[lists] = before;
    __syncthreads();
    if (block >= before) return;
  } else if (block >= blocks) {
    return;
  }
  // total · b / blocks, rounded down: exact in f64, whose division is a tenth of one of 64-bit integers.
  auto cut = [&](int b) { return int(double(total) * b / blocks); };
  const float scale = a.scale * 1.4426950408889634f;
  int list = 0;
  {
    int high = lists;
    while (high - list > 1) {
      const int middle = (list + high) / 2;
      if (apart ? sh.blocks[middle] <= block : sh.first[middle].x <= cut(block)) list = middle;
      else high = middle;
    }
  }
  int at = cut(block), end = cut(block + 1), first_block = 0, shares = 0;  // of the item, where it has its own
  if (apart) {
    while (sh.blocks[list + 1] <= block) ++list;
    const int units = units_each(list), chunk = (block - sh.blocks[list]) / (shares = blocks_each(list)),
              item = sh.first[list].x + chunk * units;
    first_block = sh.blocks[list] + chunk * shares;
    const auto inside = [&](int i) { return item + int(double(units) * i / shares); };
    at = inside(block - first_block), end = inside(block - first_block + 1);
  }
  while (at < end) {
    while (sh.first[list + 1].x <= at) ++list;
    Item x;
    describe(a, list, x);
    const int rows_before = sh.first[list].y;
    x.units = units_of(a, x, rows_before);
    x.chunk = (at - sh.first[list].x) / x.units;
    const int item_begin = sh.first[list].x + x.chunk * x.units, item_end = item_begin + x.units;
    const int from = at - item_begin, to = min(end, item_end) - item_begin;
    const int kv = x.sequence * a.kv_heads + x.head / (a.heads / a.kv_heads);
    const uint64_t* pages = a.table + kv * a.capacity;
    const int32_t* blocks_read = a.k_tile > 0 ? a.index + a.rowptr[plan_row(a, x, rows_before)] : nullptr;

    auto row_of = [&](int column) {
      const int64_t segment = int64_t(x.sequence) * a.heads + x.head + column % shape.heads_per_list;
      return a.q_begin[segment] + column / shape.heads_per_list;
    };
    int limit[2], oldest[2];  // the last entry that columns 2c and 2c + 1 see, and the last position that they do not
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = x.chunk * kColumns + 2 * c + e;
      limit[e] = column >= x.columns ? -1
                 : a.causal          ? min(x.length - 1, x.length - x.n + column / shape.heads_per_list)
                                     : x.length - 1;
      oldest[e] = a.window > 0 && column < x.columns
                      ? position_of(a, x, row_of(column), column / shape.heads_per_list) - a.window
                      : -kNothing;
    }

    float o[DV / 16][4] = {};
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    uint4 k[D / 32][2], v[DV / 64][4];
    // Where a unit lies: its first entry, then the address of its page (0: nothing there to read); gathered, those of a lane's own
    // entry. Each is asked for a unit or two before the loads that depend on it.
    const int in_list = kGathers ? listed(a, x, rows_before) * a.k_tile : 0;
    auto entry_of = [&](int unit) {
      if (unit >= to) return kNothing;
      if constexpr (kGathers) {
        const int i = unit * kUnit + lane % kUnit;
        return i < in_list ? blocks_read[i / a.k_tile] * a.k_tile + i % a.k_tile : kNothing;
      }
      if (a.k_tile == 0) return x.start + unit * kUnit;
      const int per = a.k_tile / kUnit;
      return blocks_read[unit / per] * a.k_tile + unit % per * kUnit;
    };
    auto page_of = [&](int entry) { return entry < x.length ? pages[entry / 64] : 0; };
    // Of the unit's entry `row`, when lanes hold one each.
    auto of_row = [&](auto held, int row) { return __shfl_sync(~0u, held, row); };
    auto load_keys = [&](int entry, uint64_t page) {
      if constexpr (kGathers) {
        const uint64_t key = page ? page + a.k_at + entry % 64 * (D * 2) : 0;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const char* from = reinterpret_cast<const char*>(of_row(key, g + 8 * r));
#pragma unroll
          for (int i = 0; i < D / 32; ++i) k[i][r] = from ? load16(from + (8 * c + 32 * i) * 2) : uint4{0, 0, 0, 0};
        }
        return;
      }
      const char* from_here = reinterpret_cast<const char*>(page) + a.k_at + (int64_t(entry % 64 + g) * D + 8 * c) * 2;
#pragma unroll
      for (int i = 0; i < D / 32; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) k[i][r] = page ? load16(from_here + (8 * r * D + 32 * i) * 2) : uint4{0, 0, 0, 0};
    };
    auto load_values = [&](int entry, uint64_t page) {
      if constexpr (kGathers) {
        const uint64_t value = page ? page + a.v_at + entry % 64 * (DV * 2) : 0;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const char* from = reinterpret_cast<const char*>(of_row(value, 2 * c + r % 2 + r / 2 * 8));
#pragma unroll
          for (int i = 0; i < DV / 64; ++i) v[i][r] = from ? load16(from + (8 * g + 64 * i) * 2) : uint4{0, 0, 0, 0};
        }
        return;
      }
      const char* from_here = reinterpret_cast<const char*>(page) + a.v_at + (int64_t(entry % 64 + 2 * c) * DV + 8 * g) * 2;
#pragma unroll
      for (int i = 0; i < DV / 64; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int row = r % 2 + r / 2 * 8;  // entries 2c, 2c + 1, 2c + 8, 2c + 9
          v[i][r] = page && entry + 2 * c + row < x.length ? load16(from_here + (row * DV + 64 * i) * 2)
                                                           : uint4{0, 0, 0, 0};
        }
    };
    int entry = entry_of(from + warp), next_entry = entry_of(from + warp + kWarps),
        far_entry = entry_of(from + warp + 2 * kWarps);
    uint64_t page = page_of(entry), next_page = page_of(next_entry);
    load_keys(entry, page), load_values(entry, page);
    // Queries, while keys are on their way: column g of the chunk, channels 32·i + 8·c … + 7.
    uint32_t q[D / 8];
    {
      const int column = x.chunk * kColumns + g;
      const int64_t row = column < x.columns ? row_of(column) : 0;
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        uint4 y = {0, 0, 0, 0};
        if (column < x.columns) {
          const int64_t first = row * a.q_stride + 32 * i + 8 * c;
          if (a.q_f32) {
            const float4* f = reinterpret_cast<const float4*>(static_cast<const float*>(a.q) + first);
            const float4 u = f[0], w = f[1];
            y = {pack_bf16(u.x, u.y), pack_bf16(u.z, u.w), pack_bf16(w.x, w.y), pack_bf16(w.z, w.w)};
          } else {
            y = *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(a.q) + first);
          }
        }
        q[4 * i] = y.x, q[4 * i + 1] = y.y, q[4 * i + 2] = y.z, q[4 * i + 3] = y.w;
      }
    }
    for (int unit = from + warp; unit < to; unit += kWarps) {
      float s[4] = {0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        multiply(s, k[i][0].x, k[i][1].x, k[i][0].y, k[i][1].y, q[4 * i], q[4 * i + 1]);
        multiply(s, k[i][0].z, k[i][1].z, k[i][0].w, k[i][1].w, q[4 * i + 2], q[4 * i + 3]);
      }
      float bias[2] = {0, 0};
      int position[2] = {kNothing, kNothing}, entry_now[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        entry_now[r] = kGathers ? of_row(entry, g + 8 * r) : entry + g + 8 * r;
        if (a.bias_at < 0 && a.window == 0) continue;
        const uint64_t its_page = kGathers ? of_row(page, g + 8 * r) : page;
        const int in_page = kGathers ? entry_now[r] % 64 : entry % 64 + g + 8 * r;
        if (a.bias_at >= 0 && its_page)
          bias[r] = reinterpret_cast<const float*>(its_page + a.bias_at)[in_page] * 1.4426950408889634f;
        if (a.window > 0 && its_page) position[r] = reinterpret_cast<const int32_t*>(its_page + a.position_at)[in_page];
      }
      entry = next_entry, page = next_page;
      load_keys(entry, page);
      next_entry = far_entry, next_page = page_of(far_entry), far_entry = entry_of(unit + 3 * kWarps);
      // s[2r + e]: entry g + 8r, column 2c + e.
      float high[2];
      bool grows = false;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int r = 0; r < 2; ++r)
          s[2 * r + e] = entry_now[r] <= limit[e] && position[r] > oldest[e] ? fmaf(s[2 * r + e], scale, bias[r]) : -INFINITY;
        high[e] = fmaxf(s[e], s[2 + e]);
#pragma unroll
        for (int step = 4; step < 32; step *= 2) high[e] = fmaxf(high[e], __shfl_xor_sync(~0u, high[e], step));
        high[e] = fmaxf(high[e], top[e]);
        grows |= high[e] - top[e] > 8.f;
      }
      if (__any_sync(~0u, grows)) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float factor = high[e] == -INFINITY ? 1.f : exp2_fast(top[e] - high[e]);
          top[e] = high[e], sum[e] *= factor;
#pragma unroll
          for (int i = 0; i < DV / 16; ++i) o[i][e] *= factor, o[i][2 + e] *= factor;
        }
      }
      uint32_t p[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float w[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          w[e] = exp2_fast(s[2 * r + e] - (top[e] == -INFINITY ? 0.f : top[e]));
          sum[e] += w[e];
        }
        p[r] = transpose8x8(pack_bf16(w[0], w[1]));
      }
#pragma unroll
      for (int i = 0; i < DV / 64; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {  // rows g, g + 8 of the product: channels 64·i + 8·g + 2·j and the next
          const uint32_t r0 = (&v[i][0].x)[j], r1 = (&v[i][1].x)[j], r2 = (&v[i][2].x)[j], r3 = (&v[i][3].x)[j];
          multiply(o[4 * i + j], __byte_perm(r0, r1, 0x5410), __byte_perm(r0, r1, 0x7632), __byte_perm(r2, r3, 0x5410),
                   __byte_perm(r2, r3, 0x7632), p[0], p[1]);
        }
      load_values(entry, page);
    }

    // The block's warps into one.
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum[e] += __shfl_xor_sync(~0u, sum[e], step);
      Partial<DV>& mine = sh.warps[warp];
      if (g == 0) mine.top[2 * c + e] = top[e], mine.sum[2 * c + e] = sum[e];
#pragma unroll
      for (int i = 0; i < DV / 64; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          *reinterpret_cast<float2*>(&mine.o[2 * c + e][64 * i + 8 * g + 2 * j]) = {o[4 * i + j][e], o[4 * i + j][2 + e]};
    }
    __syncthreads();
    const bool whole = from == 0 && to == x.units;
    Partial<DV>& shared_out = partials[2 * block + (from == 0)];
    const int column_first = x.chunk * kColumns, columns = min(kColumns, x.columns - column_first);
    auto write = [&](int column, int channel, const float4& value, float high, float all) {
      const int64_t row = row_of(column_first + column);
      float log2_sum = all > 0 ? high + __log2f(all) : -INFINITY, gain = all > 0 ? 1 / all : 0;
      if (a.sink) {
        const float sink = a.sink[x.head + (column_first + column) % shape.heads_per_list] * 1.4426950408889634f;
        const float most = fmaxf(sink, log2_sum),
                    both = most == -INFINITY ? most : most + __log2f(exp2_fast(sink - most) + exp2_fast(log2_sum - most));
        gain = log2_sum == -INFINITY ? 0 : gain * exp2_fast(log2_sum - both);
        log2_sum = both;
      }
      float* to = a.out + row * a.out_stride + channel;
      to[0] = value.x * gain, to[1] = value.y * gain, to[2] = value.z * gain, to[3] = value.w * gain;
      if (a.lse && channel == 0) a.lse[row] = log2_sum * 0.6931471805599453f;
    };
    constexpr int kFours = DV / 4;
    for (int i = thread; i < columns * kFours; i += 32 * kWarps) {
      const int column = i / kFours, channel = i % kFours * 4;
      float high = -INFINITY, all = 0;
      float4 value = {0, 0, 0, 0};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) high = fmaxf(high, sh.warps[w].top[column]);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float factor = high == -INFINITY ? 0 : exp2_fast(sh.warps[w].top[column] - high);
        all += factor * sh.warps[w].sum[column];
        add(value, factor, *reinterpret_cast<const float4*>(&sh.warps[w].o[column][channel]));
      }
      if (whole) {
        write(column, channel, value, high, all);
      } else {
        *reinterpret_cast<float4*>(&shared_out.o[column][channel]) = value;
        if (channel == 0) shared_out.top[column] = high, shared_out.sum[column] = all;
      }
    }
    if (!whole) {
      // The blocks that share the item, from the one with its first unit to the one with its last.
      auto block_of = [&](int unit) {
        int b = int((int64_t(unit) * blocks) / total);
        while (cut(b + 1) <= unit) ++b;
        while (cut(b) > unit) --b;
        return b;
      };
      const int b0 = apart ? first_block : block_of(item_begin);
      if (!apart) shares = block_of(item_end - 1) - b0 + 1;
      __threadfence();
      __syncthreads();
      if (thread == 0) sh.last = atomicAdd(&arrived[b0], 1) == shares - 1;
      __syncthreads();
      if (sh.last) {
        __threadfence();
        if (thread == 0) arrived[b0] = 0;
        // Loads of many shares side by side: each takes over a microsecond to come from where another multiprocessor wrote it.
        float* factor = &sh.warps[0].o[0][0];  // [shares][columns]
        float* top = factor + kMostBlocks * kColumns;
        float* all = top + kColumns;
        float4* sums = reinterpret_cast<float4*>(all + kColumns);  // [groups of threads][fours]
        auto share = [&](int i) -> Partial<DV>& { return partials[2 * (b0 + i) + (i == 0)]; };
        for (int column = warp; column < columns; column += kWarps) {
          float high = -INFINITY, sum = 0;
          for (int i = lane; i < shares; i += 32) {
            const float t = __ldcg(&share(i).top[column]), s = __ldcg(&share(i).sum[column]), most = fmaxf(high, t);
            if (most > -INFINITY) sum = sum * exp2_fast(high - most) + s * exp2_fast(t - most);
            high = most, factor[i * kColumns + column] = t;
          }
          float most = high;
          for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
          if (most > -INFINITY) sum *= exp2_fast(high - most);
          for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
          for (int i = lane; i < shares; i += 32) {
            float& f = factor[i * kColumns + column];
            f = most == -INFINITY ? 0 : exp2_fast(f - most);
          }
          if (lane == 0) top[column] = most, all[column] = sum;
        }
        __syncthreads();
        // Groups of threads take every so manieth share.
        const int fours = columns * kFours, groups = max(1, 32 * kWarps / fours), group = thread / fours;
        for (int i = thread - group * fours; group < groups && i < fours; i += 32 * kWarps) {
          const int column = i / kFours, channel = i % kFours * 4;
          float4 value = {0, 0, 0, 0};
#pragma unroll 16
          for (int b = group; b < shares; b += groups)
            add(value, factor[b * kColumns + column], __ldcg(reinterpret_cast<const float4*>(&share(b).o[column][channel])));
          if (groups == 1) write(column, channel, value, top[column], all[column]);
          else sums[thread] = value;
        }
        __syncthreads();
        if (groups > 1 && thread < fours) {
          float4 value = sums[thread];
          for (int other = 1; other < groups; ++other) add(value, 1, sums[other * fours + thread]);
          const int column = thread / kFours;
          write(column, thread % kFours * 4, value, top[column], all[column]);
        }
      }
    }
    __syncthreads();
    at = min(end, item_end);
  }
}

template <int D, int DV, int kWarps, int PerSm, bool kGathers>
cudaError_t launch_store(const AttendStore& a, void* scratch, cudaStream_t stream) {
  const int blocks = std::min(PerSm * cuda::multiprocessors(), kMostBlocks);
  static_assert(kMostBlocks * kColumns + 2 * kColumns + 4 * 32 * kWarps <= kWarps * kColumns * DV);
  int* arrived = a.arrived ? a.arrived : static_cast<int*>(scratch);
  const int64_t skip = (int64_t(blocks) * 4 + 255) / 256 * 256;
  Partial<DV>* partials = reinterpret_cast<Partial<DV>*>(static_cast<char*>(scratch) + skip);
  static const cudaError_t ready = cudaFuncSetAttribute(attend_store_kernel<D, DV, kWarps, PerSm, kGathers>,
                                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                        int(sizeof(Memory<DV, kWarps>)));
  if (ready != cudaSuccess) return ready;
  // Both begin with await(): they are set up while what is before them ends.
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t how{};
  how.gridDim = dim3(1), how.blockDim = dim3(kMostBlocks), how.stream = stream, how.attrs = &early, how.numAttrs = 1;
  if (!a.arrived)
    if (const cudaError_t e = cudaLaunchKernelEx(&how, clear_kernel, arrived, blocks); e != cudaSuccess) return e;
  how.gridDim = dim3(unsigned(blocks)), how.blockDim = dim3(32 * kWarps);
  how.dynamicSmemBytes = sizeof(Memory<DV, kWarps>);
  return cudaLaunchKernelEx(&how, attend_store_kernel<D, DV, kWarps, PerSm, kGathers>, a, partials, arrived);
}

}  // namespace

bool attend_store_fits(const AttendStore& a) {
  if (reinterpret_cast<uintptr_t>(a.q) % 16 || a.q_stride % (a.q_f32 ? 4 : 8) || a.k_at % 16 || a.v_at % 16)
    return false;
  if (a.k_tile < 0 || (a.k_tile > 0 && 64 % a.k_tile != 0)) return false;
  if (int64_t(a.sequences) * std::max(a.heads, a.kv_heads) > kMostLists || !(a.scale > 0)) return false;
  return a.d == a.d_v && (a.d == 64 || a.d == 128 || a.d == 256);
}

int64_t attend_store_scratch(const AttendStore& a) {
  const int64_t blocks = kMostBlocks;
  return (blocks * 4 + 255) / 256 * 256 + 2 * blocks * (int64_t(kColumns) * a.d_v + 2 * kColumns) * 4;
}

cudaError_t attend_store_launch(const AttendStore& a, void* scratch, cudaStream_t stream) {
  const auto by_list = [&](auto gathers) {
    if (a.d == 64) return launch_store<64, 64, 16, 1, gathers>(a, scratch, stream);
    if (a.d == 128) return launch_store<128, 128, 6, 2, gathers>(a, scratch, stream);
    return launch_store<256, 256, 8, 1, gathers>(a, scratch, stream);
  };
  return a.k_tile > 0 && a.k_tile < kUnit ? by_list(std::true_type()) : by_list(std::false_type());
}

}  // namespace heed::sm90
