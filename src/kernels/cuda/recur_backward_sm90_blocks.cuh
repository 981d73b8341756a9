// Second step of recur_backward_sm90.cu: gradients of blocks of 128 rows, all at once, from the state before each and the
// gradient of the state behind it. Two warpgroups of 64 rows each, which are queries of one and keys of another product, and
// one that loads.
//
// With U what rows add to the state (V without the delta rule), D_ij = e^(G_i − G_j), and S and dS as in the walks:
//   A_ij = scale D_ij dO_i · U_j (j ≤ i),       E_ij = −D_ij d_v_i · U_j (j < i; delta rule)
//   d_q = A K + scale e^G dO S^T
//   d_k = A^T Q + e^(G_end − G) U dS^T + (delta rule) E K + E^T K − e^G d_v S^T
//   d_v = P^T dO + e^(G_end − G) K dS (without the delta rule)
//   d_β_i = (d_v_i / β_i) · (U_i / β_i)
//   d_g_t = Σ_{i ≥ t > j} (A_ij q_i · k_j + E_ij k_i · k_j) + Σ_{i ≥ t} x_i + Σ_{j < t} y_j + e^G_end ⟨S, dS⟩
// with x_i what q_i and, as a query, k_i meet of S, and y_j what k_j meets of dS: no large sums that cancel.
#pragma once
#include "kernels/cuda/recur_backward_sm90_walk.cuh"

namespace heed::cuda {
namespace {

struct Slots {  // kHeld bytes each
  // Delta rule: `values` are U, `behind` holds d_v, and `before` first S, then dS.
  static constexpr int d_out = 0, values = 1, keys = 2, queries = 3, before = 4, behind = 5, count = 6;
  // Rows of gradients on their way out, by each warpgroup 2 × 64 rows of 32 columns.
  static constexpr int at_rows = count * kHeld, at_sums = at_rows + 4 * kPanel, at_lines = at_sums + kBlock * 8,
                       at_barriers = at_lines + (3 * kBlock + 64 + 8) * 4, shared = at_barriers + 128;
  static_assert(shared <= 227 * 1024);
};

struct BlocksOf {
  int s, n, blocks;
  int64_t q, k, v, first;  // first: of blocks in scratch memory
};

/// One thread has blocks brought, in the order in which their places come free.
template <bool Delta>
__device__ __forceinline__ void bring_blocks(const Back& a, const BlocksOf& at, uint8_t* memory, uint64_t* full,
                                             uint64_t* empty) {
  int nth = 0;
  for (int block = blockIdx.x; block < at.blocks; block += gridDim.x, ++nth) {
    const int row = block * kBlock;
    auto claim = [&](int slot, int use) {
      barrier_wait(empty + slot, uint32_t(use + 1) & 1);
      barrier_expect(full + slot, kHeld);
      return memory + slot * kHeld;
    };
    auto held = [&](int slot, int use, const uint8_t* from) {
      bulk_load(claim(slot, use), from + (at.first + block) * kHeld, kHeld, full + slot);
    };
    auto rows = [&](int slot, const CUtensorMap& map, int64_t begin) {
      uint8_t* to = claim(slot, nth);
      for (int i = 0; i < 4; ++i)
        tma_load(to + i * kPanel, &map, full + slot, i / 2 * 64, int(begin) + row + i % 2 * 64);
    };
    if constexpr (Delta) {
      held(Slots::d_out, nth, a.d_outs);
      rows(Slots::queries, a.q, at.q);
      held(Slots::behind, nth, a.d_values);
      rows(Slots::keys, a.k, at.k);
      held(Slots::before, 2 * nth, a.states);
      held(Slots::values, nth, a.values);
      held(Slots::before, 2 * nth + 1, a.d_states);
    } else {
      held(Slots::before, nth, a.states);
      held(Slots::d_out, nth, a.d_outs);
      rows(Slots::keys, a.k, at.k);
      rows(Slots::values, a.v, at.v);
      rows(Slots::queries, a.q, at.q);
      held(Slots::behind, nth, a.d_states);
    }
  }
}

/// A warp makes the sums of log decays of each block's rows, a lane those of four.
__device__ __forceinline__ void sum_blocks(const Back& a, const BlocksOf& at, uint8_t* memory, uint64_t* full,
                                           uint64_t* empty) {
  const int lane = threadIdx.x % 32;
  const bool scalar = a.in.decay == Recur::Decay::Scalar;
  int nth = 0;
  for (int block = blockIdx.x; block < at.blocks; block += gridDim.x, ++nth) {
    double sum[4], before = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = block * kBlock + 4 * lane + i;
      before += scalar && row < at.n ? fmaxf(*a.in.g.template row<float>(at.q + row), -1000.0f) : 0;
      sum[i] = before;
    }
    const double own = before;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const double other = __shfl_up_sync(~0u, before, step);
      if (lane >= step) before += other;
    }
    before -= own;
    barrier_wait(empty, uint32_t(nth + 1) & 1);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      reinterpret_cast<float2*>(memory + Slots::at_sums)[4 * lane + i] = in_two(before + sum[i]);
    warp_arrive(full);
  }
}

