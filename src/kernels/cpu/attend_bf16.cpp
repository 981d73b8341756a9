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
#include "kernels/cpu/bf16_tiles.h"
#include "kernels/cpu/products.h"

namespace heed::HEED_ISA {

#if defined(HEED_BF16_DOT)

namespace {

struct Worker : Room {
  float* out;   // [subtiles][channel tiles][2][256]
  uint32_t* p;  // weights of a block
  // Of a plan with a row for each query:
  Queries* few;      // queries gathered from those of the task
  bf16* query_rows;  // [most][steps · 32]
  float* rows;       // [most][channel tiles · 16]: their sums
  int64_t* entry;    // [most]: the next entries of their rows of the plan

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
    take(block, 2 * sizeof(Block));
    take(q, int64_t(packed) * panels.steps() * 64);
    take(out, int64_t(packed) * panels.channel_tiles() * 64);
    take(s, 2 * 4 * kTileFloats * 4);
    take(p, int64_t(kBlockUnits) * 2 * kTileWords * 4);
    take(k, keys_gathered ? kBlockUnits * panels.key_numbers() * 2 : 0);
    take(v, keys_gathered ? kBlockUnits * panels.value_numbers() * 2 : 0);
    take(query_rows, queries_gathered ? int64_t(most) * panels.steps() * 64 : 0);
    take(few, queries_gathered ? sizeof(Queries) : 0);
    take(rows, queries_gathered ? int64_t(most) * panels.channel_tiles() * 64 : 0);
    take(entry, queries_gathered ? int64_t(most) * 8 : 0);
    return at;
  }
};

struct CostedTask {
  int64_t task;
  int part;
  int64_t cost;
};

/// Whether queries are gathered by the blocks that they read, which are of whole units.
bool by_row(const Plan& plan, const Ragged& q, const Ragged& k, const Mods& mods) {
  return plan.k_tile >= 2 * kUnit && plan.k_tile % kUnit == 0 && gathers_queries(plan, q, k.heads, mods);
}

class AttendBf16 : Bf16Tiles {
 public:
  AttendBf16(Queue& queue, const Ragged& q, const Ragged& k, const Ragged* v, const Plan& plan, const Mods& mods, Outputs to)
      : Bf16Tiles(queue, q, k, v, plan, mods), to_(to), by_row_(by_row(plan, q, k, mods)), plan_rows_(plan, q, k.heads),
        d_v_(v ? int(v->values.size[1]) : 0) {}

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
    if (by_row_) plan_rows_.check(plan_, "attend");
    std::vector<CostedTask> pieces;
    for (int64_t t = 0; t < int64_t(tasks_.size()); ++t) {
      const TileTask& task = tasks_[size_t(t)];
      const int64_t keys = source_.k->length(task.k_segment), n = q_.length(task.sequence * q_.heads + task.head);
      const int64_t seen = plan_.causal ? std::clamp<int64_t>(keys - n + task.first + task.rows, 0, keys) : keys;
      int64_t cost = 0;
      if (by_row_)
        for (int64_t i = task.first; i < task.first + task.rows; ++i)
          cost += std::min(planned_keys(plan_, plan_row(task, i), keys), seen);
      else cost = std::min(planned_keys(plan_, task.plan_row, keys), seen) * task.rows * task.heads;
      for (int part = 0; part < plan_.parts; ++part) pieces.push_back({t, part, cost});
    }
    std::stable_sort(pieces.begin(), pieces.end(),
                     [](const CostedTask& a, const CostedTask& b) { return a.cost > b.cost; });

