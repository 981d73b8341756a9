// A tile: up to 64 query rows, one a lane, against chunks of up to 96 keys. Scores are kept transposed, S^T[key][lane],
// so that the softmax, masks and biases of a row never cross lanes, keys are read in place as rows (a page, a gathered
// token and a panel cost the same), and only queries are repacked. attend, attend_store and observe are loops over it.
#pragma once
#include "kernels/cpu/simd.h"
#include "kernels/kernels.h"

namespace heed::HEED_ISA {

inline constexpr int kTile = 64;
inline constexpr int kChunk = 96;  // a multiple of every micro-kernel's keys; S of a chunk takes 24 KB

/// What all tiles of a call share.
struct TileShape {
  int d = 0, d_v = 0;
  int factors = 0;    // r of row_factor
  bool dots = false;  // bf16 operands in pairs, by vdpbf16ps
  int rows = 0;       // whose states a worker keeps beside the tile's own
  int tiles = 1;      // that a worker takes together
};

/// The query rows of a tile. Lanes past count repeat the first one.
struct Lanes {
  int count = 0, width = 0;  // width: count rounded up to whole vectors
  int64_t row[kTile];        // in q.values
  int32_t head[kTile];
  int32_t query[kTile];               // which of its segment's queries
  alignas(64) float limit[kTile];     // the last key that causality shows
  alignas(64) float position[kTile];  // exact below 2^24
  alignas(64) float factor[kTile];    // scale · temperature
  float limit_low, limit_high, position_low, position_high;
  bool positive;  // every factor is > 0: the largest score has the largest logit
};

/// Keys that a tile meets together.
struct Chunk {
  int count = 0;
  bool masked = false;  // some `bits` are set
  float position_low, until_low;
  int32_t key[kChunk];
  const void* k[kChunk];   // rows of bf16 (dots) or f32
  const float* v[kChunk];  // rows; not with dots, which takes pairs
  float position[kChunk], until[kChunk], bias[kChunk];
  const float* factor[kChunk];   // rows of key_factor
  const uint64_t* bits[kChunk];  // the word of query 0 of the plan's tile that has the key's bit; null: no mask
  uint8_t bit[kChunk];
};

/// The online softmax of a tile: out^T[d_v][width] before division, the largest logit and the sum of each lane, in log2.
struct TileState {
  float *out, *high, *sum;
  static int64_t floats(int d_v, int width) { return int64_t(d_v + 2) * width; }
  static TileState at(float* memory, int d_v, int width) {
    return {memory, memory + int64_t(d_v) * width, memory + int64_t(d_v + 1) * width};
  }
};

/// The memory of one worker.
struct Tile {
  TileShape shape;
  float* q;        // [d][width], or pairs of bf16 [d / 2][width]
  float* s;        // [kChunk][width]
  uint32_t* p;     // pairs [kChunk / 2][width]
  float* k_rows;   // [kChunk][d]: keys that had to be converted
  float* v_rows;   // [kChunk][d_v], or pairs [kChunk / 2][d_v]
  float* factors;  // [r][width]
  float* state;    // a TileState of kTile lanes
  float* states;   // one of `rows` lanes
  float* row;      // the longer of d and d_v

  /// The i-th of its tiles: q, factors and state of its own, all else shared.
  Tile of(int i) const;

  static int64_t bytes(const TileShape& shape);
  Tile(const TileShape& shape, char* memory);
};

/// Which of a chunk's logits are more than score · factor.
struct LogitRule {
  const Mods* mods;
  bool causal;
  int q_tile;           // of the plan, and
  int64_t bits_stride;  // words between its queries' masks
  bool keyed_bias;      // chunk.bias is filled
  bool keyed_until;     // chunk.until is filled
};

/// Packs the lanes' rows of q into tile.q.
void pack_queries(const Tile& tile, const Lanes& lanes, const Tensor& q, const Tensor& row_factor);

/// tile.s = K Q^T of the chunk: dots, not yet scaled.
void scores(Tile& tile, const Lanes& lanes, const Chunk& chunk);

/// Makes tile.s logits in units of log2, −∞ where hidden, and returns true; or returns false when every lane sees every
/// key and score · factor · log2 e is all there is to do, which the reader of tile.s then does itself.
bool logits(Tile& tile, const Lanes& lanes, const Chunk& chunk, const LogitRule& rule);

void clear(TileState state, int d_v, int width, WeightFunction weight);

/// Adds a chunk to the softmax: `made` is what logits() returned. Without values only high and sum are kept.
void absorb(Tile& tile, const Lanes& lanes, const Chunk& chunk, bool made, WeightFunction weight, TileState state,
            bool values);

/// Adds the state of other keys.
void absorb(TileState into, TileState from, int d_v, int width);

/// The same for some lanes of `into`: lane i of the `count` of `from` to lane chosen[i].
void absorb(TileState into, int into_width, const int* chosen, int count, TileState from, int from_width, int d_v);

/// One more logit (natural) in a lane's sum.
void add_sink(TileState state, int d_v, int width, int lane, float logit);

/// log Σ of a lane (natural).
float log_sum(TileState state, int lane, WeightFunction weight);

/// A lane's output, times gain.
void write_lane(TileState state, int d_v, int width, int lane, float gain, WeightFunction weight, float* out);

}  // namespace heed::HEED_ISA
