#include "kernels/cpu/row_sums.h"

#include <algorithm>
#include <limits>

#include "kernels/check.h"

namespace heed::HEED_ISA {

Observed::Observed(const char* where, Queue& queue, const Ragged& q, const Keys& keys, const Plan* plan,
                   const Mods& mods, bool share)
    : queue_(queue), q_(q), mods_(mods), plan_(plan ? *plan : Plan{}) {
  require(!keys.panel != !keys.pages, where, "keys come from a panel or from pages");
  if (keys.panel) {
    check_attention(where, q, *keys.panel, {}, plan, mods);
    source_.k = keys.panel;
  } else {
    const Pages& pages = *keys.pages;
    require(!pages.layouts.empty(), where, "the store has no layouts");
    require(!pages.plain_keys || keys.read, where, "the store keeps plain keys, and no read turns them");
    check_read(where, pages, keys.read);
    require(q.values.rank == 2 && is_float(q.values.type) && q.values.size[1] == pages.layouts[0].d, where,
            "q and the store's keys differ in width");
    require(q.sequences() * pages.kv_heads == pages.segments(), where,
            "q and the store hold different numbers of sequences");
    require(mods.k_map || q.heads % pages.kv_heads == 0, where, "the store's heads do not divide the query heads",
            "give k_map");
    if (plan) check_plan(*plan, where);
    mods_.until = mods_.key_factor = mods_.row_factor = mods_.key_bias = mods_.k_pos = {};
    source_.pages = &pages;
    source_.read = keys.read;
    if (pages.plain_keys) {
      double* each = queue.scratch.take(Dtype::F64, {std::max(keys.read->rope->dims / 2, 1)}).as<double>();
      turns_of(*keys.read->rope, each);
      source_.turns = {keys.read->rope, each};
    }
  }
  mods_.v_map = {};
  shape_.d = int(q.values.size[1]);
  shape_.factors = mods_.row_factor ? int(mods_.row_factor.size[1]) : 0;
  shape_.dots = source_.dots(q.values.type, shape_.d);
  tasks_ = tile_tasks(plan_, q, source_.heads(), source_.heads(), mods_, share);
}

TileState Observed::sums(int64_t task, int64_t range, int width) const {
  return TileState::at(sums_ + (places_[size_t(task)].first + range) * TileState::floats(0, kTile), 0, width);
}

void Observed::sum_rows(Tensor lse) {
  lse_ = lse;
  if (lse_) return;
  struct Piece {
    int64_t task, range;
  };
  std::vector<Piece> pieces;
  for (int64_t t = 0; t < int64_t(tasks_.size()); ++t) {
    const int64_t size = source_.view(tasks_[size_t(t)], mods_).size();
    const int64_t ranges = std::max<int64_t>(1, (size + kObservedRange - 1) / kObservedRange);
    places_.push_back({int64_t(pieces.size()), ranges});
    for (int64_t r = 0; r < ranges; ++r) pieces.push_back({t, r});
  }
  sums_ = queue_.scratch.take(Dtype::F32, {std::max<int64_t>(1, int64_t(pieces.size())) * TileState::floats(0, kTile)}).as<float>();
  parallel_tiles(queue_, shape_, int64_t(pieces.size()), [&](Tile& tile, int64_t i) {
    const auto [t, r] = pieces[size_t(i)];
    const TileTask& task = tasks_[size_t(t)];
    const KeyView keys = source_.view(task, mods_);
    const Lanes at = lanes(task, keys);
    const TileState state = sums(t, r, at.width);
    clear(state, 0, at.width, mods_.weight);
    each_chunk(tile, task, keys, at, r * kObservedRange, (r + 1) * kObservedRange,
               [&](const Chunk& chunk, bool made) { absorb(tile, at, chunk, made, mods_.weight, state, false); });
  });
}

void Observed::log_sums(int64_t task, const Lanes& lanes, float* to) const {
  for (int lane = 0; lane < lanes.width; ++lane) to[lane] = lse(task, lanes, lane) * kLog2e;
}

void Observed::write_lse(const Tensor& to) const {
  for (int64_t t = 0; t < int64_t(tasks_.size()); ++t) {
    const Lanes at = lanes(tasks_[size_t(t)], source_.view(tasks_[size_t(t)], mods_));
    for (int lane = 0; lane < at.count; ++lane) to.as<float>()[at.row[lane] * to.stride[0]] = lse(t, at, lane);
  }
}

float Observed::lse(int64_t task, const Lanes& lanes, int lane) const {
  if (lse_) return lse_.as<float>()[lanes.row[lane] * lse_.stride[0]];
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const int64_t ranges = places_[size_t(task)].ranges;
  const bool softmax = mods_.weight == WeightFunction::Softmax;
  const float sink = softmax && mods_.sink_logits ? mods_.sink_logits.as<float>()[lanes.head[lane]] * kLog2e : -infinity;
  float high = softmax ? sink : 0, sum = 0;
  for (int64_t r = 0; softmax && r < ranges; ++r) high = std::max(high, sums(task, r, lanes.width).high[lane]);
  if (high == -infinity) return -infinity;
  if (sink != -infinity) sum = std::exp2(sink - high);
  for (int64_t r = 0; r < ranges; ++r) {
    const TileState state = sums(task, r, lanes.width);
    sum += state.sum[lane] * std::exp2(state.high[lane] - high);
  }
  return (high + std::log2(sum)) / kLog2e;
}

}  // namespace heed::HEED_ISA
