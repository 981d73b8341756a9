// Thin wrappers of the Hopper instructions that have no CUDA C++ form: mbarrier, TMA, wgmma, setmaxnreg, named barriers.
// PTX ISA 8.0 and later, sections "mbarrier", "cp.async.bulk.tensor", "wgmma" (bf16 in, f32 sums).
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

namespace heed::sm90 {

/// Address of shared memory as PTX wants it.
__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// mbarrier: an object of 8 bytes in shared memory. A phase ends when `count` arrivals and all announced bytes are in.

__device__ __forceinline__ void barrier_init(uint64_t* bar, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count));
}

/// Makes initialised barriers visible to the copy engine; a __syncthreads must follow.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}

/// A warp's arrival, when all of its lanes have done what the barrier is for: its count is kWarpArrivals for each warp. One lane
/// arrives for all. The tool racecheck follows no lane but that one and reports the others' accesses, so for it all of them
/// arrive (HEED_EVERY_LANE_ARRIVES).
#ifdef HEED_EVERY_LANE_ARRIVES
constexpr uint32_t kWarpArrivals = 32;
__device__ __forceinline__ void warp_arrive(uint64_t* bar) { barrier_arrive(bar); }
#else
constexpr uint32_t kWarpArrivals = 1;
__device__ __forceinline__ void warp_arrive(uint64_t* bar) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(bar);
}
#endif

/// Arrives and announces bytes that copies will bring.
__device__ __forceinline__ void barrier_expect(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ bool barrier_try(uint64_t* bar, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(done)
      : "r"(shared_address(bar)), "r"(parity)
      : "memory");
  return done;
}

/// Waits until the phase of this parity has ended. With HEED_BOUND_WAITS a wait that lasts seconds traps, so that a lost arrival
/// is an error and not a machine that hangs. (No message: a call would make the compiler serialise wgmma.)
__device__ __forceinline__ void barrier_wait(uint64_t* bar, uint32_t parity) {
#ifdef HEED_BOUND_WAITS
  for (int tries = 0; !barrier_try(bar, parity); ++tries)
    if (tries > 20'000'000) __trap();
#else
  while (!barrier_try(bar, parity)) {}
#endif
}

/// Which stage of a ring and which phase the i-th use is.
template <int Stages>
struct Ring {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++slot == Stages) slot = 0, parity ^= 1;
  }
};

/// The same value, known to the compiler to be equal in a warp: wgmma is serialised where control flow could diverge.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }
__device__ __forceinline__ int4 uniform(int4 x) { return {uniform(x.x), uniform(x.y), uniform(x.z), uniform(x.w)}; }

// Named barriers: id 1 to 15 (0 is __syncthreads).
__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// Ordinary writes to shared memory before it are seen by the tensor cores and the copy engine behind it.
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// Box of `map` at (column, row) → `to`; arrives at `bar` with its bytes. Rows outside the map become zeros.
__device__ __forceinline__ void tma_load(void* to, const CUtensorMap* map, uint64_t* bar, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(bar)), "r"(column), "r"(row)
      : "memory");
}

/// `bytes` (of 16 each) from global to shared memory, as they lie; arrives at `bar` with its bytes.
__device__ __forceinline__ void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(bar))
      : "memory");
}

/// Adds `bytes` (of 16 each) of f32 from shared to global memory, in no particular order with other additions.
__device__ __forceinline__ void bulk_add(float* to, const void* from, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
/// `bytes` (of 16 each) from shared to global memory.
__device__ __forceinline__ void bulk_store(void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
/// Box of `map` at (column, row) ← `from`; what lies outside the map is not written.
__device__ __forceinline__ void tma_store(const void* from, const CUtensorMap* map, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(from)), "r"(column), "r"(row)
               : "memory");
}
/// What this thread has stored and added since the last call becomes a group; until all but the last `Left` groups have read
/// shared memory.
template <int Left = 0> __device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read %0;" ::"n"(Left) : "memory");
}
/// Until all groups are written.
__device__ __forceinline__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

template <int N> __device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// Matrix descriptors (PTX ISA, "Matrix-descriptor"): tiles of rows of 128 bytes, swizzled by 128 bytes as TMA writes them, each
// tile aligned to 1024 bytes. Wider matrices are several such tiles ("panels" of 64 bf16) one after another.

