// attend over bf16 keys: tiles of up to 512 queries against blocks of 256 keys, the products of bf16_products.h.
//
// For each block and each subtile of 32 queries: twice 32 keys' scores, their softmax, and so on through the block; then the
// values of the whole block. Keys of a block stay in the second cache for all subtiles of the tile. No unit of keys that a
// subtile does not see is multiplied.
//
// A plan whose rows are too short to fill a subtile (MoBA: a choice of its own for each query) is turned around: of each block
// of the plan, the queries of a tile that read it are gathered to subtiles, and what they find is merged into their states.
#include "kernels/cpu/attend_bf16.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "base/threads.h"
#include "kernels/cpu/bf16_panels.h"
#include "kernels/cpu/bf16_softmax.h"
#include "kernels/cpu/tile_tasks.h"

namespace heed::HEED_ISA {

#if defined(HEED_BF16_DOT)

namespace {

constexpr int kMost = 512, kGroups = kMost / 16;
constexpr int kBlockKeys = kBlockUnits * kUnit;

/// Keys of a unit that a plan's bit mask covers.
struct Masked {
  const uint64_t* bits;  // of query 0 of the plan's tile
  int64_t bit;
  int at, count;  // keys of the unit
};

struct Unit {
  UnitKeys k;
  const bf16* v;
  uint32_t mask;         // keys that every query of the plan's row reads
  int32_t first, last;   // keys
  const int32_t* keys;   // each, when they were gathered; null: consecutive from `first`
  int fill;              // keys gathered
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
  alignas(64) int32_t limit[kMost];     // the last key that causality shows
  alignas(64) int32_t position[kMost];
  alignas(64) float factor[kMost];      // scale · temperature · log2 e
  alignas(64) float high[kMost], sum[kMost];
  int64_t row[kMost];
  int32_t head[kMost];
  int32_t query[kMost];
  int32_t limit_low[kGroups], limit_high[kGroups], position_low[kGroups], position_high[kGroups];
  bool begun[kGroups / 2];  // of a subtile: out holds something
};

struct Worker {
  Queries* queries;
  Block* block;
  uint32_t* q;   // [subtiles][steps][2][256]
  float* out;    // [subtiles][channel tiles][2][256]
  float* s;      // of two units
  uint32_t* p;   // of a block
  bf16 *k, *v;   // gathered units
  Queries* few;  // queries gathered from those of the task, which have
  float* rows;   // [most][channel tiles · 16], their sums row by row, and
  int64_t* entry;  // [most], the next entries of their rows of the plan

  static int64_t bytes(const Bf16Panels& panels, int most, bool keys_gathered, bool queries_gathered) {
    Worker none;
    return none.place(nullptr, panels, most, keys_gathered, queries_gathered) - static_cast<char*>(nullptr);
  }
  char* place(char* at, const Bf16Panels& panels, int most, bool keys_gathered, bool queries_gathered) {
    const int packed = queries_gathered ? kSubtile : most;
    const auto take = [&](auto*& to, int64_t bytes) {
      to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(at);
      at += (bytes + 63) / 64 * 64;
    };
    take(queries, sizeof(Queries));
    take(block, sizeof(Block));
    take(q, int64_t(packed) * panels.steps() * 64);
    take(out, int64_t(packed) * panels.channel_tiles() * 64);
    take(s, 2 * 4 * kTileFloats * 4);
    take(p, int64_t(kBlockUnits) * 2 * kTileWords * 4);
    take(k, keys_gathered ? kBlockUnits * panels.key_numbers() * 2 : 0);
    take(v, keys_gathered ? kBlockUnits * panels.value_numbers() * 2 : 0);
    take(few, queries_gathered ? sizeof(Queries) : 0);
    take(rows, queries_gathered ? int64_t(most) * panels.channel_tiles() * 64 : 0);
    take(entry, queries_gathered ? int64_t(most) * 8 : 0);
    return at;
  }
};

struct Piece {
  int64_t task;
  int part;
  int64_t cost;
};

/// Keys that lie apart are copied together first: a unit with one key in it costs what a full one does.
bool gathers(const Plan& plan) {
  return plan.form == Plan::Form::Tokens || (plan.form == Plan::Form::Blocks && plan.k_tile < kUnit);
}

/// Whether rows of the plan are so short that queries of many of them are gathered.
bool gathers_queries(const Plan& plan, const Ragged& q, const Ragged& k, const Mods& mods) {
  const bool shared = !mods.k_map && !mods.v_map && plan.scope != Plan::Scope::QueryHead;
  return plan.form == Plan::Form::Blocks && !plan.mask && plan.parts == 1 && plan.k_tile >= 2 * kUnit && plan.k_tile % kUnit == 0 &&
         plan.q_tile * (shared ? std::max<int64_t>(1, q.heads / k.heads) : 1) < 16;
}

int64_t longest(const Ragged& x) {
  int64_t most = 0;
  for (int64_t s = 0; s < x.segments(); ++s) most = std::max(most, x.length(s));
  return most;
}

class AttendBf16 {
 public:
  AttendBf16(Queue& queue, const Ragged& q, const Ragged& k, const Ragged& v, const Plan& plan, const Mods& mods, Outputs to)
      : queue_(queue), q_(q), plan_(plan), mods_(mods), to_(to), gathered_(gathers(plan)), by_row_(gathers_queries(plan, q, k, mods)),
        panels_(queue, k, v, !gathers(plan)), plan_rows_(plan, q, k.heads), d_(int(q.values.size[1])), d_v_(int(v.values.size[1])) {
    source_.k = &k;
    source_.v = &v;
  }

