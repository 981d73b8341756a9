// attend and attend_store: one loop over tiles, whatever the keys lie in.
#include <algorithm>
#include <atomic>
#include <limits>
#include <tuple>

#include "base/threads.h"
#include "kernels/check.h"
#include "kernels/cpu/attend_bf16.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/decode.h"
#include "kernels/cpu/tile_tasks.h"

namespace heed::HEED_ISA {
namespace {

/// Keys of one piece of work when a head has too few rows to share out: decode is split over keys (Flash-Decoding).
constexpr int64_t kSplit = 1024;

/// Tiles that a worker takes together where they read the same keys, which are then opened once for all.
constexpr int kTogether = 4;

/// Rows of a task whose queries are gathered by what they read.
constexpr int kGathered = 512;

/// A tile, or the keys of one that a worker takes alone; `pieces` of them are merged, in order, by whoever ends last.
struct TaskPart {
  int64_t task = 0;
  int part = 0;
  int64_t begin = 0, end = 0;  // keys (Dense), entries (other forms); end 0: all
  int64_t index = 0, pieces = 1, first_piece = 0;
  int64_t cost = 0;
};

/// Neighbours among the pieces that one worker takes.
struct Team {
  int64_t first = 0;
  int count = 1;
  int64_t cost = 0;
};

class Attend {
 public:
  Attend(Queue& queue, const Ragged& q, const KeySource& source, const Plan& plan, const Mods& mods, Outputs to)
      : queue_(queue), q_(q), source_(source), plan_(plan), mods_(mods), to_(to),
        by_row_(longest(q) >= 32 && plan.k_tile >= 32 && gathers_queries(plan, q, source.heads(), mods)),
        plan_rows_(plan, q, source.heads()) {}

  void run(int d_v) {
    shape_.d = int(q_.values.size[1]);
    shape_.d_v = d_v;
    shape_.factors = mods_.row_factor ? int(mods_.row_factor.size[1]) : 0;
    shape_.dots = source_.dots(q_.values.type, shape_.d);
    if (by_row_) {
      plan_rows_.check(plan_, "attend");
      Plan whole;
      whole.causal = plan_.causal;
      shape_.rows = kGathered;
      // As small as sharing them out asks for: the more rows, the fuller the tiles.
      const int64_t fair = (q_.values.size[0] / (6 * threads()) + kTile - 1) / kTile * kTile;
      tasks_ = tile_tasks(whole, q_, source_.heads(), source_.v_heads(), mods_, false,
                          std::clamp<int64_t>(fair, kTile, kGathered));
      return parallel_tiles(queue_, shape_, int64_t(tasks_.size()),
                            [&](Tile& tile, int64_t i) { work_by_row(tile, tasks_[size_t(i)]); });
    }
    tasks_ = tile_tasks(plan_, q_, source_.heads(), source_.v_heads(), mods_, true);
    cut();
    join();
    shape_.tiles = 1;
    for (const Team& team : teams_) shape_.tiles = std::max(shape_.tiles, team.count);
    parallel_tiles(queue_, shape_, int64_t(teams_.size()), [&](Tile& tile, int64_t i) {
      const Team& team = teams_[size_t(i)];
      if (team.count > 1) work_together(tile, team);
      else work(tile, pieces_[size_t(team.first)]);
    });
  }

 private:
  bool skipped(const Lanes& lanes) const {
    if (!mods_.gain) return false;
    for (int lane = 0; lane < lanes.count; ++lane)
      if (mods_.gain.as<float>()[lanes.row[lane]] != 0) return false;
    return true;
  }