/// Sums over a warp's 16 rows of 64 columns, of which lanes hold two rows' as accumulators do, already added: to [64].
__device__ __forceinline__ void add_rows_up(const float (&x)[16], float* to) {
  const int lane = threadIdx.x % 32;
  float four[8], two[4], one[2];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bool upper = lane & 16;
    four[i] = (upper ? x[8 + i] : x[i]) + __shfl_xor_sync(~0u, upper ? x[i] : x[8 + i], 16);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool upper = lane & 8;
    two[i] = (upper ? four[4 + i] : four[i]) + __shfl_xor_sync(~0u, upper ? four[i] : four[4 + i], 8);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool upper = lane & 4;
    one[i] = (upper ? two[2 + i] : two[i]) + __shfl_xor_sync(~0u, upper ? two[i] : two[2 + i], 4);
  }
  *reinterpret_cast<float2*>(to + (lane / 16 * 4 + lane / 8 % 2 * 2 + lane / 4 % 2) * 8 + lane % 4 * 2) = {one[0], one[1]};
}

/// The warpgroups that compute. Gated: there is a decay, or its gradient is wanted.
template <bool Delta, bool Gated>
__device__ __forceinline__ void differentiate(const Back& a, const BlocksOf& at, uint8_t* memory, uint64_t* full,
                                              uint64_t* empty) {
  const int w = uniform(threadIdx.x / 128), tid = threadIdx.x % 128, warp = uniform(tid / 32), lane = tid % 32,
            c0 = lane % 4 * 2, top = 64 * w + 16 * warp + lane / 4;
  auto slot = [&](int i) { return memory + i * kHeld; };
  uint8_t* staging = memory + Slots::at_rows + w * 2 * kPanel;
  const float2* sums = reinterpret_cast<const float2*>(memory + Slots::at_sums);
  // Of d_g: what stands for one row, what keys meet of dS, column sums of keys' rows 0 … 63 and 64 …; ⟨S, dS⟩ by warps.
  float *own = reinterpret_cast<float*>(memory + Slots::at_lines), *behind = own + kBlock, *across = behind + kBlock,
        *dots = across + kBlock + 64;
  int nth = 0;
  for (int block = blockIdx.x; block < at.blocks; block += gridDim.x, ++nth) {
    const int rows = min(kBlock, at.n - block * kBlock);
    const uint32_t parity = uint32_t(nth) & 1;
    auto await = [&](int i, uint32_t of) { barrier_wait(full + i, of); };
    auto release = [&](int i) { warp_arrive(empty + i); };
    if (Gated) await(Slots::count, parity);
    await(Slots::d_out, parity), await(Slots::values, parity);
    if (rows < kBlock) {  // rows of others, or of nobody
      await(Slots::keys, parity), await(Slots::queries, parity);
      if (Delta) await(Slots::behind, parity);
      const int lines = (kBlock - rows) * 16;
      for (int e = threadIdx.x; e < (Delta ? 5 : 4) * lines; e += 256) {
        const int of = e / lines, at_line = e % lines;
        *reinterpret_cast<uint4*>(slot(of == 4 ? Slots::behind : of) + at_line / 8 % 2 * 2 * kPanel +
                                  (rows + at_line / 16) * 128 + at_line % 8 * 16) = {};
      }
      proxy_fence();
    }
    if (Gated || rows < kBlock) named_sync(1, 256);  // and numbers of the block before are read
    float2 sum_of[2] = {}, end = {};
    float by_start[2] = {1, 1}, to_end[2] = {1, 1};
    if constexpr (Gated) {
      sum_of[0] = sums[top], sum_of[1] = sums[top + 8], end = sums[kBlock - 1];
#pragma unroll
      for (int r = 0; r < 2; ++r) by_start[r] = decayed(sum_of[r], {0, 0}), to_end[r] = decayed(end, sum_of[r]);
    }

    uint32_t frag[32], p[16];
    float acc[64], pairs[32];
    auto take = [&](int from) {  // this warpgroup's rows as an A operand
      const uint32_t panel = shared_address(slot(from)) + uint32_t(w) * kPanel;
#pragma unroll
      for (int k = 0; k < 8; ++k)
        load_tiles(frag + 4 * k, panel + k / 4 * 2 * kPanel + swizzled(16 * warp + lane % 16, k % 4 * 2 + lane / 16));
      pin(frag);
    };
    auto along = [](int k) { return uint64_t(k / 4 * (2 * kPanel / 16) + k % 4 * 2); };
    auto rows_k = [&](int from, int half) { return descriptor_k(slot(from) + half * kPanel); };
    // x = frag · (64 rows)^T
    auto scores = [&](float(&x)[32], int from, int half) {
      const uint64_t b = rows_k(from, half);
#pragma unroll
      for (int k = 0; k < 8; ++k) Product<64>::register_a_k(x, frag + 4 * k, b + along(k), k > 0);
    };
    // x = rows of this warpgroup · (64 rows)^T, both from shared memory
    auto products = [&](float(&x)[32], int of, int from, int half) {
      const uint64_t l = rows_k(of, w), r = rows_k(from, half);
#pragma unroll
      for (int k = 0; k < 8; ++k) Product<64>::shared_a(x, l + along(k), r + along(k), k > 0);
    };
    // acc = frag · a state, whose rows are columns of v
    auto meet = [&](float(&x)[64], int from) {
      const uint64_t b = descriptor_mn(slot(from), 2 * kPanel);
#pragma unroll
      for (int k = 0; k < 8; ++k) Product<128>::register_a(x, frag + 4 * k, b + k * (2048 / 16), k > 0);
    };
    // acc += p · (64 rows)
    auto add = [&](const uint32_t(&x)[16], int from, int half) {
      const uint64_t b = descriptor_mn(slot(from) + half * kPanel, 2 * kPanel);
#pragma unroll
      for (int k = 0; k < 4; ++k) Product<128>::register_a(acc, x + 4 * k, b + k * (2048 / 16), 1);
    };
    auto settle = [&] {
      wgmma_wait<0>();
      pin(acc), pin(frag);
    };
    // Queries in rows: pairs times factor and decay, on (unless strict) and below the diagonal, as an A operand.
    auto weigh = [&](bool diagonal, bool strict, int half, float factor) {
      if constexpr (Gated) {
#pragma unroll
        for (int t = 0; t < 8; ++t) {
          const float4 of = *reinterpret_cast<const float4*>(sums + 64 * half + 8 * t + c0);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            pairs[4 * t + 2 * r] *= decayed(sum_of[r], {of.x, of.y});
            pairs[4 * t + 2 * r + 1] *= decayed(sum_of[r], {of.z, of.w});
          }
        }
      }
      const int seen = diagonal ? 16 * warp + lane / 4 + !strict : 1 << 20;  // columns below it
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int column = i / 2 * 8 + c0, limit = seen + i % 2 * 8;
        p[i] = pack_bf16(column < limit ? factor * pairs[2 * i] : 0, column + 1 < limit ? factor * pairs[2 * i + 1] : 0);
      }
      pin(p);
    };
    auto dot_rows = [&](int from, float(&to)[2]) {  // adds acc · rows of `from`, a quad's shares
#pragma unroll
      for (int t = 0; t < 16; ++t)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint32_t x = *reinterpret_cast<const uint32_t*>(slot(from) + t / 8 * 2 * kPanel +
                                                                swizzled(top + 8 * r, t % 8) + c0 * 2);
          to[r] += acc[4 * t + 2 * r] * __uint_as_float(x << 16) + acc[4 * t + 2 * r + 1] * __uint_as_float(x & 0xffff0000u);
        }
    };
    auto scale_rows = [&](float x, float y) {
#pragma unroll
      for (int i = 0; i < 64; ++i) acc[i] *= i / 2 % 2 ? y : x;
      pin(acc);
    };
    auto put = [&](const Matrix& m, const CUtensorMap& map, bool lined, int64_t begin) {
      if (!m) return;
      if (lined && rows == kBlock) {
#pragma unroll
        for (int piece = 0; piece < 4; ++piece) {
          uint8_t* to = staging + piece % 2 * kPanel;
          if (tid == 0) bulk_wait_read<1>();
          named_sync(2 + w, 128);
#pragma unroll
          for (int t = 0; t < 4; ++t)
#pragma unroll
            for (int r = 0; r < 2; ++r)
              *reinterpret_cast<float2*>(to + swizzled(16 * warp + lane / 4 + 8 * r, 2 * t + c0 / 4) + c0 % 4 * 4) = {
                  acc[16 * piece + 4 * t + 2 * r], acc[16 * piece + 4 * t + 2 * r + 1]};
          proxy_fence();
          named_sync(2 + w, 128);
          if (tid == 0) tma_store(to, &map, 32 * piece, int(begin) + block * kBlock + 64 * w);
        }
      } else {
#pragma unroll
        for (int i = 0; i < 64; ++i) {
          const int row = top + i / 2 % 2 * 8, c = i / 4 * 8 + c0 + i % 2;
          if (row < rows && c < m.width) m.template row<float>(begin + block * kBlock + row)[c] = acc[i];
        }
      }
    };
    // Keys in rows: factor times decay of `values · rows of from` at and behind the diagonal (unless strict), an A operand;
    // and its share of d_g, with what `keys · rows of met` is. Without the delta rule that is an A operand too (`also`).
    float less[2] = {}, columns[16] = {};
    auto weigh_keys = [&](bool diagonal, bool strict, int half, int from, int met, float factor, uint32_t(&to)[16],
                          uint32_t* also) {
      float other[32];
      const bool meets = also || Gated;
      wgmma_fence();
      products(pairs, Slots::values, from, half);
      if (meets) products(other, Slots::keys, met, half);
      wgmma_commit();
      wgmma_wait<0>();
      pin(pairs);
      if (meets) pin(other);
      const int seen = diagonal ? 16 * warp + lane / 4 : -64, first = seen + strict;  // columns behind it, and from here on
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        float decay[2][2] = {{factor, factor}, {factor, factor}};
        if constexpr (Gated) {
          const float4 of = *reinterpret_cast<const float4*>(sums + 64 * half + 8 * t + c0);
#pragma unroll
          for (int r = 0; r < 2; ++r)
            decay[r][0] *= decayed({of.x, of.y}, sum_of[r]), decay[r][1] *= decayed({of.z, of.w}, sum_of[r]);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float x[2], y[2] = {};
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = 8 * t + c0 + e, i = 4 * t + 2 * r + e;
            const bool there = column >= first + 8 * r;
            x[e] = there ? decay[r][e] * pairs[i] : 0;
            if (also) y[e] = there ? decay[r][e] * other[i] : 0;
            if constexpr (Gated) {
              const float both = column > seen + 8 * r ? x[e] * other[i] : 0;
              less[r] += both, columns[2 * t + e] += both;
            }
          }
          to[2 * t + r] = pack_bf16(x[0], x[1]);
          if (also) also[2 * t + r] = pack_bf16(y[0], y[1]);
        }
      }
      pin(to);
    };

    // acc += what was weighed, and for the second warpgroup keys before it. A stage of products has no branch inside: the
    // compiler would serialise it.
    auto add_queries = [&](bool strict, float factor) {
      wgmma_fence();
      add(p, Slots::keys, w);
      wgmma_commit();
      settle();
      pin(p);
      if (w == 0) return;
      wgmma_fence();
      scores(pairs, Slots::values, 0);
      wgmma_commit();
      settle();
      pin(pairs);
      weigh(false, strict, 0, factor);
      wgmma_fence();
      add(p, Slots::keys, 0);
      wgmma_commit();
      settle();
      pin(p);
    };
    auto add_keys = [&](uint32_t(&x)[16], int from, int half) {
      pin(x);
      wgmma_fence();
      add(x, from, half);
      wgmma_commit();
      settle();
      pin(x);
    };
    // Column sums of the pairs' shares of d_g: [2][4 warps][64] in staging, then summed in order of warps.
    float* partial = reinterpret_cast<float*>(staging);
    auto open_across = [&] {
      if (!Gated) return;
      if (tid == 0) bulk_wait_read();
      named_sync(2 + w, 128);
    };
    auto put_across = [&](int half) {
      if (Gated) add_rows_up(columns, partial + (4 * half + warp) * 64);
    };
    auto close_across = [&] {
      if (!Gated) return;
      named_sync(2 + w, 128);
      const float* from = partial + tid / 64 * 256 + tid % 64;
      if (tid < 64 || w == 0) across[w * kBlock + tid] = (from[0] + from[64]) + (from[128] + from[192]);
    };

    // What this warpgroup's rows meet as queries: of d_out, or with the delta rule of d_v with keys as queries.
    float meets[2] = {};
    auto as_queries = [&](bool strict, int from, int as, float factor) {
      await(from, parity);
      take(from);
      wgmma_fence();
      scores(pairs, Slots::values, w);
      wgmma_commit();
      meet(acc, Slots::before);
      wgmma_commit();
      wgmma_wait<1>();
      pin(pairs);
      weigh(true, strict, w, factor);
      settle();
      scale_rows(factor * by_start[0], factor * by_start[1]);
      await(as, parity);
      if (Gated) dot_rows(as, meets);
      add_queries(strict, factor);
    };
    float dot = 0;
    auto dot_states = [&](const uint4* first, const uint8_t* second) {
      uint4 one[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) one[i] = first[threadIdx.x + 256 * i];
      if constexpr (Delta) await(Slots::before, 1);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float x[8], y[8];
        unpack8<__nv_bfloat16>(one[i], x);
        unpack8<__nv_bfloat16>(reinterpret_cast<const uint4*>(second)[threadIdx.x + 256 * i], y);
#pragma unroll
        for (int e = 0; e < 8; ++e) dot += x[e] * y[e];
      }
    };
    await(Slots::keys, parity);
    await(Slots::before, Delta ? 0 : parity);
    if constexpr (Delta) {  // one body for both: less code than the instruction cache holds
#pragma unroll 1
      for (int pass = 0; pass < 2; ++pass) {
        as_queries(pass, pass ? Slots::behind : Slots::d_out, pass ? Slots::keys : Slots::queries, pass ? -1 : a.in.scale);
        if (pass == 0) put(a.to.q, a.d_q, a.lined_q, at.q);
      }
      release(Slots::before);
    } else {
      as_queries(false, Slots::d_out, Slots::queries, a.in.scale);
      await(Slots::behind, parity);
      if (Gated) dot_states(reinterpret_cast<const uint4*>(slot(Slots::before)), slot(Slots::behind));
      release(Slots::before);
      put(a.to.q, a.d_q, a.lined_q, at.q);
    }

    if constexpr (!Delta) {
      uint32_t value_p[2][16], key_p[2][16];
      open_across();
      weigh_keys(true, false, w, Slots::d_out, Slots::queries, a.in.scale, key_p[0], value_p[0]);
      put_across(0);
      if (w == 0) {
#pragma unroll
        for (float& x : columns) x = 0;
        weigh_keys(false, false, 1, Slots::d_out, Slots::queries, a.in.scale, key_p[1], value_p[1]);
        put_across(1);
      }
      close_across();
      take(Slots::keys);
      wgmma_fence();
      {
        const uint64_t b = descriptor_k(slot(Slots::behind));
#pragma unroll
        for (int k = 0; k < 8; ++k) Product<128>::register_a_k(acc, frag + 4 * k, b + along(k), k > 0);
      }
      wgmma_commit();
      settle();
      scale_rows(to_end[0], to_end[1]);
      float met[2] = {};
      if (Gated) dot_rows(Slots::values, met);
      add_keys(value_p[0], Slots::d_out, w);
      if (w == 0) add_keys(value_p[1], Slots::d_out, 1);
      release(Slots::d_out), release(Slots::keys);
      put(a.to.v, a.d_v, a.lined_v, at.v);

      take(Slots::values);
      wgmma_fence();
      meet(acc, Slots::behind);
      wgmma_commit();
      settle();
      scale_rows(to_end[0], to_end[1]);
      add_keys(key_p[0], Slots::queries, w);
      if (w == 0) add_keys(key_p[1], Slots::queries, 1);
      if (Gated)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float x = warp_sum(meets[r] - less[r], 4), y = warp_sum(met[r], 4);
          if (c0 == 0) own[top + 8 * r] = x, behind[top + 8 * r] = y;
        }
      release(Slots::values), release(Slots::queries), release(Slots::behind);
      put(a.to.k, a.d_k, a.lined_k, at.k);
    } else {
      open_across();
#pragma unroll 1
      for (int half = w; half < 2; ++half) {
#pragma unroll
        for (float& x : columns) x = 0;
#pragma unroll 1
        for (int pass = 0; pass < 2; ++pass) {
          const int from = pass ? Slots::behind : Slots::d_out, met = pass ? Slots::keys : Slots::queries;
          weigh_keys(half == w, pass, half, from, met, pass ? -1 : a.in.scale, p, nullptr);
          add_keys(p, met, half);
        }
        put_across(half != w);
      }
      close_across();
      if (a.to.v)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int row = threadIdx.x / 16 + 16 * i, piece = threadIdx.x % 16;
          float x[8];
          unpack8<__nv_bfloat16>(
              *reinterpret_cast<const uint4*>(slot(Slots::behind) + piece / 8 * 2 * kPanel + swizzled(row, piece % 8)), x);
          if (row < rows)
            store8(a.to.v.template row<float>(at.v + block * kBlock + row), 8 * piece, a.to.v.width - 8 * piece, x);
        }
      if (a.to.beta) {
        const int row = threadIdx.x / 2;
        const float over = row < rows ? 1 / some_beta(a.in.beta[at.q + block * kBlock + row]) : 1;
        const int panel = threadIdx.x % 2 * 2 * kPanel;
        float sum = 0;
#pragma unroll
        for (int piece = 0; piece < 8; ++piece) {
          const int of = panel + swizzled(row, piece);
          float x[8], y[8];
          unpack8<__nv_bfloat16>(*reinterpret_cast<const uint4*>(slot(Slots::behind) + of), x);
          unpack8<__nv_bfloat16>(*reinterpret_cast<const uint4*>(slot(Slots::values) + of), y);
#pragma unroll
          for (int i = 0; i < 8; ++i) sum += x[i] * over * (y[i] * over);
        }
        sum += __shfl_xor_sync(~0u, sum, 1);
        if (row < rows && threadIdx.x % 2 == 0) a.to.beta[at.q + block * kBlock + row] = sum;
      }
      release(Slots::d_out), release(Slots::queries), release(Slots::behind);
      if constexpr (Gated)
        dot_states(reinterpret_cast<const uint4*>(a.states + (at.first + block) * kHeld), slot(Slots::before));
      else release(Slots::keys);
      take(Slots::values);
      await(Slots::before, 1);
      float state[64];
      wgmma_fence();
      meet(state, Slots::before);
      wgmma_commit();
      wgmma_wait<0>();
      pin(state), pin(frag);
      float met[2] = {};
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        const float x = state[i] * to_end[i / 2 % 2];
        state[i] = acc[i] + x;
        acc[i] = x;
      }
      if (Gated) {
        dot_rows(Slots::keys, met);
        release(Slots::keys);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float x = warp_sum(meets[r] - less[r], 4), y = warp_sum(met[r], 4);
          if (c0 == 0) own[top + 8 * r] = x, behind[top + 8 * r] = y;
        }
      }
