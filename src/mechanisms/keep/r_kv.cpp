#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"
#include "mechanisms/keep/recent_queries.h"

namespace heed::mechanisms {

namespace {

// R-KV (Cai et al., 2025): a long answer repeats itself, so an entry is worth what the last queries pay it, less what
// other keys already say. Of keys alike the newest keeps its worth: in every row the last key that is like it enough does
// not count (the first key where there is none, as released).
struct RKV final : KeepPolicy {
  int window, kernel;
  double lambda, alike;

  static std::vector<ParamInfo> params() {
    using M = RKV;
    return keep_params<M>(
        "1024", "every(128)",
        {
            param(&M::window, "window", 8, 1, 256, "last queries, which vote and whose keys stay"),
            param(&M::kernel, "kernel", 7, 1, 63, "width of the smoothing over keys, odd"),
            param(&M::lambda, "lambda", 0.1, 0, 1, "weight of attention; the rest is redundancy's (released: 0.07)"),
            param(&M::alike, "alike", 0.5, -1, 1, "the cosine above which two keys are alike"),
        });
  }
  std::string check() const override {
    if (kernel % 2 == 0) return "kernel=" + std::to_string(kernel) + " is even: a smoothing width has a middle";
    return too_small(budget, window, "window");
  }
  std::unique_ptr<State> open(const ModelInfo& model) const override {
    return std::make_unique<RecentQueries>(model.layers, window);
  }
  void observe(LayerView& at) const override {
    if (at.phase != Phase::Replay) static_cast<RecentQueries&>(at.state()).take(at);
  }

  /// The mean over rows of softmax over the keys before the window of the group's largest logit, smoothed.
  Ragged attention(LayerView& at, std::span<const int64_t> recent) const {
    Queue& queue = at.queue;
    Ragged logits = static_cast<const RecentQueries&>(at.state()).logits(at);  // runs: KV head, row, query head
    const int64_t group = at.model.group();
    logits.heads = group;
    Ragged rows = members(queue, spread(queue, logits, {.of = Spread::Of::Max, .over = Spread::Over::Heads}), group, 0);
    rows.heads = at.store->shape().kv_heads * window;
    // A row that a short text has not had pays nothing.
    const Ragged paid = combine(queue, softmax(queue, without_last(queue, rows, recent)), Combine::Finite, 0);
    const Ragged mean = over_runs(at, paid, Spread::Of::Mean);
    Ragged smoothed = mean;
    smoothed.values = queue.scratch.take(Dtype::F32, {mean.values.size[0]});
    at.run().smooth(queue, without_last(queue, mean, recent), PoolKind::Max, kernel, smoothed.values);
    return smoothed;
  }

  /// softmax over keys of their mean cosine to the other keys of the head.
  Ragged redundancy(LayerView& at) const {
    Queue& queue = at.queue;
    const Ragged keys = unit_rows(queue, stored_keys(at)), out = at.per_entry();
    const int64_t all = keys.segments(), step = at.decoding() ? all : 1;  // one head of a prompt at a time: m² numbers
    for (int64_t first = 0; first < all; first += step) {
      const Scratch scratch(queue.scratch);
      const Ragged some = segments(keys, first, first + step, step), to = segments(out, first, first + step, step);
      int64_t cells = 0;
      for (int64_t s = first; s < first + step; ++s) cells += at.store->length(s) * at.store->length(s);
      Grids alike_to;
      alike_to.rows = alike_to.cols = compute(queue, Dtype::I64, {step}, length_of(some, index()));
      alike_to.cells = numbers(queue, step, load(alike_to.rows, index()) * load(alike_to.rows, index()), step, cells);
      Proxy cosine;
      cosine.scale = 1 / float(at.store->shape().d), cosine.causal = false;
      queue.run->proxy(queue, some, some, cosine, alike_to);
      const Num n = load(alike_to.rows, segment()), row = floor_div(place(), n), col = mod(place(), n);
      Grids last = alike_to, columns = alike_to;  // the last key alike, for each row; sums over rows
      last.cols = columns.rows = compute(queue, Dtype::I64, {step}, 1);
      last.cells = to, last.cells.values = queue.scratch.take(Dtype::F32, {to.values.size[0]});
      columns.cells = last.cells, columns.cells.values = queue.scratch.take(Dtype::F32, {to.values.size[0]});
      Grids marks = alike_to;
      marks.cells.values = queue.scratch.take(Dtype::F32, {cells});
      const Num cell = load(alike_to.cells.values, index());
      compute(queue, marks.cells, pick(cell > alike && (row == col) == 0, col, 0), marks.cells.values);
      queue.run->reduce(queue, marks, {.to = Reduce::To::Rows, .kind = ReduceKind::Max}, last);
      const Num newest = load(last.cells.values, begin_of(to, segment()) + row);
      compute(queue, alike_to.cells, pick(col == newest || row == col, 0, cell), alike_to.cells.values);
      queue.run->reduce(queue, alike_to, {.to = Reduce::To::Columns}, columns);
      compute(queue, to, load(columns.cells.values, index()) / length(), to.values);
    }
    return softmax(queue, out);
  }

  Ragged score(LayerView& at) const override {
    const std::vector<int64_t> recent = affordable(at, budget, window);
    const Ragged paid = combine(at.queue, attention(at, recent), Combine::Multiply, float(lambda));
    return force_last(at.queue, combine(at.queue, paid, redundancy(at), Combine::Add, float(lambda) - 1), recent);
  }
};

}  // namespace

Entry r_kv() {
  Entry e = entry<RKV>("r-kv", "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models",
                       "Cai et al., 2025, arXiv 2505.24133", 2025, uint8_t(Role::Keep));
  e.equation =
      "s_j = λ pool_7(mean_i softmax_j max over the group of q_i·k_j / √d) − (1 − λ) softmax_j mean_i cos(k_i, k_j)";
  e.needs = "the last queries";
  e.identity = "r-kv(budget=1.0,when=prompt)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
