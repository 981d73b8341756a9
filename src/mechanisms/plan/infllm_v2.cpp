#include <algorithm>
#include <cmath>

#include "attention/maps.h"
#include "attention/reads.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// InfLLM-V2 (2025): each query weighs windows of keys by their means, overlapping by half; the weights of a group's heads
// are added, a block takes the largest of the windows that touch it, and the whole group reads the best blocks, the first
// and the latest among them. The same in prompts and while decoding; short texts are dense. Denominators are exact (the
// released kernel may take them from coarser windows).
struct InfLlmV2 final : Mechanism {
  int stride, block, topk, first, local;
  int64_t dense_len;

  static std::vector<ParamInfo> params() {
    using M = InfLlmV2;
    return {
        param(&M::topk, "topk", 96, 1, 1 << 20, "blocks that a query reads, the first and the latest among them"),
        param(&M::block, "block", 64, 1, 64, "keys of a block: 1, 2, 4, … 64"),
        param(&M::stride, "stride", 16, 1, 64, "keys between windows, which are twice as long; divides block"),
        param(&M::first, "init_blocks", 1, 0, 1 << 20, "first blocks, which are always read"),
        param(&M::local, "local_blocks", 32, 0, 1 << 20, "blocks before the query's own that are always read, and it"),
        param<M, int64_t>(&M::dense_len, "dense_len", 8192, 0, 1 << 30, "texts shorter than this are dense"),
    };
  }
  std::string check() const override {
    if (const std::string message = uneven(block, "block"); !message.empty()) return message;
    return block % stride ? "stride=" + std::to_string(stride) + " does not divide block=" + std::to_string(block) : "";
  }
  std::string means() const { return "infllm_v2.mean" + std::to_string(stride); }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = true;
    n.columns = {{means(), Column::Keeps::KeyMean, 1, stride}};
    return n;
  }

  int64_t blocks_of(int64_t keys) const { return (keys + block - 1) / block; }
  /// The most blocks in a list: a short text of a batch lists all of its own.
  int64_t capacity(int64_t longest) const {
    return std::max<int64_t>(1, std::min(blocks_of(longest), std::max<int64_t>(topk, blocks_of(dense_len))));
  }
  Num count(const Num& keys) const { return pick(keys < dense_len, ceil_div(keys, block), topk); }
  Num stays(const Num& number, const Num& own) const { return number < first || number >= own - local; }

  Plan plan(LayerView& at) const override {
    causal_only(at, "infllm_v2");
    const int64_t longest = longest_keys(at);
    // A sliding window already bounds what is read.
    if (at.mods.window > 0 || longest < dense_len || topk >= blocks_of(longest)) return dense_plan(1, block);
    Queue& queue = at.queue;
    const Lists all = lists(queue, plan_rows(at, 1), capacity(longest));
    each_slice(at, 1, [&](const Slice& s) {
      const int64_t blocks = blocks_of(s.m), ratio = block / stride, windows = std::max<int64_t>(1, s.m / stride - 1);
      const Grids weights = window_weights(at, s, window_means(queue, s.k, s.m, stride), windows, stride),
                  inside = grids(queue, 1, s.n, (windows + ratio - 1) / ratio);
      Reduce most;
      most.kind = ReduceKind::Max, most.col_block = int(ratio);
      at.run().reduce(queue, weights, most, inside);
      // Besides those that begin in a block, the window before them reaches into it.
      const Grids scores = grids(queue, 1, s.n, blocks);
      const Num i = floor_div(place(), blocks), j = mod(place(), blocks), before = j * ratio - 1;
      const int64_t in_row = (windows + ratio - 1) / ratio;
      compute(queue, scores.cells, pick(j < in_row, load(inside.cells.values, i * in_row + j), 0), scores.cells.values);
      const Num reaching = pick(before >= 0 && before < windows, load(weights.cells.values, i * windows + before), 0);
      compute(queue, scores.cells, max(load(scores.cells.values, index()), reaching), scores.cells.values);
      std::vector<int64_t> visible;
      for (int64_t r = 0; r < s.n; ++r) visible.push_back((s.m - s.n + r) / block + 1);
      const Ragged rows = rows_of(queue, scores, visible);
      compute(queue, rows, pick(stays(place(), length() - 1), kInfinity, load(rows.values, index())), rows.values);
      Select best;
      best.k = s.m < dense_len ? blocks : topk;
      const Lists read = chosen(queue, rows, best, all.capacity);
      const Lists heads = all.part(s.row, s.row + s.q.heads * s.n);
      compute(queue, load(read.index, mod(index(), s.n * all.capacity)), heads.index);
      compute(queue, load(read.count, mod(index(), s.n)), heads.count);
    });
    return tiled_blocks(at, block, all.index, all.count, all.capacity, blocks_of(longest));
  }

  Read read(LayerView& at) const override {
    const int64_t longest = at.store->longest(), h = at.q.heads, g = at.model.g;
    if (at.mods.window > 0 || longest < dense_len) return {};
    Queue& queue = at.queue;
    const Ragged halves = block_scores(at, at.q, means(), means(), stride);
    const Ragged windows = numbers(queue, halves.segments(),
                                   max(0, floor_div(held_entries(at, index(), h), stride) - 1), h, halves.bound);
    const float scale = at.scale();
    const Num half = begin_of(halves, segment()) + place();
    compute(queue, windows, 0.5 * scale * (load(halves.values, half) + load(halves.values, half + 1)), windows.values);
    const Ragged weights = over_group(at, softmax(queue, windows), Spread::Of::Sum);
    const Ragged scores = numbers(queue, weights.segments(), ceil_div(held_entries(at, index(), g), block), g,
                                  weights.segments() * blocks_of(longest));
    compute(queue, scores, 0, scores.values);
    for (int64_t u = -1; u < block / stride; ++u) {
      const Num window = place() * (block / stride) + u;
      const Num there = window >= 0 && window < length_of(weights, segment());
      compute(queue, scores,
              max(load(scores.values, index()), pick(there, load(weights.values, begin_of(weights, segment()) + window), 0)),
              scores.values);
    }
    compute(queue, scores, pick(stays(place(), length() - 1), kInfinity, load(scores.values, index())), scores.values);
    return best_blocks(
        at, Plan::Scope::KvHead, scores, block, [&](const Num& s) { return count(held_entries(at, s, g)); },
        capacity(longest));
  }
};

}  // namespace

Entry infllm_v2() {
  Entry e = entry<InfLlmV2>("infllm_v2",
                            "InfLLM-V2: Dense-Sparse Switchable Attention for Seamless Short-to-Long Adaptation",
                            "2025, arXiv 2509.24663", 2025, Role::Plan | Role::Read);
  e.equation =
      "p = Σ over the group of softmax(q · mean of 32 keys s); score(J) = max of p over the windows that touch "
      "block J; read the top blocks";
  e.needs = "the whole prompt, and a column of means: 1 / stride of the keys in f32";
  e.identity = "infllm_v2(topk=1000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