  void cut() {
    int64_t floats = 0;
    for (size_t t = 0; t < tasks_.size(); ++t) {
      const TileTask& task = tasks_[t];
      const KeyView keys = source_.view(task, mods_);
      const Lanes lanes = lanes_of(task, q_, keys.size(), mods_, plan_.causal);
      const KeyRange range = visible(lanes, keys, mods_, plan_.causal);
      const bool dense = plan_.form == Plan::Form::Dense,
                 counted = plan_.form == Plan::Form::Blocks || plan_.form == Plan::Form::Tokens;
      const int64_t planned = std::min(planned_keys(plan_, task.plan_row, keys.size()),
                                       std::max<int64_t>(range.high - range.low, 0));
      // The number of pieces follows from the shapes alone, never from the number of threads.
      const bool few = q_.length(task.sequence * q_.heads + task.head) <= kTile && plan_.parts == 1 && (dense || counted);
      const int64_t per_entry = plan_.form == Plan::Form::Blocks ? plan_.k_tile : 1;
      const int64_t begin = dense ? range.low : 0;
      const int64_t units = dense     ? std::max<int64_t>(range.high - range.low, 0)
                            : counted ? plan_.end(task.plan_row) - plan_.begin(task.plan_row)
                                      : 0;
      const int64_t step = std::max<int64_t>(1, kSplit / per_entry);
      const int64_t pieces = few ? std::max<int64_t>(1, (units + step - 1) / step) : 1;
      for (int part = 0; part < plan_.parts; ++part) {
        TaskPart piece;
        piece.task = int64_t(t);
        piece.part = part;
        piece.pieces = pieces;
        piece.first_piece = int64_t(counters_);
        piece.cost = planned * lanes.width / pieces;
        for (int64_t i = 0; i < pieces; ++i) {
          piece.index = i;
          if (pieces > 1) {
            piece.begin = begin + i * step;
            piece.end = std::min(begin + (i + 1) * step, begin + units);
          }
          pieces_.push_back(piece);
        }
        if (pieces > 1) {
          state_at_.push_back({floats});
          floats += pieces * TileState::floats(shape_.d_v, lanes.width);
          ++counters_;
        }
      }
    }
    states_ = floats ? queue_.scratch.take(Dtype::F32, {floats}).as<float>() : nullptr;
    done_ = counters_ ? queue_.scratch.take(Dtype::I64, {counters_}).as<int64_t>() : nullptr;
    std::fill_n(done_, counters_, int64_t(0));
  }

  /// Puts pieces that read the same keys into teams: the same rows of several heads of a group, and, where tiles begin to
  /// read at the same key whatever their rows, several tiles of a head. No bit of a row depends on what its tile is joined with.
  void join() {
    const bool from_one_key = mods_.window <= 0 && !mods_.until, joins = plan_.parts == 1 && (from_one_key || !mods_.q_pos);
    const auto task_of = [&](const TaskPart& piece) -> const TileTask& { return tasks_[size_t(piece.task)]; };
    const auto place = [&](const TileTask& task) {
      return std::tuple(task.k_segment, task.v_segment, task.plan_row, task.first, task.head);
    };
    const auto rows = [&](const TileTask& task) {
      return std::tuple(task.first, task.rows, q_.length(task.sequence * q_.heads + task.head));
    };
    const auto alike = [&](const TileTask& a, const TileTask& b) {
      return a.k_segment == b.k_segment && a.v_segment == b.v_segment && a.plan_row == b.plan_row &&
             (from_one_key || rows(a) == rows(b));
    };
    if (joins)
      std::stable_sort(pieces_.begin(), pieces_.end(),
                       [&](const TaskPart& a, const TaskPart& b) { return place(task_of(a)) < place(task_of(b)); });
    // Only as many together as leave enough to share out.
    const int most = int(std::clamp<int64_t>(int64_t(pieces_.size()) / (6 * threads()), 1, kTogether));
    for (size_t i = 0; i < pieces_.size(); ++i) {
      const TaskPart& piece = pieces_[i];
      Team* const last = joins && !teams_.empty() ? &teams_.back() : nullptr;
      const TaskPart* with = last ? &pieces_[size_t(last->first)] : nullptr;
      if (with && last->count < most && piece.pieces == 1 && with->pieces == 1 && alike(task_of(*with), task_of(piece)))
        ++last->count, last->cost += piece.cost;
      else teams_.push_back({int64_t(i), 1, piece.cost});
    }
    // The longest first, so that no worker is left alone with one at the end.
    std::stable_sort(teams_.begin(), teams_.end(), [](const Team& a, const Team& b) { return a.cost > b.cost; });
  }

