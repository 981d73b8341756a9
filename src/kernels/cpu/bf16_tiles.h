// What attention over bf16 keys and its observation share: queries and plans as bf16_products.h wants them.
#pragma once
#include <algorithm>
#include <limits>

#include "kernels/cpu/bf16_panels.h"
#include "kernels/cpu/bf16_softmax.h"
#include "kernels/cpu/tile_tasks.h"

namespace heed::HEED_ISA {

#if defined(HEED_BF16_DOT)

inline constexpr int kMost = 512, kGroups = kMost / 16;
inline constexpr int kBlockKeys = kBlockUnits * kUnit;

/// Keys of a unit that a plan's bit mask covers.
struct Masked {
  const uint64_t* bits;  // of query 0 of the plan's tile
  int64_t bit;
  int at, count;  // keys of the unit
};

struct Unit {
  UnitKeys k;
  const bf16* v;
  uint32_t mask;        // keys that every query of the plan's row reads
  int32_t first, last;  // keys
  const int32_t* keys;  // each, when they were gathered; null: consecutive from `first`
  int fill;             // keys gathered
  int masked_begin, masked_end;
  int32_t position_low, position_high, until_low;
  bool consecutive;  // positions too
};

struct Block {
  int count = 0;
  Unit unit[kBlockUnits];
  int32_t keys[kBlockKeys];
  Masked masked[kBlockKeys];
  int masked_count = 0;
  const int32_t *k_pos, *until;  // of the segment; null: none
};

/// The queries of a task, and their softmax.
struct Queries {
  int count, groups;
  alignas(64) int32_t limit[kMost];  // the last key that causality shows
  alignas(64) int32_t position[kMost];
  alignas(64) float factor[kMost];  // scale · temperature · log2 e
  alignas(64) float high[kMost], sum[kMost];
  int64_t row[kMost];
  int32_t head[kMost];
  int32_t query[kMost];
  int32_t limit_low[kGroups], limit_high[kGroups], position_low[kGroups], position_high[kGroups];
  bool begun[kGroups / 2];  // of a subtile: out holds something
};

/// A worker's memory for them.
struct Room {
  Queries* queries;
  Block* block;
  uint32_t* q;  // [subtiles][steps][2][256]
  float* s;     // scores of two units
  bf16 *k, *v;  // gathered units
};

/// Keys that lie apart are copied together first: a unit with one key in it costs what a full one does.
inline bool gathers(const Plan& plan) {
  return plan.form == Plan::Form::Tokens || (plan.form == Plan::Form::Blocks && plan.k_tile < kUnit);
}

class Bf16Tiles {
 public:
  /// v null: no values.
  Bf16Tiles(Queue& queue, const Ragged& q, const Ragged& k, const Ragged* v, const Plan& plan, const Mods& mods)
      : queue_(queue), q_(q), plan_(plan), mods_(mods), gathered_(gathers(plan)), panels_(queue, k, v, !gathers(plan)),
        d_(int(q.values.size[1])) {
    source_.k = &k;
    source_.v = v;
  }
  Bf16Tiles(const Bf16Tiles&) = delete;

 protected:
  void lay_out(Queries& of, const TileTask& task, int64_t keys) const {
    of.count = int(task.heads * task.rows);
    of.groups = (of.count + kSubtile - 1) / kSubtile * 2;
    const float scale = mods_.scale != 0 ? mods_.scale : float(1 / std::sqrt(double(d_)));
    for (int lane = 0; lane < of.groups * 16; ++lane) {
      const int64_t at = std::min(lane, of.count - 1);  // lanes past the count repeat the last one
      const int64_t head = task.head + at / task.rows, i = task.first + at % task.rows,
                    segment = task.sequence * q_.heads + head;
      const int64_t row = q_.begin(segment) + i, last = keys - q_.length(segment) + i;
      of.row[lane] = row;
      of.head[lane] = int32_t(head);
      of.query[lane] = int32_t(i);
      of.limit[lane] = int32_t(plan_.causal ? std::min(last, keys - 1) : keys - 1);
      of.position[lane] = mods_.q_pos ? mods_.q_pos.as<int32_t>()[row] : int32_t(last);
      of.factor[lane] = (mods_.temperature ? scale * mods_.temperature.as<float>()[row] : scale) * kLog2e;
    }
    begin(of);
  }

  /// What follows from the lanes' numbers; an empty softmax.
  static void begin(Queries& of) {
    for (int g = 0; g < of.groups; ++g) {
      const auto [low, high] = std::minmax_element(of.limit + g * 16, of.limit + g * 16 + 16);
      const auto [early, late] = std::minmax_element(of.position + g * 16, of.position + g * 16 + 16);
      of.limit_low[g] = *low, of.limit_high[g] = *high;
      of.position_low[g] = *early, of.position_high[g] = *late;
    }
    std::fill_n(of.high, of.groups * 16, -std::numeric_limits<float>::infinity());
    std::fill_n(of.sum, of.groups * 16, 0.0f);
    std::fill_n(of.begun, of.groups / 2, false);
  }

