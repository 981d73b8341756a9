// Products of bf16 tiles on the tensor cores of every GPU from compute capability 8.0 on (PTX ISA, "mma.m16n8k16"): one
// side's rows stay in a warp's registers, the other's pass through shared memory in stages.
#pragma once
#include "kernels/cuda/attention.cuh"

namespace heed::cuda::mma {

constexpr int kWarps = 4, kBlockRows = 16 * kWarps;  // of a block
constexpr float kLog2e = 1.4426950408889634f;

// Of 16 rows by 16 channels in registers, lane l holds rows l / 4 and l / 4 + 8, channels 2 · (l % 4), that + 1, + 8, + 9. Of a
// product of 16 rows by 8 columns it holds those rows and columns 2 · (l % 4) and that + 1.

/// sum += a · b^T
__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// 2^x to 2 parts in 2^22; what is below 2^-126 is 0.
__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/// Two numbers in one word, the first one low.
__device__ inline uint32_t pair_of(float low, float high) {
  const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&x);
}

/// What a lane holds of products with two times 8 columns, as what it holds of 16 rows by 16 channels.
__device__ inline void weights_of(const float (&first)[4], const float (&second)[4], uint32_t (&out)[4]) {
  out[0] = pair_of(first[0], first[1]), out[1] = pair_of(first[2], first[3]);
  out[2] = pair_of(second[0], second[1]), out[3] = pair_of(second[2], second[3]);
}

/// Four 8 × 8 matrices whose rows (16 bytes) lie at the addresses of lanes 0 … 7, 8 … 15, 16 … 23 and 24 … 31.
__device__ inline void load_four(uint32_t (&x)[4], const __nv_bfloat16* row) {
  const uint32_t at = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at));
}

/// The same matrices, transposed.
__device__ inline void load_four_transposed(uint32_t (&x)[4], const __nv_bfloat16* row) {
  const uint32_t at = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at));
}

/// 16 bytes to shared memory behind the program's back; zeros when not `there`.
__device__ inline void copy16(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
}
__device__ inline void copies_begun() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most N groups of copies are under way.
template <int N> __device__ inline void await_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

/// 16 · Tiles rows of bf16 in registers, D channels of each, zeros past `width`. row(i) → the row, or null.
template <int Tiles, int D> struct Held {
  uint32_t x[Tiles][D / 16][4];

  template <class Row> __device__ void load(int width, Row row) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
      const __nv_bfloat16 *low = row(16 * t + lane / 4), *high = row(16 * t + lane / 4 + 8);
#pragma unroll
      for (int s = 0; s < D / 16; ++s) {
        const int c = 16 * s + 2 * (lane % 4);
        auto pair = [&](const __nv_bfloat16* p, int at) {
          return p && at < width ? *reinterpret_cast<const uint32_t*>(p + at) : 0u;
        };
        x[t][s][0] = pair(low, c), x[t][s][1] = pair(high, c);
        x[t][s][2] = pair(low, c + 8), x[t][s][3] = pair(high, c + 8);
      }
    }
  }
};

/// A stage's rows in shared memory, padded so that eight rows' 16 bytes lie in different banks.
template <int D, int Rows = 64> struct Stage {
  __nv_bfloat16 x[Rows][D + 8];

  /// row(i) → the row, or null: zeros. `width` is a multiple of 8, rows are aligned to 16 bytes; `any` is an address there.
  template <class Row> __device__ void load(int width, const __nv_bfloat16* any, Row row) {
    for (int e = threadIdx.x; e < Rows * (D / 8); e += blockDim.x) {
      const int r = e / (D / 8), c = e % (D / 8) * 8;
      const __nv_bfloat16* from = row(r);
      const bool there = from && c < width;
      copy16(&x[r][c], there ? from + c : any, there);
    }
  }

  /// sum[t] = held rows (tile t) · the stage's rows 8 · column … + 7.
  template <int Tiles> __device__ void products(const Held<Tiles, D>& held, int column, float (&sum)[Tiles][4]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int t = 0; t < Tiles; ++t) sum[t][0] = sum[t][1] = sum[t][2] = sum[t][3] = 0;
#pragma unroll
    for (int s = 0; s < D / 16; s += 2) {
      uint32_t b[4];
      load_four(b, &x[8 * column + lane % 8][16 * s + lane / 8 * 8]);
#pragma unroll
      for (int t = 0; t < Tiles; ++t) {
        multiply(sum[t], held.x[t][s], b[0], b[1]);
        multiply(sum[t], held.x[t][s + 1], b[2], b[3]);
      }
    }
  }

  /// sum[c] += weights · rows 16 · step … + 15 of the stage, channels 8 c … 8 c + 7.
  __device__ void add_rows(const uint32_t (&weights)[4], int step, float (&sum)[D / 8][4]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
      uint32_t b[4];
      load_four_transposed(b, &x[16 * step + lane % 16][16 * c + lane / 16 * 8]);
      multiply(sum[2 * c], weights, b[0], b[1]);
      multiply(sum[2 * c + 1], weights, b[2], b[3]);
    }
  }
};

