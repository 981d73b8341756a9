#include <algorithm>
#include <cmath>

#include "attention/maps.h"
#include "attention/reads.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// ShadowKV (Sun et al., 2024), what it reads: chunks of a prompt stand behind their mean key, the landmark, and a KV head
// reads those that any query head of its group pays most. Read whole besides: chunks with a key that its landmark does not
// resemble, the latest ones, and what was generated. Keys are read as they are held, not from their low-rank form.
struct ShadowKV final : Mechanism {
  Budget budget;
  int chunk, outliers, latest, first_dense;

  static std::vector<ParamInfo> params() {
    using M = ShadowKV;
    return {
        budget_param(&M::budget, "2048", "entries of chosen chunks, for each KV head; what is read whole comes on top"),
        param(&M::chunk, "chunk", 8, 1, 64, "entries of a chunk: 1, 2, 4, … 64"),
        param(&M::outliers, "outliers", 48, 0, 1 << 20, "chunks read whole because a key of theirs is unlike the mean"),
        param(&M::latest, "latest", 4, 0, 1 << 20, "latest whole chunks of a prompt that are read whole"),
        dense_layers_param(&M::first_dense, 0),
    };
  }
  std::string check() const override { return uneven(chunk, "chunk"); }

  std::string landmarks() const { return "shadowkv.mean" + std::to_string(chunk); }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.columns = {{landmarks(), Column::Keeps::KeyMean, 1, chunk}, {.name = "shadowkv.outlier"}};
    return n;
  }

  // Behind a prompt: 1 beside the entries of the chunks whose least cosine between key and landmark is lowest.
  void observe(LayerView& at) const override {
    if (at.decoding() || at.phase == Phase::Replay || outliers == 0) return;
    Queue& queue = at.queue;
    const Ragged keys = stored_keys(at), mean = spread(queue, keys, {.of = Spread::Of::Mean, .block = chunk});
    const Ragged cosine = row_dots(queue, unit_rows(queue, keys), unit_rows(queue, mean), 1 / float(at.store->shape().d));
    const Ragged least = spread(queue, cosine, {.of = Spread::Of::Min, .block = chunk});
    const int64_t longest = at.store->longest();
    // Only chunks that are not read whole anyway compete.
    const Ragged chunks = numbers(queue, least.segments(), first_whole(length_of(least, index())), least.heads,
                                  least.bound / chunk + least.segments());
    compute(queue, chunks, -1 * load(least.values, begin_of(least, segment()) + place() * chunk), chunks.values);
    Select worst;
    worst.k = outliers;
    const Lists found = chosen(queue, chunks, worst, std::min<int64_t>(outliers, longest / chunk + 1));
    const Ragged flags = at.per_entry();
    compute(queue, flags, found.has(segment(), floor_div(place(), chunk)), flags.values);
    at.set_column("shadowkv.outlier", flags);
  }

  /// The first chunk of `held` prompt entries that is read for its place.
  Num first_whole(const Num& held) const { return max(0, floor_div(held, chunk) - latest); }

  Read read(LayerView& at) const override {
    if (reads_all(at, first_dense)) return {};
    Queue& queue = at.queue;
    const Ragged flags = at.column("shadowkv.outlier");
    const Ragged scores = block_scores(at, at.q, landmarks(), landmarks(), chunk);
    const int64_t group = at.model.group();
    const float scale = at.scale();
    const auto whole = [&](const Num& head) {
      return load(flags.values, begin_of(flags, head) + place() * chunk) > 0.5 ||
             place() >= first_whole(load(at.store->pages().length, head) - (at.step() + 1));
    };
    compute(queue, scores, pick(whole(floor_div(segment(), group)), -kInfinity, scale * load(scores.values, index())),
            scores.values);
    const Ragged paid = over_group(at, softmax(queue, scores), Spread::Of::Max);
    Select best;
    best.count = compute(queue, Dtype::I32, {paid.segments()},
                         ceil_div(granted(budget, load(at.store->pages().length, index())), chunk));
    const int64_t capacity = std::max<int64_t>(1, (at.store->longest() + chunk - 1) / chunk);
    const BlockChoice choice = united(queue, paid, best, capacity, whole(segment()));
    return chosen_blocks(at, Plan::Scope::KvHead, choice.rows, choice.how, chunk, capacity);
  }
};

}  // namespace

Entry shadowkv() {
  Entry e = entry<ShadowKV>("shadowkv", "ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM Inference",
                            "Sun et al., 2024, arXiv 2410.21465", 2024, uint8_t(Role::Read));
  e.equation =
      "max over the group of softmax(q · l s), l the mean key of a chunk; read the top B / 8 chunks, outliers "
      "(lowest min cos(k, l)) and the latest";
  e.needs = "a column of means, 1 / chunk of the keys in f32, and a number beside each entry";
  e.identity = "shadowkv(budget=1.0)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