  void work(Tile& tile, const TaskPart& piece) {
    const TileTask& task = tasks_[size_t(piece.task)];
    const KeyView keys = source_.view(task, mods_);
    const Lanes lanes = lanes_of(task, q_, keys.size(), mods_, plan_.causal);
    const int64_t floats = TileState::floats(shape_.d_v, lanes.width);
    float* shared = piece.pieces > 1 ? states_ + state_at_[size_t(piece.first_piece)].floats : nullptr;
    const TileState state = TileState::at(shared ? shared + piece.index * floats : tile.state, shape_.d_v, lanes.width);
    clear(state, shape_.d_v, lanes.width, mods_.weight);
    if (!skipped(lanes)) fill(tile, piece, task, keys, lanes, state);
    if (!shared) return finish(lanes, piece.part, state, lanes.width);
    if (std::atomic_ref<int64_t>(done_[piece.first_piece]).fetch_add(1, std::memory_order_acq_rel) + 1 < piece.pieces)
      return;
    const TileState all = TileState::at(shared, shape_.d_v, lanes.width);
    for (int64_t i = 1; i < piece.pieces; ++i)
      absorb(all, TileState::at(shared + i * floats, shape_.d_v, lanes.width), shape_.d_v, lanes.width);
    finish(lanes, piece.part, all, lanes.width);
  }

  void work_together(Tile& tile, const Team& team) {
    const auto task = [&](int i) -> const TileTask& { return tasks_[size_t(pieces_[size_t(team.first + i)].task)]; };
    const KeyView keys = source_.view(task(0), mods_);
    Lanes lanes[kTogether];
    KeyRange range{std::numeric_limits<int64_t>::max(), 0};
    int widest = -1;  // of those that read, the one that sees most
    for (int i = 0; i < team.count; ++i) {
      const Tile own = tile.of(i);
      lanes[i] = lanes_of(task(i), q_, keys.size(), mods_, plan_.causal);
      clear(TileState::at(own.state, shape_.d_v, lanes[i].width), shape_.d_v, lanes[i].width, mods_.weight);
      if (skipped(lanes[i])) continue;
      pack_queries(own, lanes[i], q_.values, mods_.row_factor);
      const KeyRange here = visible(lanes[i], keys, mods_, plan_.causal);
      if (widest < 0 || here.high > range.high) widest = i;
      range = {std::min(range.low, here.low), std::max(range.high, here.high)};
    }
    if (widest >= 0) {
      const LogitRule rule = logit_rule(plan_, mods_, keys, plan_.causal);
      Walk walk(plan_, task(0).plan_row, -1, range.low, range.high);
      each_chunk(tile, walk, keys, lanes[widest], [&](Chunk& chunk) {
        const int all = chunk.count;
        for (int i = 0; i < team.count; ++i) {
          chunk.count = all;
          if (plan_.causal)
            while (chunk.count > 0 && float(chunk.key[chunk.count - 1]) > lanes[i].limit_high) --chunk.count;
          if (chunk.count == 0 || skipped(lanes[i])) continue;
          Tile own = tile.of(i);
          meet(own, lanes[i], chunk, rule, TileState::at(own.state, shape_.d_v, lanes[i].width));
        }
      });
    }
    for (int i = 0; i < team.count; ++i)
      finish(lanes[i], 0, TileState::at(tile.of(i).state, shape_.d_v, lanes[i].width), lanes[i].width);
  }

  /// Of each block of the plan, in ascending order, the queries that read it become lanes of a tile.
  void work_by_row(Tile& tile, const TileTask& task) {
    constexpr int32_t none = std::numeric_limits<int32_t>::max();
    const KeyView keys = source_.view(task, mods_);
    const TileState states = TileState::at(tile.states, shape_.d_v, kGathered);
    clear(states, shape_.d_v, kGathered, mods_.weight);
    const int rows = int(task.rows);
    // The last key that row 0 sees.
    const int64_t shown = keys.size() - q_.length(task.sequence * q_.heads + task.head) + task.first;
    int64_t entry[kGathered];
    int32_t next[kGathered];
    const auto advance = [&](int i, bool first) {
      const int64_t row = plan_rows_.row(task.sequence, task.head, q_.heads, task.first + i, plan_.q_tile);
      entry[i] = first ? plan_.begin(row) : entry[i] + 1;
      next[i] = entry[i] < plan_.end(row) ? plan_.index.at<int32_t>(entry[i]) : none;
      if (next[i] != none && plan_.causal && next[i] * int64_t(plan_.k_tile) > shown + i) next[i] = none;
    };
    for (int i = 0; i < rows; ++i) advance(i, true);
    for (;;) {
      const int32_t block = *std::min_element(next, next + rows);
      if (block == none) break;
      int chosen[kGathered], count = 0;
      for (int i = 0; i < rows; ++i)
        if (next[i] == block) chosen[count++] = i, advance(i, false);
      for (int first = 0; first < count; first += kTile)
        read_block(tile, task, keys, block, std::span(chosen + first, size_t(std::min(kTile, count - first))), states);
    }
    for (int first = 0; first < rows; first += kTile) {
      TileTask part = task;
      part.first += first;
      part.rows = std::min(kTile, rows - first);
      finish(lanes_of(part, q_, keys.size(), mods_, plan_.causal), 0,
             {states.out + first, states.high + first, states.sum + first}, kGathered);
    }
  }

