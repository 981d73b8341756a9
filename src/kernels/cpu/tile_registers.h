// The matrix registers of AMX: their shapes, and one instruction a function, registers named by numbers from 0 to 7.
#pragma once
#include "kernels/cpu/simd.h"

#if defined(__AMX_BF16__)

namespace heed::HEED_ISA {

/// Rows of a register and bytes of a row, register by register; the form is the processor's.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

/// What a worker sets up before it uses them and gives back after.
class TileRegisters {
 public:
  explicit TileRegisters(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory"); }
  ~TileRegisters() { asm volatile("tilerelease" ::: "memory"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

template <int T>
HEED_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
/// Rows of memory `stride` bytes apart. Rows that cross lines take six times as long.
template <int T>
HEED_INLINE void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
HEED_INLINE void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
/// Sum += A · B of pairs of bf16: A [rows][words], B [words][columns].
template <int Sum, int A, int B>
HEED_INLINE void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
}

}  // namespace heed::HEED_ISA

#endif
