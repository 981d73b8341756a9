// One chunk of the recurrence, as matrices that do not depend on v or the state (catalogue S2: chunked DPLR, and the WY
// form for the delta rule). Decays are running products of e^g ≤ 1: nothing overflows, and e^g = 0 is an ordinary decay.
#pragma once
#include <span>

#include "kernels/cpu/padded_rows.h"
#include "kernels/cpu/product.h"
#include "kernels/kernels.h"

namespace heed::HEED_ISA {

inline constexpr int64_t kChunkRows = 64;
inline constexpr int64_t kSubRows = 16;  // rows that vector decays are applied to one by one

/// Throws unless the inputs fit one another.
void check_recur(const char* where, const RecurInputs& in, const Recur& how);

struct RecurShape {
  Recur how;
  int64_t d = 0, d_v = 0;
  float scale = 1;
  bool keep = false;  // what the gradient of LowRank needs besides
  int64_t wide() const { return padded(d); }
  bool corrects() const { return how.correction != Recur::Correction::None; }
  bool low_rank() const { return how.correction == Recur::Correction::LowRank; }
};

/// The inputs of one segment, by row.
struct RecurSource {
  Rows q, k, v, g, a, b;
  const float* g_row = nullptr;
  const float* beta = nullptr;
  int64_t q_begin = 0, k_begin = 0, v_begin = 0, a_begin = 0;

  RecurSource(const RecurInputs& in, const Recur& how, int64_t segment)
      : q(in.q.values), k(in.k.values), v(in.v.values), q_begin(in.q.begin(segment)), k_begin(in.k.begin(segment)),
        v_begin(in.v.begin(segment)), a_begin(q_begin) {
    if (how.decay == Recur::Decay::Vector) g = Rows(in.g);
    if (how.decay == Recur::Decay::Scalar) g_row = in.g.as<float>() + q_begin;
    if (how.correction == Recur::Correction::Delta) beta = in.beta.as<float>() + q_begin;
    if (how.correction == Recur::Correction::LowRank) a = Rows(in.a), b = Rows(in.b);
  }

  /// e^g of every channel of row t, padded with ones.
  void decay(const Recur& how, int64_t t, int64_t d, float* to) const {
    const int64_t wide = padded(d);
    float all = 1;
    if (how.decay == Recur::Decay::Scalar) all = std::exp(g_row[t]);
    if (how.decay != Recur::Decay::Vector) {
      std::fill_n(to, wide, all);
      return;
    }
    g.read(q_begin + t, to);  // the padding becomes e^0
    for (int64_t c = 0; c < wide; c += kLanes) store(to + c, exp(load(to + c)));
  }
};

/// What a chunk of `rows` rows is to any block of value columns: with S the state before it,
///   Y = M V − W S (Delta) or M V + W S (LowRank); O = Aqk Y + Q S (Delta) or Aqk V + Aqb Y + Q S;
///   S ← decay ⊙ S + K Y (Delta) or K V + B Y.
struct RecurChunk {
  int64_t rows = 0, padded_rows = 0;
  float* q;        // [64, wide]: scale · q ⊙ e^G
  float* k;        // [wide, 64]: (k ⊙ e^(G_C − G))^T
  float* b;        // [wide, 64]: LowRank
  float* w;        // [64, wide]
  float* qk;       // [64, 64], lower triangular
  float* qb;       // [64, 64]: LowRank
  float* m;        // [64, 64]
  float* n;        // [64, 64]: −Aab, kept
  float* plain_m;  // [64, 64]: Aak, kept
  float* left;     // [64, wide]: a ⊙ e^G′, kept
  float* decay;    // [wide]: e^(G_C)
  float* weights;  // [64]: row sums of qk

  static int64_t floats(const RecurShape& shape) {
    const int64_t wide = shape.wide(), panel = kChunkRows * wide, square = kChunkRows * kChunkRows;
    int64_t count = 2 * panel + square + wide + kChunkRows;
    if (shape.corrects()) count += panel + square;
    if (shape.low_rank()) count += panel + square;
    if (shape.keep) count += panel + 2 * square;
    return count;
  }
  RecurChunk(const RecurShape& shape, float* memory);

  static int64_t scratch_floats(const RecurShape& shape) {
    return 5 * kChunkRows * shape.wide() + 3 * kChunkRows * kChunkRows + 2 * shape.wide() + 3 * kChunkRows +
           3 * kSubRows * shape.wide();
  }
  /// Rows first … first + rows of a segment.
  void make(const RecurShape& shape, const RecurSource& from, int64_t first, int64_t rows, float* scratch);
};

}  // namespace heed::HEED_ISA