  void read_block(Tile& tile, const TileTask& task, const KeyView& keys, int32_t block, std::span<const int> chosen,
                  TileState states) const {
    const Lanes lanes = lanes_of(task, q_, keys.size(), mods_, plan_.causal, chosen);
    if (skipped(lanes)) return;
    Plan whole;
    whole.causal = plan_.causal;
    const KeyRange range = visible(lanes, keys, mods_, plan_.causal);
    const int64_t first = int64_t(block) * plan_.k_tile;
    Walk walk(whole, 0, -1, std::max(first, range.low), std::min(first + plan_.k_tile, range.high));
    const TileState state = TileState::at(tile.state, shape_.d_v, lanes.width);
    clear(state, shape_.d_v, lanes.width, mods_.weight);
    fill(tile, walk, logit_rule(whole, mods_, keys, plan_.causal), keys, lanes, state);
    absorb(states, kGathered, chosen.data(), lanes.count, state, lanes.width, shape_.d_v);
  }

  void fill(Tile& tile, const TaskPart& piece, const TileTask& task, const KeyView& keys, const Lanes& lanes,
            TileState state) const {
    const LogitRule rule = logit_rule(plan_, mods_, keys, plan_.causal);
    KeyRange range = visible(lanes, keys, mods_, plan_.causal);
    const bool dense = plan_.form == Plan::Form::Dense;
    if (dense && piece.pieces > 1) range = {piece.begin, piece.end};
    Walk walk(plan_, task.plan_row, plan_.parts > 1 ? piece.part : -1, range.low, range.high);
    if (!dense && piece.pieces > 1) walk.entries(piece.begin, piece.end);
    fill(tile, walk, rule, keys, lanes, state);
  }

  void fill(Tile& tile, Walk& walk, const LogitRule& rule, const KeyView& keys, const Lanes& lanes, TileState state) const {
    pack_queries(tile, lanes, q_.values, mods_.row_factor);
    each_chunk(tile, walk, keys, lanes, [&](Chunk& chunk) { meet(tile, lanes, chunk, rule, state); });
  }

  /// Calls f(chunk) for the walk's keys, open, as far as these lanes see them.
  template <class Fn>
  void each_chunk(Tile& tile, Walk& walk, const KeyView& keys, const Lanes& lanes, Fn&& f) const {
    Chunk chunks[2];
    bool more = keys.gather(walk, lanes, mods_, chunks[0]);
    for (int i = 0; more; i ^= 1) {
      Chunk& chunk = chunks[i];
      more = keys.gather(walk, lanes, mods_, chunks[i ^ 1]);
      if (more) keys.prefetch(chunks[i ^ 1], shape_);
      keys.open(tile, chunk, true);
      f(chunk);
    }
  }

  void meet(Tile& tile, const Lanes& lanes, const Chunk& chunk, const LogitRule& rule, TileState state) const {
    scores(tile, lanes, chunk);
    const bool made = logits(tile, lanes, chunk, rule);
    absorb(tile, lanes, chunk, made, mods_.weight, state, true);
  }