/// The keys that a block's rows can see by causality and window: low … high − 1, both in shared memory. Every lane gives
/// its rows lane / 4 and that + 8 of a warp's 16; m and n are those of all.
__device__ inline void seen_range(const AttentionView& a, const QueryRow (&rows)[2], int m, int n, int& low, int& high) {
  if (threadIdx.x == 0) low = 1 << 30, high = 0;
  __syncthreads();
  for (const QueryRow& at : rows) {
    if (!at.live || threadIdx.x % 4 != 0) continue;
    atomicMax(&high, a.plan.causal ? min(m, m - n + at.i + 1) : m);
    atomicMin(&low,
              a.mods.window > 0 && !a.mods.k_pos ? int(max(int64_t(0), min(int64_t(m), at.q_pos - a.mods.window + 1))) : 0);
  }
  __syncthreads();
}

/// Those two rows of x for Held::load.
__device__ inline auto lane_rows(const Matrix& x, const QueryRow (&rows)[2]) {
  return [&](int r) {
    const QueryRow& at = r >= 8 ? rows[1] : rows[0];
    return at.live ? x.row<const __nv_bfloat16>(at.row) : nullptr;
  };
}

/// Keys and values that a block reads, in shared memory: one stage is copied while the other is used.
template <int D, int DV, int Keys> struct KeyRing {
  Stage<D, Keys>* k;  // two each
  Stage<DV, Keys>* v;
  int (&key)[2][Keys];        // −1: none
  int64_t (&entry)[2][Keys];  // of the plan; with masks alone

  __device__ void fetch(const AttentionView& a, const QueryRow& at, const KeyStages<Keys>& stages, int slot) const {
    const int m = at.m;
    auto row = [&](const Matrix& x, int64_t first) {
      return [&, first](int j) {
        const int key = stages.key(j);
        return key < 0 || key >= m ? nullptr : x.row<const __nv_bfloat16>(first + key);
      };
    };
    k[slot].load(a.d, a.k.row<const __nv_bfloat16>(0), row(a.k, at.k_first));
    v[slot].load(a.d_v, a.v.row<const __nv_bfloat16>(0), row(a.v, at.v_first));
    copies_begun();
    for (int j = threadIdx.x; j < Keys; j += blockDim.x) {
      key[slot][j] = stages.key(j) < m ? stages.key(j) : -1;
      if (a.plan.mask) entry[slot][j] = stages.entry(j);
    }
  }
  /// Calls body(slot) for every stage; `at` is one of the rows that read them.
  template <class Body>
  __device__ void each(const AttentionView& a, const QueryRow& at, KeyStages<Keys>& stages, Body body) const {
    bool more = stages.next();
    if (more) fetch(a, at, stages, 0);
    for (int slot = 0; more; slot ^= 1) {
      more = stages.next();
      if (more) {
        fetch(a, at, stages, slot ^ 1);
        await_copies<1>();
      } else {
        await_copies<0>();
      }
      __syncthreads();
      body(slot);
      __syncthreads();
    }
  }
  /// Whether a row sees key j of a stage.
  __device__ bool shows(const AttentionView& a, const QueryRow& at, int slot, int j) const {
    return sees(a, at, key[slot][j]) &&
           mask_shows(a.plan, a.plan.mask ? entry[slot][j] : 0, at.i % a.plan.q_tile, key[slot][j]);
  }
};

/// Whether rows can be copied 16 bytes at a time.
inline bool rows_fit(const Matrix& x) {
  return x.type == Dtype::BF16 && x.stride % 8 == 0 && x.width % 8 == 0 && reinterpret_cast<uint64_t>(x.data) % 16 == 0;
}

/// The least width ≥ d that kernels are made for; 0 past 256.
inline int width_for(int d) {
  for (int width : {64, 96, 128, 192, 256})
    if (d <= width) return width;
  return 0;
}
/// Calls body.template operator()<D>() for that width; false past 256.
template <class Body> bool with_width(int d, Body&& body) {
  switch (width_for(d)) {
    case 64: body.template operator()<64>(); return true;
    case 96: body.template operator()<96>(); return true;
    case 128: body.template operator()<128>(); return true;
    case 192: body.template operator()<192>(); return true;
    case 256: body.template operator()<256>(); return true;
    default: return false;
  }
}
/// Tiles of 16 rows that a warp holds: registers for 32 rows of 128 channels.
template <int D> constexpr int kHeld = D <= 128 ? 2 : 1;

}  // namespace heed::cuda::mma