  /// Numbers c … c + 32 of a row of q as bf16, zeros past its end.
  void read_query(int64_t row, int c, bf16* to) const {
    const auto copy = [&](const auto* from) {
      for (int half = 0; half < 32; half += 16) {
        const int there = std::clamp(d_ - c - half, 0, 16);
        store(to + half, there == 16 ? load(from + c + half) : load_part(from + c + half, there));
      }
    };
    const int64_t at = row * q_.values.stride[0];
    if (q_.values.type == Dtype::BF16) copy(q_.values.as<bf16>() + at);
    else if (q_.values.type == Dtype::F16) copy(q_.values.as<f16>() + at);
    else copy(q_.values.as<float>() + at);
  }

  /// Lays out w.q; read(lane, c, to) gives 32 numbers of a lane's query.
  template <class Read>
  void pack(const Room& w, Read&& read) const {
    const int steps = panels_.steps();
    alignas(64) bf16 rows[16][32];
    for (int g = 0; g < w.queries->groups; ++g)
      for (int t = 0; t < steps; ++t) {
        for (int lane = 0; lane < 16; ++lane) read(g * 16 + lane, t * 32, rows[lane]);
        transpose_words(reinterpret_cast<const uint32_t*>(rows), 16,
                        w.q + ((g / 2 * steps + t) * 2 + g % 2) * kTileWords, 16);
      }
  }
  void pack(const Room& w) const {
    pack(w, [&](int lane, int c, bf16* to) { read_query(w.queries->row[lane], c, to); });
  }

  /// The next units of the walk; `rest` is what the last block left of a run.
  bool next_block(Block& block, Walk& walk, Run& rest) const {
    block.count = block.masked_count = 0;
    for (;;) {
      if (rest.count == 0 && !walk.next(std::numeric_limits<int64_t>::max(), rest)) break;
      Unit* unit = block.count ? &block.unit[block.count - 1] : nullptr;
      const int64_t inside = rest.first % kUnit;
      const bool fits = unit && (gathered_ ? unit->fill < kUnit : unit->first / kUnit == rest.first / kUnit);
      if (!fits) {
        if (block.count == kBlockUnits) break;
        unit = &block.unit[block.count++];
        *unit = {};
        unit->first = int32_t(gathered_ ? rest.first : rest.first - inside);
        unit->keys = gathered_ ? block.keys + (block.count - 1) * kUnit : nullptr;
        unit->masked_begin = block.masked_count;
      }
      const int at = gathered_ ? unit->fill : int(inside), taken = int(std::min<int64_t>(rest.count, kUnit - at));
      if (gathered_)
        for (int i = 0; i < taken; ++i) block.keys[(block.count - 1) * kUnit + at + i] = int32_t(rest.first + i);
      unit->fill += taken;
      unit->last = int32_t(rest.first + taken - 1);
      if (rest.bits) block.masked[block.masked_count++] = {rest.bits, rest.bit, at, taken};
      else unit->mask |= low_bits(taken) << at;
      unit->masked_end = block.masked_count;
      rest.first += taken;
      rest.bit += taken;
      rest.count -= taken;
    }
    return block.count > 0;
  }

  static uint32_t low_bits(int n) { return n >= 32 ? ~0u : (1u << n) - 1; }

  static int32_t key_of(const Unit& unit, int j) { return unit.keys ? unit.keys[j] : unit.first + j; }
  static bool reads(const Block& block, const Unit& unit, int j) {
    if (unit.mask >> j & 1) return true;
    for (int i = unit.masked_begin; i < unit.masked_end; ++i)
      if (j >= block.masked[i].at && j < block.masked[i].at + block.masked[i].count) return true;
    return false;
  }

  /// Finds or copies the keys of a block.
  void open(const Room& w, Block& block, const TileTask& task) const {
    const int64_t base = source_.k->begin(task.k_segment);
    block.k_pos = mods_.k_pos ? mods_.k_pos.as<int32_t>() + base : nullptr;
    block.until = mods_.until ? mods_.until.as<int32_t>() + base : nullptr;
    for (int u = 0; u < block.count; ++u) {
      Unit& unit = block.unit[u];
      if (gathered_) {
        bf16 *k = w.k + u * panels_.key_numbers(), *v = w.v + u * panels_.value_numbers();
        panels_.gather(task.k_segment, task.v_segment, unit.keys, unit.fill, k, v);
        unit.k = {k, panels_.steps() * 64};
        unit.v = v;
      } else {
        unit.k = panels_.keys(task.k_segment, unit.first / kUnit);
        unit.v = source_.v ? panels_.values(task.v_segment, unit.first / kUnit) : nullptr;
      }
      unit.position_low = block.k_pos ? block.k_pos[unit.first] : unit.first;
      unit.position_high = block.k_pos ? block.k_pos[unit.last] : unit.last;
      unit.consecutive = !unit.keys && unit.position_high - unit.position_low == unit.last - unit.first;
      unit.until_low = std::numeric_limits<int32_t>::max();
      for (int j = 0; block.until && j < kUnit; ++j)
        if (reads(block, unit, j)) unit.until_low = std::min(unit.until_low, block.until[key_of(unit, j)]);
    }
  }

