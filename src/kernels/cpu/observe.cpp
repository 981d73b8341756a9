// observe: what the rows asked for pay to each key, in a second pass that makes no matrix.
#include <algorithm>

#include "base/threads.h"
#include "kernels/check.h"
#include "kernels/cpu/attend_bf16.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/observe_bf16.h"
#include "kernels/cpu/row_sums.h"

namespace heed::HEED_ISA {
namespace {

/// Scores of a chunk → what the statistic is made of: probabilities (0 where hidden) or logits (−∞ where hidden).
void values_of(Tile& tile, const Lanes& lanes, const Chunk& chunk, bool made, const float* log_sums, bool logits,
               WeightFunction weight) {
  for (int w = 0; w < lanes.width; w += kLanes) {
    const F factor = made ? set(1) : load(lanes.factor + w) * set(kLog2e), shift = load(log_sums + w);
    for (int j = 0; j < chunk.count; ++j) {
      float* s = tile.s + int64_t(j) * lanes.width + w;
      const F x = load(s) * factor;
      if (logits) store(s, x * set(1 / kLog2e));
      else if (weight == WeightFunction::Sigmoid) store(s, set(1) / (set(1) + exp2(zero() - x)));
      else store(s, where(less(set(-kInfinity), x), exp2(x - shift), zero()));
    }
  }
}

/// One head's column of a range of keys while it is made.
struct Columns {
  float* sum;   // [heads][kObservedRange]
  float* seen;  // likewise: rows that see the key

  void fold(const Observe& how, int64_t at, float x) const {
    switch (how.rows) {
      case Observe::Rows::Max: sum[at] = std::max(sum[at], x); break;
      case Observe::Rows::Last: sum[at] = x; break;
      default: sum[at] += x;
    }
  }
};

class Observation {
 public:
  /// fast: null, or what takes the place of from's tiles.
  Observation(Queue& queue, const Observed& from, const ObservedBf16* fast, const Observe& how, const Ragged& columns)
      : queue_(queue), from_(from), fast_(fast), tasks_(fast ? fast->tasks() : from.tasks()), how_(how),
        columns_(columns), peaks_(how.rows == Observe::Rows::Max || how.rows == Observe::Rows::Last),
        nothing_(how.logits && peaks_ ? -kInfinity : 0) {
    // The tasks of a KV head, in the order of their rows.
    const int64_t segments = columns.segments();
    by_segment_.resize(size_t(segments));
    for (int64_t t = 0; t < int64_t(tasks_.size()); ++t)
      by_segment_[size_t(tasks_[size_t(t)].k_segment)].tasks.push_back({t});
    heads_.resize(size_t(segments));
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t kv_head = s % from.source().heads();
      for (int64_t head = 0; head < from.q().heads; ++head)
        if (kv_head_of(head) == kv_head) heads_[size_t(s)].heads.push_back({head});
      most_heads_ = std::max(most_heads_, int64_t(heads_[size_t(s)].heads.size()));
    }
  }

  void run() {
    struct Piece {
      int64_t segment, range;
    };
    std::vector<Piece> pieces;
    for (int64_t s = 0; s < columns_.segments(); ++s)
      for (int64_t r = 0; r * kObservedRange < size_of(s); ++r) pieces.push_back({s, r});
    const int64_t tile_bytes = fast_ ? fast_->bytes(kObservedRange) : Tile::bytes(from_.shape()),
                  floats = most_heads_ * kObservedRange;
    parallel_with(queue_, tile_bytes + 2 * floats * 4, int64_t(pieces.size()), [&](char* memory, int64_t i) {
      auto* sum = reinterpret_cast<float*>(memory + tile_bytes);
      range(memory, {sum, sum + floats}, pieces[size_t(i)].segment, pieces[size_t(i)].range);
    });
    if (how_.heads == Observe::Heads::LayerMean) layer_mean();
  }

 private:
  struct Index {
    int64_t i;
  };
  struct Tasks {
    std::vector<Index> tasks;
  };
  struct Heads {
    std::vector<Index> heads;
  };

  int64_t kv_head_of(int64_t head) const {
    return from_.mods().k_map ? from_.mods().k_map.as<int32_t>()[head] : head * from_.source().heads() / from_.q().heads;
  }
  int64_t size_of(int64_t segment) const {
    TileTask any;
    any.k_segment = any.v_segment = segment;
    return from_.source().view(any, from_.mods()).size();
  }
  int64_t slot(int64_t segment, int64_t head) const {
    const auto& heads = heads_[size_t(segment)].heads;
    for (size_t i = 0; i < heads.size(); ++i)
      if (heads[i].i == head) return int64_t(i);
    return 0;
  }