  void run() {
    // A row's result does not depend on the tile it lies in, so tiles may be as small as sharing them out asks for. Large
    // ones read keys less often.
    int64_t rows = 0;
    for (int64_t s = 0; s < q_.segments(); ++s) rows += q_.length(s);
    const int64_t fair = (rows / (6 * threads()) + kSubtile - 1) / kSubtile * kSubtile;
    most_ = int(std::clamp<int64_t>(fair, 2 * kSubtile, std::max(d_, d_v_) > 128 ? kMost / 2 : kMost));
    Plan whole;
    whole.causal = plan_.causal;
    tasks_ = tile_tasks(by_row_ ? whole : plan_, q_, source_.heads(), source_.v_heads(), mods_, !by_row_, most_);
    if (by_row_)
      require(plan_.rows() >= plan_rows_.starts.back(), "attend", "the plan has " + std::to_string(plan_.rows()) + " rows, the queries have " +
              std::to_string(plan_rows_.starts.back()) + " tiles");
    std::vector<Piece> pieces;
    for (int64_t t = 0; t < int64_t(tasks_.size()); ++t) {
      const TileTask& task = tasks_[size_t(t)];
      const int64_t keys = source_.k->length(task.k_segment), n = q_.length(task.sequence * q_.heads + task.head);
      const int64_t seen = plan_.causal ? std::clamp<int64_t>(keys - n + task.first + task.rows, 0, keys) : keys;
      int64_t cost = 0;
      if (by_row_)
        for (int64_t i = task.first; i < task.first + task.rows; ++i) cost += std::min(planned_keys(plan_, plan_row(task, i), keys), seen);
      else
        cost = std::min(planned_keys(plan_, task.plan_row, keys), seen) * task.rows * task.heads;
      for (int part = 0; part < plan_.parts; ++part) pieces.push_back({t, part, cost});
    }
    std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.cost > b.cost; });