#pragma unroll
      for (int i = 0; i < 64; ++i) acc[i] = state[i];
      release(Slots::before), release(Slots::values);
      put(a.to.k, a.d_k, a.lined_k, at.k);
    }

    if constexpr (Gated) {
      dot = warp_sum(dot);
      if (lane == 0) dots[4 * w + warp] = dot;
      named_sync(1, 256);
      if (w == 0 && warp == 0) {
        float sum = 0, x[4], y[4];
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += dots[i];
        sum *= decayed(end, {0, 0});
        float rows_sum = 0, keys_sum = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = 4 * lane + i;
          y[i] = keys_sum, keys_sum += behind[row];
          x[i] = own[row] + across[row] + (row < 64 ? 0 : across[kBlock + row - 64]);
        }
#pragma unroll
        for (int i = 3; i >= 0; --i) rows_sum += x[i], x[i] = rows_sum;
        const float own_rows = rows_sum, own_keys = keys_sum;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
          const float later = __shfl_down_sync(~0u, rows_sum, step), sooner = __shfl_up_sync(~0u, keys_sum, step);
          if (lane + step < 32) rows_sum += later;
          if (lane >= step) keys_sum += sooner;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = 4 * lane + i;
          if (a.to.g && row < rows)
            *a.to.g.template row<float>(at.q + block * kBlock + row) = sum + (x[i] + (rows_sum - own_rows)) +
                                                                       (y[i] + (keys_sum - own_keys));
        }
      }
    }
    if (Gated) release(Slots::count);
  }
  if (tid == 0) bulk_wait_read();
}