  void range(char* memory, Columns made, int64_t segment, int64_t r) const {
    const int64_t heads = int64_t(heads_[size_t(segment)].heads.size()), low = r * kObservedRange;
    const int64_t high = std::min(low + kObservedRange, size_of(segment));
    std::fill_n(made.sum, heads * kObservedRange, nothing_);
    std::fill_n(made.seen, heads * kObservedRange, 0.0f);
    for (const Index& index : by_segment_[size_t(segment)].tasks) {
      const TileTask& task = tasks_[size_t(index.i)];
      if (fast_) {
        fast_->add(memory, task, low, high, made.sum + slot(segment, task.head) * kObservedRange);
        continue;
      }
      Tile tile(from_.shape(), memory);
      add(tile, made, index.i, low, high);
    }
    for (int64_t i = 0; i < heads; ++i) {
      const int64_t n = from_.q().length(segment / from_.source().heads() * from_.q().heads +
                                         heads_[size_t(segment)].heads[size_t(i)].i);
      float* sum = made.sum + i * kObservedRange;
      const float* seen = made.seen + i * kObservedRange;
      if (how_.rows == Observe::Rows::Mean && n > 0)
        for (int64_t j = 0; j < high - low; ++j) sum[j] /= float(n);
      if (how_.rows == Observe::Rows::Seen)
        for (int64_t j = 0; j < high - low; ++j) sum[j] = seen[j] > 0 ? sum[j] / seen[j] : sum[j];
    }
    write(made, segment, heads, low, high);
  }

  /// One tile's share of the columns of keys low … high.
  void add(Tile& tile, Columns made, int64_t t, int64_t low, int64_t high) const {
    const TileTask& task = from_.tasks()[size_t(t)];
    const KeyView keys = from_.source().view(task, from_.mods());
    const Lanes lanes = from_.lanes(task, keys);
    const int64_t n = from_.q().length(task.sequence * from_.q().heads + task.head);
    const bool last = how_.rows == Observe::Rows::Last, sums = !peaks_;
    if (last && task.first + task.rows < n) return;
    alignas(64) float log_sums[kTile], weights[kTile];
    from_.log_sums(t, lanes, log_sums);
    for (int lane = 0; lane < lanes.width; ++lane) {
      if (log_sums[lane] == -kInfinity)
        log_sums[lane] = kInfinity;  // of a row that sees nothing: all its weights are 0
      weights[lane] = lane >= lanes.count                   ? 0
                      : how_.rows == Observe::Rows::Decayed ? std::pow(how_.decay, float(n - 1 - lanes.query[lane]))
                                                            : 1;
    }
    const int64_t base = slot(task.k_segment, task.head) * kObservedRange - low;
    from_.each_chunk(tile, task, keys, lanes, low, high, [&](const Chunk& chunk, bool logits_made) {
      if (how_.rows == Observe::Rows::Seen) count(tile, lanes, task, chunk, logits_made, made.seen + base);
      values_of(tile, lanes, chunk, logits_made, log_sums, how_.logits, from_.mods().weight);
      for (int j = 0; j < chunk.count; ++j) {
        const float* x = tile.s + int64_t(j) * lanes.width;
        const int64_t at = base + chunk.key[j];
        if (last) {
          for (int64_t head = 0; head < task.heads; ++head)
            made.fold(how_, at + head * kObservedRange, x[(head + 1) * task.rows - 1]);
        } else if (task.heads == 1 && sums) {
          F sum = zero();
          for (int w = 0; w < lanes.width; w += kLanes) {
            const F v = load(x + w);
            sum = fma(where(less(set(-kInfinity), v), v, zero()), load(weights + w), sum);
          }
          made.fold(how_, at, hsum(sum));
        } else if (task.heads == 1) {
          F top = load(x);
          for (int w = kLanes; w < lanes.width; w += kLanes) top = max(top, load(x + w));
          made.fold(how_, at, hmax(top));
        } else {
          for (int64_t head = 0; head < task.heads; ++head)
            for (int64_t lane = head * task.rows; lane < (head + 1) * task.rows; ++lane) {
              if (x[lane] > -kInfinity)
                made.fold(how_, at + head * kObservedRange, sums ? x[lane] * weights[lane] : x[lane]);
            }
        }
      }
    });
  }

  /// Adds to seen[key] of each head the rows that see it.
  static void count(const Tile& tile, const Lanes& lanes, const TileTask& task, const Chunk& chunk, bool made, float* seen) {
    for (int j = 0; j < chunk.count; ++j)
      for (int lane = 0; lane < lanes.count; ++lane)
        if (!made || tile.s[int64_t(j) * lanes.width + lane] > -kInfinity)
          seen[lane / task.rows * kObservedRange + chunk.key[j]] += 1;
  }