    const int workers = threads();
    const int64_t bytes = Worker::bytes(panels_, most_, gathered_, by_row_);
    char* memory = queue_.scratch.take(Dtype::U8, {bytes * workers}).as<char>();
    std::atomic<int64_t> next{0};
    parallel([&](int worker) {
      if (worker >= workers) return;  // the pool may have grown since it was asked
      const BestTile::Registers registers;
      Worker own;
      own.place(memory + bytes * worker, panels_, most_, gathered_, by_row_);
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < int64_t(pieces.size());)
        work(own, tasks_[size_t(pieces[size_t(i)].task)], pieces[size_t(i)].part);
    });
  }

 private:
  void work(const Worker& w, const TileTask& task, int part) const {
    const KeyView keys = source_.view(task, mods_);
    Queries& of = *w.queries;
    lay_out(of, task, keys.size());
    bool any = !mods_.gain;
    for (int lane = 0; !any && lane < of.count; ++lane) any = mods_.gain.as<float>()[of.row[lane]] != 0;
    if (by_row_) {
      std::fill_n(w.rows, int64_t(of.count) * width(), 0.0f);
      if (any) fill_by_row(w, task, keys);
      return finish_rows(w);
    }
    if (any) fill(w, task, part, keys);
    finish(w, part);
  }

  int64_t width() const { return int64_t(panels_.channel_tiles()) * 16; }
  int64_t plan_row(const TileTask& task, int64_t query) const { return plan_rows_.row(task.sequence, task.head, q_.heads, query, plan_.q_tile); }

  void lay_out(Queries& of, const TileTask& task, int64_t keys) const {
    of.count = int(task.heads * task.rows);
    of.groups = (of.count + kSubtile - 1) / kSubtile * 2;
    const float scale = mods_.scale != 0 ? mods_.scale : float(1 / std::sqrt(double(d_)));
    for (int lane = 0; lane < of.groups * 16; ++lane) {
      const int64_t at = std::min(lane, of.count - 1);  // lanes past the count repeat the last one
      const int64_t head = task.head + at / task.rows, i = task.first + at % task.rows, segment = task.sequence * q_.heads + head;
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

  void pack(const Worker& w) const {
    const Queries& of = *w.queries;
    const int steps = panels_.steps();
    alignas(64) bf16 rows[16][32];
    const auto copy = [&](auto* from, int lane, int c) {
      for (int half = 0; half < 32; half += 16) {
        const int there = std::clamp(d_ - c - half, 0, 16);
        store(rows[lane] + half, there == 16 ? load(from + c + half) : load_part(from + c + half, there));
      }
    };
    for (int g = 0; g < of.groups; ++g)
      for (int t = 0; t < steps; ++t) {
        for (int lane = 0; lane < 16; ++lane) {
          const int64_t at = of.row[g * 16 + lane] * q_.values.stride[0];
          if (q_.values.type == Dtype::BF16) copy(q_.values.as<bf16>() + at, lane, t * 32);
          else if (q_.values.type == Dtype::F16) copy(q_.values.as<f16>() + at, lane, t * 32);
          else copy(q_.values.as<float>() + at, lane, t * 32);
        }
        transpose_words(reinterpret_cast<const uint32_t*>(rows), 16, w.q + ((g / 2 * steps + t) * 2 + g % 2) * kTileWords, 16);
      }
  }

  void fill(const Worker& w, const TileTask& task, int part, const KeyView& keys) const {
    const Queries& of = *w.queries;
    int64_t low = 0;
    if (mods_.window > 0) low = keys.window_begin(float(*std::min_element(of.position_low, of.position_low + of.groups)), mods_.window);
    const int64_t high = std::min<int64_t>(keys.size(), int64_t(*std::max_element(of.limit_high, of.limit_high + of.groups)) + 1);
    Walk walk(plan_, task.plan_row, plan_.parts > 1 ? part : -1, low, high);
    Run rest{};
    bool packed = false;
    while (next_block(*w.block, walk, rest)) {
      if (!packed) pack(w);
      packed = true;
      open(w, task);
      for (int st = 0; st < of.groups / 2; ++st) absorb(w, st);
    }
  }

  void fill_by_row(const Worker& w, const TileTask& task, const KeyView& keys) const {
    constexpr int32_t none = std::numeric_limits<int32_t>::max();
    const Queries& of = *w.queries;
    int32_t next[kMost];
    const auto advance = [&](int lane, bool first) {
      const int64_t row = plan_row(task, of.query[lane]);
      int64_t& e = w.entry[lane];
      e = first ? plan_.begin(row) : e + 1;
      next[lane] = e < plan_.end(row) ? plan_.index.at<int32_t>(e) : none;
      if (int64_t(next[lane]) * plan_.k_tile > of.limit[lane]) next[lane] = none;  // blocks ascend
    };
    for (int lane = 0; lane < of.count; ++lane) advance(lane, true);
    for (;;) {
      const int32_t block = *std::min_element(next, next + of.count);
      if (block == none) return;
      int lanes[kMost], count = 0;
      for (int lane = 0; lane < of.count; ++lane)
        if (next[lane] == block) {
          lanes[count++] = lane;
          advance(lane, false);
        }
      for (int first = 0; first < count; first += kSubtile)
        absorb_few(w, task, keys, int64_t(block) * plan_.k_tile, lanes + first, std::min(kSubtile, count - first));
    }
  }

  /// Keys from `first` of a block of the plan, for the queries at `lanes` of the task.
  void absorb_few(const Worker& w, const TileTask& task, const KeyView& keys, int64_t first, const int* lanes, int count) const {
    Queries &of = *w.queries, &few = *w.few;
    few.count = count;
    few.groups = 2;
    for (int lane = 0; lane < kSubtile; ++lane) {
      const int at = lanes[std::min(lane, count - 1)];
      few.limit[lane] = of.limit[at], few.position[lane] = of.position[at], few.factor[lane] = of.factor[at];
      few.row[lane] = of.row[at], few.query[lane] = of.query[at];
    }
    begin(few);
    Worker own = w;
    own.queries = &few;
    Plan whole;
    whole.causal = plan_.causal;
    Walk walk(whole, 0, -1, first, std::min<int64_t>({first + plan_.k_tile, keys.size(), int64_t(std::max(few.limit_high[0], few.limit_high[1])) + 1}));
    Run rest{};
    bool packed = false;
    while (next_block(*w.block, walk, rest)) {
      if (!packed) pack(own);
      packed = true;
      open(own, task);
      absorb(own, 0);
    }
    if (!few.begun[0]) return;
    alignas(64) float keep[kSubtile], take[kSubtile];
    for (int lane = 0; lane < kSubtile; ++lane) {
      const int at = lanes[std::min(lane, count - 1)];
      const float high = std::max(of.high[at], few.high[lane]);
      const bool any = high > -std::numeric_limits<float>::infinity();
      keep[lane] = any ? std::exp2(of.high[at] - high) : 0;
      take[lane] = any ? std::exp2(few.high[lane] - high) : 0;
      if (lane >= count) continue;
      of.sum[at] = of.sum[at] * keep[lane] + few.sum[lane] * take[lane];
      of.high[at] = high;
    }
    each_row(w.out, take, few.begun[0], count, [&](int lane, int channel, F x) {
      float* to = w.rows + lanes[lane] * width() + channel;
      store(to, fma(load(to), set(keep[lane]), x));
    });
  }

  /// Calls body(lane, channel, x) for 16 channels at a time of a subtile's sums, times `by` of the lane.
  template <class Body>
  void each_row(const float* out, const float* by, bool begun, int lanes, Body&& body) const {
    alignas(64) float columns[16][16], rows[16][16];
    for (int g = 0; g * 16 < lanes; ++g) {
      const F scale = load(by + g * 16);
      const M some = less(zero(), abs(scale));  // an unset lane's sums may be anything
      for (int t = 0; t < panels_.channel_tiles(); ++t) {
        const float* from = out + (t * 2 + g) * kTileFloats;
        for (int c = 0; c < 16; ++c) store(columns[c], begun ? where(some, load(from + c * 16) * scale, zero()) : zero());
        transpose_words(reinterpret_cast<const uint32_t*>(columns), 16, reinterpret_cast<uint32_t*>(rows), 16);
        for (int lane = g * 16; lane < std::min(lanes, g * 16 + 16); ++lane) body(lane, t * 16, load(rows[lane % 16]));
      }
    }
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

  void open(const Worker& w, const TileTask& task) const {
    Block& block = *w.block;
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
        unit.v = panels_.values(task.v_segment, unit.first / kUnit);
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
    const auto clamped = [](__m512i n) { return _mm512_min_epi32(_mm512_max_epi32(n, _mm512_setzero_si512()), _mm512_set1_epi32(kUnit)); };
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
      if (each_windowed) sees &= _mm512_cmplt_epi32_mask(_mm512_sub_epi32(position, _mm512_set1_epi32(at)), _mm512_set1_epi32(window));
      if (until) sees &= _mm512_cmple_epi32_mask(position, _mm512_set1_epi32(block.until[key]));
      out.words = _mm512_mask_andnot_epi32(out.words, __mmask16(~sees), _mm512_set1_epi32(int32_t(1u << j)), out.words);
    }
    return out;
  }

  void absorb(const Worker& w, int st) const {
    const Block& block = *w.block;
    Queries& of = *w.queries;
    const int g0 = 2 * st, steps = panels_.steps(), tiles = panels_.channel_tiles();
    const int32_t limit = std::max(of.limit_high[g0], of.limit_high[g0 + 1]), position = std::min(of.position_low[g0], of.position_low[g0 + 1]);
    int begin = 0, end = block.count;
    while (end > begin && key_of(block.unit[end - 1], 0) > limit) --end;
    if (mods_.window > 0)
      while (begin < end && position - block.unit[begin].position_high >= mods_.window) ++begin;
    const uint32_t* q = w.q + int64_t(st) * steps * 2 * kTileWords;
    float* out = w.out + int64_t(st) * tiles * 2 * kTileFloats;
    const bf16* v[kBlockUnits];
    for (int u = begin; u < end; ++u) v[u] = block.unit[u].v;

    int summed = begin;
    const auto sum_values = [&](int until) {
      if (until > summed) {
        unit_values(v + summed, w.p + summed * 2 * kTileWords, until - summed, tiles, !of.begun[st], out);
        of.begun[st] = true;
      }
      summed = until;
    };
    for (int u = begin; u < end; u += 2) {
      const int units = std::min(2, end - u);
      for (int i = 0; i < units; ++i) unit_scores(block.unit[u + i].k, q, steps, w.s + i * 4 * kTileFloats);
      for (int g = 0; g < 2; ++g) {
        Seen sees[2];
        for (int i = 0; i < units; ++i) sees[i] = seen(block, block.unit[u + i], of, g0 + g);
        const int at = (g0 + g) * 16;
        soften(w.s + g * kTileFloats, units, sees, load(of.factor + at), w.p + (u * 2 + g) * kTileWords, of.high + at, of.sum + at, [&](F by) {
          sum_values(u);  // weights of the block that were made with the old maximum
          if (!of.begun[st]) return;
          for (int c = 0; c < tiles * 16; ++c) {
            float* x = out + c / 16 * 2 * kTileFloats + g * kTileFloats + c % 16 * 16;
            store(x, load(x) * by);
          }
        });
      }
    }
    sum_values(end);
  }

  /// Writes a lane's lse; returns what its sums are to be multiplied by.
  float close(const Queries& of, int lane, int part) const {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    float high = of.high[lane], sum = of.sum[lane], keep = 1;
    if (mods_.sink_logits && part == 0) {
      const float sink = mods_.sink_logits.as<float>()[of.head[lane]] * kLog2e, top = std::max(high, sink);
      if (top != -infinity) {
        keep = std::exp2(high - top);
        sum = sum * keep + std::exp2(sink - top);
        high = top;
      }
    }
    const float gain = mods_.gain ? mods_.gain.as<float>()[of.row[lane]] : 1;
    to_.set_lse(part, of.row[lane], high == -infinity || gain == 0 ? -infinity : (high + std::log2(sum)) / kLog2e);
    return sum > 0 ? gain * keep / sum : 0;
  }

  void finish(const Worker& w, int part) const {
    const Queries& of = *w.queries;
    alignas(64) float scale[kSubtile] = {};
    for (int first = 0; first < of.count; first += kSubtile) {
      const int lanes = std::min(kSubtile, of.count - first), st = first / kSubtile;
      for (int lane = 0; lane < lanes; ++lane) scale[lane] = close(of, first + lane, part);
      each_row(w.out + int64_t(st) * panels_.channel_tiles() * 2 * kTileFloats, scale, of.begun[st], lanes, [&](int lane, int channel, F x) {
        store_part(to_.row(part, of.row[first + lane]) + channel, x, std::min(16, d_v_ - channel));
      });
    }
  }

  void finish_rows(const Worker& w) const {
    const Queries& of = *w.queries;
    for (int lane = 0; lane < of.count; ++lane) {
      const F by = set(close(of, lane, 0));
      const float* from = w.rows + lane * width();
      float* to = to_.row(0, of.row[lane]);
      for (int c = 0; c < d_v_; c += 16) store_part(to + c, load(from + c) * by, std::min(16, d_v_ - c));
    }
  }

  Queue& queue_;
  const Ragged& q_;
  const Plan& plan_;
  const Mods& mods_;
  Outputs to_;
  bool gathered_, by_row_;
  Bf16Panels panels_;
  PlanRows plan_rows_;
  int d_, d_v_, most_ = kMost;
  KeySource source_;
  std::vector<TileTask> tasks_;
};

}  // namespace