/// A, or B given as [N][K]: rows of 64 contiguous k. 8 rows are 1024 bytes. Step along k by 16: + 32 bytes.
__device__ __forceinline__ uint64_t descriptor_k(const void* tile) {
  return uint64_t((shared_address(tile) & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
/// A given as [K][M] (64 m) or B as [K][N]: rows of 64 contiguous n, panels of 64 n `panel` bytes apart. Step along k by 16: + 2048 bytes.
__device__ __forceinline__ uint64_t descriptor_mn(const void* tile, uint32_t panel) {
  return uint64_t((shared_address(tile) & 0x3FFFF) >> 4) | uint64_t(panel >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}

/// Before the first wgmma, and after registers that a wgmma uses were written.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits until at most N committed groups are under way.
template <int N> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

/// Keeps the compiler from moving uses of these registers across this point.
template <int N> __device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N> __device__ __forceinline__ void pin(uint32_t (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

// A warpgroup's m64 product: thread t holds sums of rows 16·(t/32) + (t%32)/4 and that + 8; acc[4i], acc[4i + 1] are columns
// 8i + 2·(t%4) and the next of the first row, acc[4i + 2], acc[4i + 3] those of the second.
#define HEED_ACC8(d, i)                                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define HEED_QUAD8(d, i) HEED_ACC8(d, i), HEED_ACC8(d, i + 8), HEED_ACC8(d, i + 16), HEED_ACC8(d, i + 24)
#define HEED_ACC32(d) HEED_QUAD8(d, 0)
#define HEED_ACC40(d) HEED_QUAD8(d, 0), HEED_ACC8(d, 32)
#define HEED_ACC48(d) HEED_ACC40(d), HEED_ACC8(d, 40)
#define HEED_ACC64(d) HEED_QUAD8(d, 0), HEED_QUAD8(d, 32)
#define HEED_ACC80(d) HEED_ACC64(d), HEED_ACC8(d, 64), HEED_ACC8(d, 72)
#define HEED_ACC128(d) HEED_ACC64(d), HEED_QUAD8(d, 64), HEED_QUAD8(d, 96)
#define HEED_NUM8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define HEED_NUM32                                                                                         \
  HEED_NUM8(0, 1, 2, 3, 4, 5, 6, 7)                                                                        \
  "," HEED_NUM8(8, 9, 10, 11, 12, 13, 14, 15) "," HEED_NUM8(16, 17, 18, 19, 20, 21, 22, 23) "," HEED_NUM8( \
      24, 25, 26, 27, 28, 29, 30, 31)
#define HEED_NUM40 HEED_NUM32 "," HEED_NUM8(32, 33, 34, 35, 36, 37, 38, 39)
#define HEED_NUM48 HEED_NUM40 "," HEED_NUM8(40, 41, 42, 43, 44, 45, 46, 47)
#define HEED_NUM64 \
  HEED_NUM48 "," HEED_NUM8(48, 49, 50, 51, 52, 53, 54, 55) "," HEED_NUM8(56, 57, 58, 59, 60, 61, 62, 63)
#define HEED_NUM80 \
  HEED_NUM64 "," HEED_NUM8(64, 65, 66, 67, 68, 69, 70, 71) "," HEED_NUM8(72, 73, 74, 75, 76, 77, 78, 79)
#define HEED_NUM88 HEED_NUM80 "," HEED_NUM8(80, 81, 82, 83, 84, 85, 86, 87)
#define HEED_NUM128                                                                                              \
  HEED_NUM88                                                                                                     \
  "," HEED_NUM8(88, 89, 90, 91, 92, 93, 94, 95) "," HEED_NUM8(96, 97, 98, 99, 100, 101, 102, 103) "," HEED_NUM8( \
      104, 105, 106, 107, 108, 109, 110, 111) "," HEED_NUM8(112, 113, 114, 115, 116, 117, 118,                   \
                                                            119) "," HEED_NUM8(120, 121, 122, 123, 124, 125, 126, 127)
template <int N> struct Product;

// Four forms for each N: A and B from shared memory, both with contiguous k or with contiguous m and n; A from registers and B
// from shared memory with contiguous n, or with contiguous k.
#define HEED_WGMMA_REGISTER_A(NAME, TRANSPOSED, N, R, A0, A1, A2, A3, A4, A5)                                \
  static __device__ __forceinline__ void NAME(float(&d)[R], const uint32_t* a, uint64_t b, int accumulate) { \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #A5                                                    \
                 ", 0;\n"                                                                                    \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" HEED_NUM##R                    \
                 "}, {%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #A4 ", p, 1, 1, " #TRANSPOSED ";\n}"          \
                 : HEED_ACC##R(d)                                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                     \
  }
#define HEED_WGMMA_SHARED_A(NAME, TRANSPOSED, N, R, A0, A1, A2)                                       \
  static __device__ __forceinline__ void NAME(float(&d)[R], uint64_t a, uint64_t b, int accumulate) { \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #A2                                             \
                 ", 0;\n"                                                                             \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" HEED_NUM##R             \
                 "}, %" #A0 ", %" #A1 ", p, 1, 1, " #TRANSPOSED ", " #TRANSPOSED ";\n}"               \
                 : HEED_ACC##R(d)                                                                     \
                 : "l"(a), "l"(b), "r"(accumulate));                                                  \
  }
#define HEED_WGMMA(N, R, A0, A1, A2, A3, A4, A5)                         \
  template <> struct Product<N> {                                        \
    HEED_WGMMA_SHARED_A(shared_a, 0, N, R, A0, A1, A2)                   \
    HEED_WGMMA_SHARED_A(shared_a_mn, 1, N, R, A0, A1, A2)                \
    HEED_WGMMA_REGISTER_A(register_a, 1, N, R, A0, A1, A2, A3, A4, A5)   \
    HEED_WGMMA_REGISTER_A(register_a_k, 0, N, R, A0, A1, A2, A3, A4, A5) \
  };
HEED_WGMMA(64, 32, 32, 33, 34, 35, 36, 37)
HEED_WGMMA(80, 40, 40, 41, 42, 43, 44, 45)
HEED_WGMMA(96, 48, 48, 49, 50, 51, 52, 53)
HEED_WGMMA(128, 64, 64, 65, 66, 67, 68, 69)
HEED_WGMMA(160, 80, 80, 81, 82, 83, 84, 85)
HEED_WGMMA(256, 128, 128, 129, 130, 131, 132, 133)
#undef HEED_WGMMA
#undef HEED_WGMMA_SHARED_A
#undef HEED_WGMMA_REGISTER_A

// A warp's products: fragments as in the m16n8k16 form of mma (PTX ISA, "mma.m16n8k16").

/// d += a·b.
__device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/// Four 8 × 8 tiles of 16 bits, each transposed; lane l names row l % 8 of tile l / 8.
__device__ __forceinline__ void load_transposed(uint32_t (&tiles)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
               : "r"(row)
               : "memory");
}

/// Four 8 × 8 tiles of 16 bits; lane l names row l % 8 of tile l / 8.
__device__ __forceinline__ void load_tiles(uint32_t* tiles, uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
               : "r"(row)
               : "memory");
}

/// Stores four 8 × 8 tiles of 16 bits; lane l names where row l % 8 of tile l / 8 goes (16 bytes).
__device__ __forceinline__ void store_tiles(uint32_t row, const uint32_t* tiles) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(tiles[0]), "r"(tiles[1]),
               "r"(tiles[2]), "r"(tiles[3])
               : "memory");
}

/// Four numbers to shared memory.
__device__ __forceinline__ void store_four(uint32_t to, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
/// Two numbers of shared memory, read where the program says so.
__device__ __forceinline__ float2 load_two(uint32_t from) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(from) : "memory");
  return x;
}
/// Two f32 rounded to bf16, the first in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

/// Two f32 as bf16 and what rounding left, again as bf16: sixteen bits of each number.
__device__ __forceinline__ void split_bf16(float a, float b, uint32_t& high, uint32_t& low) {
  high = pack_bf16(a, b);
  low = pack_bf16(a - __uint_as_float(high << 16), b - __uint_as_float(high & 0xffff0000u));
}

/// 2^x in the special function unit; 2^−∞ = 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace heed::sm90