  /// `width`: of the lanes of `state`.
  void finish(const Lanes& lanes, int part, TileState state, int width) const {
    for (int lane = 0; lane < lanes.count; ++lane) {
      const int64_t row = lanes.row[lane];
      const float gain = mods_.gain ? mods_.gain.as<float>()[row] : 1;
      float* out = to_.row(part, row);
      if (gain == 0) {
        std::fill_n(out, shape_.d_v, 0.0f);
        to_.set_lse(part, row, -std::numeric_limits<float>::infinity());
        continue;
      }
      if (mods_.sink_logits && part == 0)
        add_sink(state, shape_.d_v, width, lane, mods_.sink_logits.as<float>()[lanes.head[lane]]);
      write_lane(state, shape_.d_v, width, lane, gain, mods_.weight, out);
      to_.set_lse(part, row, log_sum(state, lane, mods_.weight));
    }
  }

  struct Offset {
    int64_t floats;
  };

  Queue& queue_;
  const Ragged& q_;
  const KeySource& source_;
  const Plan& plan_;
  const Mods& mods_;
  Outputs to_;
  bool by_row_;
  PlanRows plan_rows_;
  TileShape shape_;
  std::vector<TileTask> tasks_;
  std::vector<TaskPart> pieces_;
  std::vector<Team> teams_;
  std::vector<Offset> state_at_;
  int64_t counters_ = 0;
  float* states_ = nullptr;
  int64_t* done_ = nullptr;
};

void check_outputs(const char* where, const Ragged& q, const Plan& plan, int64_t d_v, Tensor out, Tensor lse) {
  const int64_t rows = q.values.size[0];
  if (plan.parts > 1) {
    check_tensor(where, "out", out, {plan.parts, rows, d_v});
    check_tensor(where, "lse", lse, {plan.parts, rows}, true);
  } else {
    check_tensor(where, "out", out, {rows, d_v});
    check_tensor(where, "lse", lse, {rows}, true);
  }
}

}  // namespace

void attend(Queue& queue, const Ragged& q, const Ragged& k, const Ragged& v, const Plan& plan, const Mods& mods,
            Tensor out, Tensor lse) {
  check_attention("attend", q, k, v, &plan, mods);
  require(bool(v.values), "attend", "there are no values");
  check_outputs("attend", q, plan, v.values.size[1], out, lse);
  const Scratch scratch(queue.scratch);
  if (takes_bf16(q, k, v, plan, mods)) return attend_bf16(queue, q, k, &v, plan, mods, {out, lse, plan.parts > 1});
  KeySource source;
  source.k = &k;
  source.v = &v;
  Attend(queue, q, source, plan, mods, {out, lse, plan.parts > 1}).run(int(v.values.size[1]));
}

void attend_store(Queue& queue, const Ragged& q, const Pages& pages, const Read& read, const Mods& mods, Tensor out,
                  Tensor lse) {
  constexpr const char* where = "attend_store";
  require(read.plan.form != Plan::Form::Interval, where, "a read is dense, of blocks or of tokens");
  require(!pages.layouts.empty(), where, "the store has no layouts");
  check_read(where, pages, &read);
  const int64_t d = pages.layouts[0].d, d_v = pages.layouts[0].d_v;
  require(q.values.rank == 2 && is_float(q.values.type) && q.values.size[1] == d, where,
          "q and the store's keys differ in width");
  require(q.sequences() * pages.kv_heads == pages.segments(), where,
          "q and the store hold different numbers of sequences");
  require(mods.k_map || q.heads % pages.kv_heads == 0, where, "the store's heads do not divide the query heads",
          "give k_map and v_map");
  check_plan(read.plan, where);
  check_outputs(where, q, read.plan, d_v, out, lse);
  const Scratch scratch(queue.scratch);
  Mods own = mods;
  own.until = own.key_factor = own.row_factor = own.key_bias = own.k_pos = {};
  if (decode(queue, q, pages, read.plan, own, out, lse)) return;
  KeySource source;
  source.pages = &pages;
  source.read = &read;
  if (pages.plain_keys) {
    double* each = queue.scratch.take(Dtype::F64, {std::max(read.rope->dims / 2, 1)}).as<double>();
    turns_of(*read.rope, each);
    source.turns = {read.rope, each};
  }
  Attend(queue, q, source, read.plan, own, {out, lse, read.plan.parts > 1}).run(int(d_v));
}

}  // namespace heed::HEED_ISA
