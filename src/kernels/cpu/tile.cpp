#include "kernels/cpu/tile.h"

#include <algorithm>

#include "kernels/cpu/convert.h"
#include "kernels/cpu/tile_products.h"

namespace heed::HEED_ISA {
namespace {

constexpr float kLn2 = 0.693147181f;

int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

int64_t Tile::bytes(const TileShape& shape) {
  const int64_t d = shape.d, d_v = shape.d_v;
  const int64_t own = d * kTile + int64_t(shape.factors) * kTile + TileState::floats(int(d_v), kTile);
  return shape.tiles * own * 4 + kChunk * kTile * 4 + kChunk / 2 * kTile * 4 + round_up(kChunk * d * 4) +
         round_up(kChunk * d_v * 4) + round_up(TileState::floats(int(d_v), shape.rows) * 4) +
         round_up(std::max(d, d_v) * 4);
}

Tile::Tile(const TileShape& of, char* memory) : shape(of) {
  auto take = [&](int64_t bytes) {
    char* at = memory;
    memory += round_up(bytes);
    return reinterpret_cast<float*>(at);
  };
  const int64_t d = of.d, d_v = of.d_v;
  q = take(of.tiles * d * kTile * 4);
  s = take(kChunk * kTile * 4);
  p = reinterpret_cast<uint32_t*>(take(kChunk / 2 * kTile * 4));
  k_rows = take(kChunk * d * 4);
  v_rows = take(kChunk * d_v * 4);
  factors = take(of.tiles * int64_t(of.factors) * kTile * 4);
  state = take(of.tiles * TileState::floats(int(d_v), kTile) * 4);
  states = take(TileState::floats(int(d_v), of.rows) * 4);
  row = take(std::max(d, d_v) * 4);
}

Tile Tile::of(int i) const {
  Tile out = *this;
  out.q += int64_t(i) * shape.d * kTile;
  out.factors += int64_t(i) * shape.factors * kTile;
  out.state += i * TileState::floats(shape.d_v, kTile);
  return out;
}

void pack_queries(const Tile& tile, const Lanes& lanes, const Tensor& q, const Tensor& row_factor) {
  const int d = tile.shape.d, width = lanes.width;
  for (int lane = 0; lane < width; ++lane) {
    const int64_t row = lanes.row[lane < lanes.count ? lane : 0];
    if (tile.shape.dots) {
      const auto* from = reinterpret_cast<const char*>(q.as<bf16>() + row * q.stride[0]);
      for (int c = 0; c < d / 2; ++c) std::memcpy(tile.q + int64_t(c) * width + lane, from + 4 * c, 4);
    } else {
      const float* from = widen_row(row_of(q, row), q.type, d, tile.row);
      for (int c = 0; c < d; ++c) tile.q[int64_t(c) * width + lane] = from[c];
    }
    for (int r = 0; r < tile.shape.factors; ++r)
      tile.factors[r * width + lane] = row_factor.as<float>()[row * row_factor.stride[0] + r * row_factor.stride[1]];
  }
}

void scores(Tile& tile, const Lanes& lanes, const Chunk& chunk) {
#if defined(HEED_BF16_DOT)
  if (tile.shape.dots)
    return score_tile<PairMath>(chunk, reinterpret_cast<const uint32_t*>(tile.q), lanes.width, tile.shape.d / 2, tile.s);
#endif
  score_tile<PlainMath>(chunk, tile.q, lanes.width, tile.shape.d, tile.s);
}

bool logits(Tile& tile, const Lanes& lanes, const Chunk& chunk, const LogitRule& rule) {
  const Mods& mods = *rule.mods;
  const float last_key = float(chunk.key[chunk.count - 1]);
  const bool causal = rule.causal && last_key > lanes.limit_low;
  const bool window = mods.window > 0 && lanes.position_high - chunk.position_low >= float(mods.window);
  const bool until = rule.keyed_until && chunk.until_low < lanes.position_high;
  const bool cap = mods.softcap > 0;
  if (!causal && !window && !until && !cap && !rule.keyed_bias && tile.shape.factors == 0 && !chunk.masked && lanes.positive)
    return false;

  const int width = lanes.width;
  const F hidden = set(-kInfinity), to_log2 = set(kLog2e);
  for (int j = 0; j < chunk.count; ++j) {
    float* s = tile.s + int64_t(j) * width;
    const float key = float(chunk.key[j]);
    for (int w = 0; w < width; w += kLanes) {
      F x = load(s + w) * load(lanes.factor + w);
      if (cap) x = set(mods.softcap) * tanh(x * set(1 / mods.softcap));
      if (rule.keyed_bias) x = x + set(chunk.bias[j]);
      for (int r = 0; r < tile.shape.factors; ++r)
        x = fma(load(tile.factors + r * width + w), set(chunk.factor[j][r]), x);
      x = x * to_log2;
      const F position = load(lanes.position + w);
      if (causal) x = where(less_equal(set(key), load(lanes.limit + w)), x, hidden);
      if (window) x = where(less(position - set(chunk.position[j]), set(float(mods.window))), x, hidden);
      if (until) x = where(less_equal(position, set(chunk.until[j])), x, hidden);
      store(s + w, x);
    }
    if (chunk.bits[j])
      for (int lane = 0; lane < width; ++lane) {
        const int64_t query = lanes.query[lane] % rule.q_tile;
        if (!(chunk.bits[j][query * rule.bits_stride] >> chunk.bit[j] & 1)) s[lane] = -kInfinity;
      }
  }
  return true;
}

void clear(TileState state, int d_v, int width, WeightFunction weight) {
  std::fill_n(state.out, int64_t(d_v) * width, 0.0f);
  std::fill_n(state.high, width, weight == WeightFunction::Softmax ? -kInfinity : 0.0f);
  std::fill_n(state.sum, width, 0.0f);
}

namespace {

/// tile.s → weights (in tile.s, or as pairs in tile.p) and their sums; keep: what the earlier outputs are worth now.
template <bool Dots, bool Values>
void weigh(Tile& tile, const Lanes& lanes, int count, bool made, TileState state, float* keep) {
  const int width = lanes.width;
  for (int w = 0; w < width; w += kLanes) {
    float* s = tile.s + w;
    // Where logits are not made yet factors are positive, so the largest score has the largest logit.
    const F factor = made ? set(1) : load(lanes.factor + w) * set(kLog2e);
    F top[4] = {load(s), load(s), load(s), load(s)};  // four chains: a maximum takes several cycles
    int j = 0;
    for (; j + 4 <= count; j += 4)
      for (int i = 0; i < 4; ++i) top[i] = max(top[i], load(s + int64_t(j + i) * width));
    for (; j < count; ++j) top[0] = max(top[0], load(s + int64_t(j) * width));
    const F before = load(state.high + w);
    const F high = max(before, max(max(top[0], top[1]), max(top[2], top[3])) * factor);
    const F shift = where(less(set(-kInfinity), high), high, zero());
    const F rest = exp2(before - shift);
    store(state.high + w, high);
    store(keep + w, rest);
    F sum[2] = {load(state.sum + w) * rest, zero()};
    const F less_shift = zero() - shift;
#if defined(HEED_BF16_DOT)
    if constexpr (Dots && Values) {
      // The error of a degree-3 exponential is a twentieth of the rounding to bf16 that follows.
      for (j = 0; j + 2 <= count; j += 2) {
        const F even = exp2<3>(fma(load(s + int64_t(j) * width), factor, less_shift));
        const F odd = exp2<3>(fma(load(s + int64_t(j + 1) * width), factor, less_shift));
        sum[0] = sum[0] + even;
        sum[1] = sum[1] + odd;
        _mm512_storeu_si512(tile.p + int64_t(j / 2) * width + w, pair_bf16(even, odd));
      }
      if (j < count) {
        const F even = exp2<3>(fma(load(s + int64_t(j) * width), factor, less_shift));
        sum[0] = sum[0] + even;
        _mm512_storeu_si512(tile.p + int64_t(j / 2) * width + w, pair_bf16(even, zero()));
      }
      store(state.sum + w, sum[0] + sum[1]);
      continue;
    }
#endif
    for (j = 0; j < count; ++j) {
      const F x = exp2(fma(load(s + int64_t(j) * width), factor, less_shift));
      sum[j & 1] = sum[j & 1] + x;
      if constexpr (Values) store(s + int64_t(j) * width, x);
    }
    store(state.sum + w, sum[0] + sum[1]);
  }
}

/// The same for weights σ(x), which have no maximum and are never rescaled.
void weigh_sigmoid(Tile& tile, const Lanes& lanes, int count, bool made, TileState state, float* keep) {
  const int width = lanes.width;
  for (int w = 0; w < width; w += kLanes) {
    const F factor = made ? set(1) : load(lanes.factor + w) * set(kLog2e);
    store(keep + w, set(1));
    F sum = load(state.sum + w);
    for (int j = 0; j < count; ++j) {
      float* s = tile.s + int64_t(j) * width + w;
      const F x = set(1) / (set(1) + exp2(zero() - load(s) * factor));
      sum = sum + x;
      store(s, x);
    }
    store(state.sum + w, sum);
  }
#if defined(HEED_BF16_DOT)
  if (tile.shape.dots)
    for (int j = 0; j < count; j += 2)
      for (int w = 0; w < width; w += kLanes)
        _mm512_storeu_si512(tile.p + int64_t(j / 2) * width + w,
                            pair_bf16(load(tile.s + int64_t(j) * width + w),
                                      j + 1 < count ? load(tile.s + int64_t(j + 1) * width + w) : zero()));
#endif
}

}  // namespace

void absorb(Tile& tile, const Lanes& lanes, const Chunk& chunk, bool made, WeightFunction weight, TileState state,
            bool values) {
  alignas(64) float keep[kTile];
  const int width = lanes.width, count = chunk.count, d_v = tile.shape.d_v;
  if (weight == WeightFunction::Sigmoid) weigh_sigmoid(tile, lanes, count, made, state, keep);
  else if (!values) weigh<false, false>(tile, lanes, count, made, state, keep);
  else if (tile.shape.dots) weigh<true, true>(tile, lanes, count, made, state, keep);
  else weigh<false, true>(tile, lanes, count, made, state, keep);
  if (!values) return;
#if defined(HEED_BF16_DOT)
  if (tile.shape.dots)
    return value_tile<PairMath>(tile.p, width, (count + 1) / 2, reinterpret_cast<const uint32_t*>(tile.v_rows), d_v,
                                nullptr, d_v, keep, state.out);
#endif
  value_tile<PlainMath>(tile.s, width, count, nullptr, 0, chunk.v, d_v, keep, state.out);
}

void absorb(TileState into, TileState from, int d_v, int width) {
  for (int w = 0; w < width; w += kLanes) {
    const F a = load(into.high + w), b = load(from.high + w), high = max(a, b);
    const F shift = where(less(set(-kInfinity), high), high, zero());
    const F keep = exp2(a - shift), take = exp2(b - shift);
    store(into.high + w, high);
    store(into.sum + w, fma(load(into.sum + w), keep, load(from.sum + w) * take));
    for (int64_t c = 0; c < d_v; ++c)
      store(into.out + c * width + w, fma(load(into.out + c * width + w), keep, load(from.out + c * width + w) * take));
  }
}

void absorb(TileState into, int into_width, const int* chosen, int count, TileState from, int from_width, int d_v) {
  float keep[kTile], take[kTile];
  for (int i = 0; i < count; ++i) {
    float &high = into.high[chosen[i]], &sum = into.sum[chosen[i]];
    const float top = std::max(high, from.high[i]), shift = top > -kInfinity ? top : 0;
    keep[i] = high == shift ? 1 : std::exp2(high - shift);
    take[i] = from.high[i] == shift ? 1 : std::exp2(from.high[i] - shift);
    high = top;
    sum = sum * keep[i] + from.sum[i] * take[i];
  }
  for (int64_t c = 0; c < d_v; ++c) {
    float* to = into.out + c * into_width;
    const float* more = from.out + c * from_width;
    for (int i = 0; i < count; ++i) to[chosen[i]] = to[chosen[i]] * keep[i] + more[i] * take[i];
  }
}

void add_sink(TileState state, int d_v, int width, int lane, float logit) {
  const float x = logit * kLog2e, high = std::max(state.high[lane], x);
  if (high == -kInfinity) return;
  const float keep = std::exp2(state.high[lane] - high);
  state.high[lane] = high;
  state.sum[lane] = state.sum[lane] * keep + std::exp2(x - high);
  for (int64_t c = 0; c < d_v; ++c) state.out[c * width + lane] *= keep;
}

float log_sum(TileState state, int lane, WeightFunction weight) {
  if (weight == WeightFunction::Sigmoid) return std::log(state.sum[lane]);
  if (state.high[lane] == -kInfinity) return -kInfinity;
  return (state.high[lane] + std::log2(state.sum[lane])) * kLn2;
}

void write_lane(TileState state, int d_v, int width, int lane, float gain, WeightFunction weight, float* out) {
  const float sum = weight == WeightFunction::Sigmoid ? 1 : state.sum[lane];
  const float scale = sum > 0 ? gain / sum : 0;
  for (int64_t c = 0; c < d_v; ++c) out[c] = state.out[c * width + lane] * scale;
}

}  // namespace heed::HEED_ISA