  void write(Columns made, int64_t segment, int64_t heads, int64_t low, int64_t high) const {
    const int64_t step = columns_.values.stride[0];
    for (int64_t j = low; j < high; ++j) {
      float* to = columns_.values.as<float>() + (columns_.begin(segment) + j) * step;
      const float* x = made.sum + j - low;
      if (how_.heads == Observe::Heads::Each) {
        const int64_t apart = columns_.values.rank > 1 ? columns_.values.stride[1] : 1;
        for (int64_t i = 0; i < heads; ++i) to[i * apart] = x[i * kObservedRange];
        continue;
      }
      float sum = 0, top = -kInfinity;
      for (int64_t i = 0; i < heads; ++i) {
        sum += x[i * kObservedRange];
        top = std::max(top, x[i * kObservedRange]);
      }
      const bool sum_of_all = how_.heads == Observe::Heads::LayerMean;  // heads of other segments follow
      if (heads == 0) *to = sum_of_all ? 0 : nothing_;
      else if (how_.heads == Observe::Heads::GroupMax) *to = top;
      else *to = how_.heads == Observe::Heads::GroupMean ? sum / float(heads) : sum;
    }
  }

  void layer_mean() const {
    const int64_t g = columns_.heads, h = from_.q().heads, step = columns_.values.stride[0];
    auto at = [&](int64_t s, int64_t j) -> float& { return columns_.values.as<float>()[(columns_.begin(s) + j) * step]; };
    parallel_for(columns_.segments() / g, [&](int64_t sequence) {
      int64_t longest = 0;
      for (int64_t s = sequence * g; s < (sequence + 1) * g; ++s) longest = std::max(longest, size_of(s));
      for (int64_t j = 0; j < longest; ++j) {
        float sum = 0;
        for (int64_t s = sequence * g; s < (sequence + 1) * g; ++s)
          if (j < size_of(s)) sum += at(s, j);
        for (int64_t s = sequence * g; s < (sequence + 1) * g; ++s)
          if (j < size_of(s)) at(s, j) = sum / float(h);
      }
    });
  }

  Queue& queue_;
  const Observed& from_;
  const ObservedBf16* fast_;
  const std::vector<TileTask>& tasks_;
  const Observe& how_;
  const Ragged& columns_;
  const bool peaks_;
  const float nothing_;
  std::vector<Tasks> by_segment_;
  std::vector<Heads> heads_;
  int64_t most_heads_ = 1;
};

}  // namespace

void observe(Queue& queue, const Ragged& q, const Keys& keys, const Plan* plan, const Mods& mods, const Observe& how,
             Ragged columns) {
  constexpr const char* where = "observe";
  const Scratch scratch(queue.scratch);
  int64_t rows = 0;
  for (int64_t s = 0; s < q.segments(); ++s) rows = std::max(rows, q.length(s));
  // Rows of several heads share a tile when few: one row of each head is what a decode step observes.
  Observed from(where, queue, q, keys, plan, mods, rows <= 8);
  const int64_t segments = keys.panel ? keys.panel->segments() : keys.pages->segments();
  require(columns.segments() == segments, where, "columns have the keys' segments");
  require(columns.values.type == Dtype::F32, where, "columns are F32");
  const int64_t width = columns.values.rank > 1 ? columns.values.size[1] : 1;
  require(how.heads != Observe::Heads::Each || (!mods.k_map && width == q.heads / from.source().heads()), where,
          "each head apart needs columns [keys, group] and no k_map");
  check_tensor(where, "lse", how.lse, {q.values.size[0]}, true);
  columns.heads = from.source().heads();
  if (!ObservedBf16::takes(q, keys, from.plan(), from.mods(), how)) {
    from.sum_rows(how.lse);
    return Observation(queue, from, nullptr, how, columns).run();
  }
  Plan plan_of_one = from.plan();
  plan_of_one.part = {};
  plan_of_one.parts = 1;
  Tensor lse = how.lse;
  if (!lse) {
    lse = queue.scratch.take(Dtype::F32, {q.values.size[0]});
    Mods ungated = from.mods();
    ungated.gain = {};
    if (!takes_bf16(q, *keys.panel, *keys.panel, plan_of_one, ungated)) {
      from.sum_rows({});
      from.write_lse(lse);
    } else {
      attend_bf16(queue, q, *keys.panel, nullptr, plan_of_one, ungated, {{}, lse, false});
    }
  }
  const ObservedBf16 fast(queue, q, *keys.panel, plan_of_one, from.mods(), how, lse);
  Observation(queue, from, &fast, how, columns).run();
}

}  // namespace heed::HEED_ISA