/// Grid: blocks of a segment that are worked on at a time, segments.
template <bool Delta, bool Gated>
__global__ void __launch_bounds__(384, 1) blocks_kernel(const __grid_constant__ Back a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // the build also makes PTX for GPUs that lack all this; nothing starts it there
  extern __shared__ __align__(1024) uint8_t memory[];
  uint64_t *full = reinterpret_cast<uint64_t*>(memory + Slots::at_barriers), *empty = full + Slots::count + 1;
  BlocksOf at;
  at.s = blockIdx.y, at.n = a.in.qs.length(at.s), at.blocks = (at.n + kBlock - 1) / kBlock, at.first = first_block(a, at.s);
  at.q = a.in.qs.begin(at.s), at.k = a.in.ks.begin(at.s), at.v = a.in.vs.begin(at.s);
  if (threadIdx.x == 0) {
    for (int i = 0; i <= Slots::count; ++i)
      barrier_init(full + i, i == Slots::count ? kWarpArrivals : 1), barrier_init(empty + i, 8 * kWarpArrivals);
    barrier_init_fence();
  }
  __syncthreads();
  if (uniform(threadIdx.x / 128) == 2) {
    registers_down<40>();
    if (threadIdx.x == 256) bring_blocks<Delta>(a, at, memory, full, empty);
    else if (Gated && threadIdx.x >= 288 && threadIdx.x < 320)
      sum_blocks(a, at, memory, full + Slots::count, empty + Slots::count);
  } else {
    registers_up<232>();
    differentiate<Delta, Gated>(a, at, memory, full, empty);
  }
#endif
}

}  // namespace
}  // namespace heed::cuda