bool takes_bf16(const Ragged& q, const Ragged& k, const Ragged& v, const Plan& plan, const Mods& mods) {
  if (k.values.type != Dtype::BF16 || v.values.type != Dtype::BF16) return false;
  if (mods.weight != WeightFunction::Softmax || mods.softcap > 0 || mods.key_bias || mods.row_factor) return false;
  const int64_t n = longest(q), group = std::max<int64_t>(1, q.heads / k.heads);
  if (gathers_queries(plan, q, k, mods)) return n >= 32;
  const bool dense = plan.form == Plan::Form::Dense, shared = !mods.k_map && !mods.v_map && (dense || plan.scope != Plan::Scope::QueryHead);
  const int64_t rows = dense ? n : std::min<int64_t>(n, plan.q_tile), lanes = rows * (shared ? group : 1);
  // Half a subtile at least; values to transpose for more than a few queries; and few queries over many keys are split
  // over keys instead.
  return lanes >= 16 && (gathers(plan) || n * group >= 32) && (n > kTile || longest(k) < 2048);
}

void attend_bf16(Queue& queue, const Ragged& q, const Ragged& k, const Ragged& v, const Plan& plan, const Mods& mods, Outputs to) {
  AttendBf16(queue, q, k, v, plan, mods, to).run();
}

#else

bool takes_bf16(const Ragged&, const Ragged&, const Ragged&, const Plan&, const Mods&) { return false; }
void attend_bf16(Queue&, const Ragged&, const Ragged&, const Ragged&, const Plan&, const Mods&, Outputs) {}

#endif

}  // namespace heed::HEED_ISA