  /// Bits of the keys that each lane of a group sees.
  Seen seen(const Block& block, const Unit& unit, const Queries& of, int g) const {
    const auto window = int32_t(std::min<int64_t>(mods_.window, 1 << 30));
    const bool causal = unit.last > of.limit_low[g], masked = unit.masked_end > unit.masked_begin;
    const bool windowed = window > 0 && of.position_high[g] - unit.position_low >= window;
    const bool until = unit.until_low < of.position_high[g];
    Seen out{_mm512_set1_epi32(int32_t(unit.mask)), !causal && !masked && !windowed && !until && unit.mask == ~0u};
    if (out.all) return out;
    if (masked) {
      alignas(64) uint32_t words[16];
      for (int lane = 0; lane < 16; ++lane) {
        words[lane] = unit.mask;
        const int64_t row = of.query[g * 16 + lane] % plan_.q_tile * plan_.bits.stride[1];
        for (int i = unit.masked_begin; i < unit.masked_end; ++i) {
          const Masked& m = block.masked[i];
          const uint64_t* from = m.bits + row + m.bit / 64;
          const int shift = int(m.bit % 64);
          uint64_t bits = from[0] >> shift;
          if (shift + m.count > 64) bits |= from[1] << (64 - shift);
          words[lane] |= (uint32_t(bits) & low_bits(m.count)) << m.at;
        }
      }
      out.words = _mm512_load_si512(words);
    }
    const __m512i one = _mm512_set1_epi32(1), all = _mm512_set1_epi32(-1);
    const __m512i limit = _mm512_load_si512(of.limit + g * 16), position = _mm512_load_si512(of.position + g * 16);
    const auto clamped = [](__m512i n) {
      return _mm512_min_epi32(_mm512_max_epi32(n, _mm512_setzero_si512()), _mm512_set1_epi32(kUnit));
    };
    const bool each_causal = causal && unit.keys, each_windowed = windowed && !unit.consecutive;
    if (causal && !each_causal) {
      const __m512i n = clamped(_mm512_sub_epi32(limit, _mm512_set1_epi32(unit.first - 1)));
      out.words = _mm512_and_si512(out.words, _mm512_sub_epi32(_mm512_sllv_epi32(one, n), one));
    }
    if (windowed && !each_windowed) {
      const __m512i n = clamped(_mm512_sub_epi32(position, _mm512_set1_epi32(window + unit.position_low - 1)));
      out.words = _mm512_and_si512(out.words, _mm512_sllv_epi32(all, n));
    }
    if (!each_causal && !each_windowed && !until) return out;
    for (int j = 0; j < kUnit; ++j) {
      if (!reads(block, unit, j)) continue;
      const int32_t key = key_of(unit, j), at = block.k_pos ? block.k_pos[key] : key;
      __mmask16 sees = 0xffff;
      if (each_causal) sees &= _mm512_cmple_epi32_mask(_mm512_set1_epi32(key), limit);
      if (each_windowed)
        sees &= _mm512_cmplt_epi32_mask(_mm512_sub_epi32(position, _mm512_set1_epi32(at)), _mm512_set1_epi32(window));
      if (until) sees &= _mm512_cmple_epi32_mask(position, _mm512_set1_epi32(block.until[key]));
      out.words = _mm512_mask_andnot_epi32(out.words, __mmask16(~sees), _mm512_set1_epi32(int32_t(1u << j)), out.words);
    }
    return out;
  }

  struct Range {
    int begin, end;
  };
  /// The units of a block that some query of a subtile sees.
  Range visible_units(const Block& block, const Queries& of, int st) const {
    const int32_t limit = std::max(of.limit_high[2 * st], of.limit_high[2 * st + 1]);
    const int32_t position = std::min(of.position_low[2 * st], of.position_low[2 * st + 1]);
    int begin = 0, end = block.count;
    while (end > begin && key_of(block.unit[end - 1], 0) > limit) --end;
    if (mods_.window > 0)
      while (begin < end && position - block.unit[begin].position_high >= mods_.window) ++begin;
    return {begin, end};
  }
  /// The keys, low inclusive and high exclusive, that some query sees.
  KeyRange key_range(const Queries& of, const KeyView& keys) const {
    KeyRange range{
        0, std::min<int64_t>(keys.size(), int64_t(*std::max_element(of.limit_high, of.limit_high + of.groups)) + 1)};
    if (mods_.window > 0)
      range.low = keys.window_begin(float(*std::min_element(of.position_low, of.position_low + of.groups)), mods_.window);
    return range;
  }

  Queue& queue_;
  const Ragged& q_;
  const Plan& plan_;
  const Mods& mods_;
  bool gathered_;
  Bf16Panels panels_;
  int d_;
  KeySource source_;
};

#endif

}  // namespace heed::HEED_ISA