    const int workers = threads();
    const int64_t bytes = Worker::bytes(panels_, most_, gathered_, by_row_);
    char* memory = queue_.scratch.take(Dtype::U8, {bytes * workers}).as<char>();
    std::atomic<int64_t> next{0};
    parallel([&](int worker) {
      if (worker >= workers) return;  // the pool may have grown since it was asked
      const RoundedTile::Registers registers;
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
  int64_t plan_row(const TileTask& task, int64_t query) const {
    return plan_rows_.row(task.sequence, task.head, q_.heads, query, plan_.q_tile);
  }

  void fill(const Worker& w, const TileTask& task, int part, const KeyView& keys) const {
    const Queries& of = *w.queries;
    const KeyRange range = key_range(of, keys);
    Walk walk(plan_, task.plan_row, plan_.parts > 1 ? part : -1, range.low, range.high);
    Run rest{};
    Worker at = w;
    Block* following = w.block + 1;
    bool more = next_block(*at.block, walk, rest);
    if (!more) return;
    pack(w);
    open(w, *at.block, task);
    while (more) {
      more = next_block(*following, walk, rest);
      // Gathered keys have room for one block only.
      if (more && !gathered_) open(w, *following, task);
      Ahead ahead{following, 0, more && !gathered_ ? (following->count * kUnit * 2 + of.groups - 1) / of.groups : 0};
      for (int st = 0; st < of.groups / 2; ++st) absorb(at, st, &ahead);
      if (more && gathered_) open(w, *following, task);
      std::swap(at.block, following);
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
    for (int lane = 0; lane < of.count; ++lane) {
      advance(lane, true);
      for (int t = 0; t < panels_.steps(); ++t)
        read_query(of.row[lane], t * 32, w.query_rows + (lane * panels_.steps() + t) * 32);
    }
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
    const auto lane_at = [&](int lane) { return lanes[std::min(lane, count - 1)]; };
    for (int lane = 0; lane < kSubtile; ++lane)
      few.high[lane] = of.high[lane_at(lane)];  // mostly it stays, and sums just add
    Worker own = w;
    own.queries = &few;
    Plan whole;
    whole.causal = plan_.causal;
    Walk walk(whole, 0, -1, first,
              std::min<int64_t>(
                  {first + plan_.k_tile, keys.size(), int64_t(std::max(few.limit_high[0], few.limit_high[1])) + 1}));
    Run rest{};
    bool packed = false;
    while (next_block(*w.block, walk, rest)) {
      if (!packed)
        pack(own, [&](int lane, int c, bf16* to) {
          std::memcpy(static_cast<void*>(to), w.query_rows + lane_at(lane) * panels_.steps() * 32 + c, 64);
        });
      packed = true;
      open(own, *w.block, task);
      absorb(own, 0, nullptr);
    }
    if (!few.begun[0]) return;
    alignas(64) float keep[kSubtile], ones[kSubtile];
    for (int lane = 0; lane < kSubtile; ++lane) {
      const int at = lane_at(lane);
      const bool any = few.high[lane] > -std::numeric_limits<float>::infinity();
      ones[lane] = any;
      keep[lane] = !any ? 1 : few.high[lane] == of.high[at] ? 1 : std::exp2(of.high[at] - few.high[lane]);
    }
    for (int lane = 0; lane < count; ++lane) {
      const int at = lanes[lane];
      of.sum[at] = of.sum[at] * keep[lane] + few.sum[lane];
      of.high[at] = few.high[lane];
    }
    each_row(w.out, ones, few.begun[0], count, [&](int lane, int channel, F x) {
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
        for (int c = 0; c < 16; ++c)
          store(columns[c], begun ? where(some, load(from + c * 16) * scale, zero()) : zero());
        transpose_words(reinterpret_cast<const uint32_t*>(columns), 16, reinterpret_cast<uint32_t*>(rows), 16);
        for (int lane = g * 16; lane < std::min(lanes, g * 16 + 16); ++lane) body(lane, t * 16, load(rows[lane % 16]));
      }
    }
  }

  /// Rows of the next block's keys, and of its values as many, that have been asked for, and how many a subtile asks for.
  struct Ahead {
    const Block* block;
    int rows, each;
  };

  /// Where tiles are short, blocks that lie apart are met for the first time at almost every step: without this a tile waits
  /// for memory row by row.
  void fetch(Ahead& ahead, int rows) const {
    const int64_t v_step = int64_t(panels_.channel_tiles()) * 16 * int64_t(sizeof(bf16)),
                  last = int64_t(ahead.block->count) * kUnit;
    for (; rows > 0 && ahead.rows < last; --rows, ++ahead.rows) {
      const Unit& unit = ahead.block->unit[ahead.rows / kUnit];
      const char* k = reinterpret_cast<const char*>(unit.k.rows) + ahead.rows % kUnit * unit.k.stride;
      for (int t = 0; t < panels_.steps(); ++t) _mm_prefetch(k + t * 64, _MM_HINT_T1);
      const char* v = reinterpret_cast<const char*>(unit.v) + ahead.rows % kUnit * v_step;
      for (int64_t i = 0; i < v_step; i += 64) _mm_prefetch(v + i, _MM_HINT_T1);
    }
  }

  void absorb(const Worker& w, int st, Ahead* ahead) const {
    const Block& block = *w.block;
    Queries& of = *w.queries;
    const int g0 = 2 * st, steps = panels_.steps(), tiles = panels_.channel_tiles();
    const auto [begin, end] = visible_units(block, of, st);
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
      if (ahead && ahead->each > 0) fetch(*ahead, (2 * ahead->each + end - begin - 1) / (end - begin));
      for (int i = 0; i < units; ++i) unit_scores(block.unit[u + i].k, q, steps, w.s + i * 4 * kTileFloats);
      for (int g = 0; g < 2; ++g) {
        Seen sees[2];
        for (int i = 0; i < units; ++i) sees[i] = seen(block, block.unit[u + i], of, g0 + g);
        const int at = (g0 + g) * 16;
        soften(w.s + g * kTileFloats, units, sees, load(of.factor + at), w.p + (u * 2 + g) * kTileWords, of.high + at,
               of.sum + at, [&](F by) {
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
      each_row(w.out + int64_t(st) * panels_.channel_tiles() * 2 * kTileFloats, scale, of.begun[st], lanes,
               [&](int lane, int channel, F x) {
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

  Outputs to_;
  bool by_row_;
  PlanRows plan_rows_;
  int d_v_, most_ = kMost;
  std::vector<TileTask> tasks_;
};

}  // namespace

bool takes_bf16(const Ragged& q, const Ragged& k, const Ragged& v, const Plan& plan, const Mods& mods) {
  if (k.values.type != Dtype::BF16 || v.values.type != Dtype::BF16) return false;
#if !defined(__AMX_BF16__)
  if (!bf16_dots_pay()) return false;
#endif
  if (mods.weight != WeightFunction::Softmax || mods.softcap > 0 || mods.key_bias || mods.row_factor) return false;
  const int64_t n = longest(q), group = std::max<int64_t>(1, q.heads / k.heads);
  if (by_row(plan, q, k, mods)) return n >= 32;
  const bool dense = plan.form == Plan::Form::Dense,
             shared = !mods.k_map && !mods.v_map && (dense || plan.scope != Plan::Scope::QueryHead);
  const int64_t rows = dense ? n : std::min<int64_t>(n, plan.q_tile), lanes = rows * (shared ? group : 1);
  // Half a subtile at least; values to transpose for more than a few queries; and few queries over many keys are split
  // over keys instead.
  return lanes >= 16 && (gathers(plan) || n * group >= 32) && (n > kTile || longest(k) < 2048);
}

void attend_bf16(Queue& queue, const Ragged& q, const Ragged& k, const Ragged* v, const Plan& plan, const Mods& mods,
                 Outputs to) {
  AttendBf16(queue, q, k, v, plan, mods, to).run();
}

#else

bool takes_bf16(const Ragged&, const Ragged&, const Ragged&, const Plan&, const Mods&) { return false; }
void attend_bf16(Queue&, const Ragged&, const Ragged&, const Ragged*, const Plan&, const Mods&, Outputs) {}

#endif

}  // namespace heed::HEED_ISA
