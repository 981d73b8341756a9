#include <algorithm>

#include "attention/maps.h"
#include "attention/number_list.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Light Forcing (Lv et al., 2026) for video that grows chunk by chunk. A tile picks frames by their mean keys, beside the
// first, the latest and those of its own chunk, and of their blocks the best by mean keys. How many depends on the chunk:
// early ones, which reach a higher noise level, read more, so that all together read what `target` says; the first
// is dense. The authors' code is not released: sizes and counts are those of a third party's. A block that two frames share
// belongs to both. Of text frames are stretches of tokens: our extension, in which a tile reads its own block too.
struct LightForcing final : Mechanism {
  double sparsity, target;
  NumberList noise;
  int64_t frame, frames, chunks, topk, first, latest;
  int block;

  static std::vector<ParamInfo> params() {
    using M = LightForcing;
    return {
        param<M, int64_t>(&M::frame, "frame", 1560, 1, 1000000000, "tokens of a frame"),
        param<M, int64_t>(&M::frames, "frames", 3, 1, 1 << 20, "frames of a chunk"),
        param<M, int64_t>(&M::chunks, "chunks", 7, 2, 1 << 20, "chunks of the whole video"),
        param(&M::sparsity, "sparsity", 0.95, 0, 1, "share of the blocks that a chunk of noise level 0 leaves out"),
        param(&M::target, "target", 0.85, 0, 1, "share that all chunks but the first leave out together"),
        param(&M::noise, "noise", "list", "", "[1,0.5,…]",
              "noise levels of the second and later chunks; empty: falling evenly from 1 to 0"),
        param<M, int64_t>(&M::topk, "topk", 4, 0, 1000000000, "frames that a tile picks"),
        param<M, int64_t>(&M::first, "first", 1, 0, 1 << 20, "first frames, which are among them"),
        param<M, int64_t>(&M::latest, "latest", 4, 0, 1 << 20, "frames before the chunk that are among them"),
        param(&M::block, "block", 128, 1, 4096, "queries and keys of a block"),
    };
  }
  std::string check() const override {
    if (target > sparsity) return "target is more than sparsity";
    if (!noise.values.empty() && int64_t(noise.values.size()) != chunks - 1)
      return "noise has " + std::to_string(noise.values.size()) + " levels, and " + std::to_string(chunks - 1) +
             " chunks follow the first";
    return {};
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.whole_prompt = true;
    return n;
  }

  /// The share of blocks that each chunk reads: a chunk's pairs are as many as it has keys, so chunk i counts i-fold.
  std::vector<float> shares() const {
    const auto level = [&](int64_t i) {
      if (!noise.values.empty()) return noise.values[size_t(i - 2)];
      return chunks > 2 ? double(chunks - i) / double(chunks - 2) : 1.0;
    };
    double all = 0, weighed = 0;
    for (int64_t i = 2; i <= chunks; ++i) all += double(i), weighed += double(i) * level(i);
    const double growth = weighed > 0 ? (sparsity - target) * all / weighed : 0;
    std::vector<float> out{1};
    for (int64_t i = 2; i <= chunks; ++i) out.push_back(float(std::clamp(1 - sparsity + level(i) * growth, 0.0, 1.0)));
    return out;
  }

  Plan plan(LayerView& at) const override {
    // A sliding window already bounds what is read.
    if (at.mods.window > 0 || longest_keys(at) <= frame * frames) return dense_plan(block, block);
    Queue& queue = at.queue;
    const Tensor share = queue.upload(shares());
    return chosen_blocks(at, Plan::Scope::QueryHead, block, block, [&](const Slice& s) -> BlockChoice {
      const int64_t blocks = (s.m + block - 1) / block, there = (s.m + frame - 1) / frame;
      const Ragged rows = rows_of(queue, mean_map(at, s, block, block, {}), visible_blocks(at, s, block, block));
      const Num tile = s.m - s.n + mod(index(), s.tiles) * block;
      const Tensor chunk = compute(queue, Dtype::I32, {rows.segments()}, floor_div(tile, frame * frames));
      // Frames between the first and the latest compete.
      const Num fixed_from = load(chunk, segment()) * frames - latest;
      const Grids likeness = grids(queue, s.q.heads, s.tiles, there);
      Proxy dot;
      dot.scale = 1, dot.causal = false;
      at.run().proxy(queue, pooled(queue, s.q, s.n, PoolKind::Mean, block),
                     pooled(queue, s.k, s.m, PoolKind::Mean, int(frame)), dot, likeness);
      const Ragged middle = rows_of(queue, likeness, std::vector<int64_t>(size_t(s.tiles), there));
      compute(queue, middle, pick(place() >= first && place() < fixed_from, load(middle.values, index()), -kInfinity),
              middle.values);
      Select best;
      best.k = topk;
      const Lists picked = chosen(queue, middle, best, std::max<int64_t>(1, std::min(topk, there)));
      // A block competes when it holds a token of one of these frames.
      const Num from = floor_div(place() * block, frame), to = floor_div(min((place() + 1) * block, s.m) - 1, frame);
      const Num list = segment() * picked.capacity, end = list + load(picked.count, segment());
      const Tensor next = queue.scratch.take(Dtype::I32, {rows.values.numel()});  // the first picked frame that it reaches
      compute(queue, rows, find(picked.index, list, end, from), next);
      const Num place_of = load(next, index());
      compute(queue, rows, pick(place_of < end, load(picked.index, place_of), there), next);
      const Num seen = from < first || to >= fixed_from || load(next, index()) <= to;
      compute(queue, rows, pick(seen, load(rows.values, index()), -kInfinity), rows.values);
      if (at.plan.causal)
        compute(queue, rows, pick(own_block(s, block, block), kInfinity, load(rows.values, index())), rows.values);
      Select most;
      const Num density = load(share, min(load(chunk, index()), chunks - 1));
      most.count = compute(queue, Dtype::I32, {rows.segments()},
                           max(1, 0 - floor(1e-6 - density * length_of(rows, index()))));
      return united(queue, rows, most, blocks, load(chunk, segment()) == 0);
    });
  }
};

}  // namespace

Entry light_forcing() {
  Entry e = entry<LightForcing>("light_forcing",
                                "Light Forcing: Accelerating Autoregressive Video Diffusion via Sparse Attention",
                                "Lv et al., 2026, arXiv 2602.04789", 2026, uint8_t(Role::Plan));
  e.equation =
      "of the frames with largest mean q · mean k, the first, the latest and its own chunk's, the top (1 − σ_i) N "
      "blocks; σ_i = σ − α_i β, β so that all chunks leave out the target";
  e.needs = "the whole prompt";
  e.identity = "light_forcing(sparsity=0,target=0,topk=1000000000,frame=16,block=16)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
