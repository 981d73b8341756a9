#pragma once
#include "attention/scores.h"
#include "attention/select.h"

namespace heed::mechanisms {

// The cache eviction of OpenVINO GenAI: while decoding, whole blocks between the first and the latest entries leave, the
// same in all heads of a layer. Votes are what all heads together pay, smoothed towards the keys before; those of a
// prompt are its last rows'.
struct OvBlocks : KeepPolicy {
  int block, sinks, recent, rows, kernel;

  template <class M>
  static std::vector<ParamInfo> block_params(std::vector<ParamInfo> more) {
    std::vector<ParamInfo> all = keep_params<M>(
        "672", "every(1)",
        {
            param(&M::block, "block", 32, 1, 1 << 20, "entries that go together; divides budget, sinks and recent"),
            param(&M::sinks, "sinks", 32, 0, 1 << 20, "first entries that always stay"),
            param(&M::recent, "recent", 128, 0, 1 << 20, "latest entries of whole blocks that always stay"),
            param(&M::rows, "rows", 8, 1, 256, "last queries of a prompt that vote"),
            param(&M::kernel, "kernel", 7, 1, 63, "a key's vote is the largest of so many from it on"),
        });
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  std::string check() const override {
    if (budget.fraction) return "the budget is a number of entries: whole blocks";
    for (const auto& [size, name] :
         {std::pair{int64_t(budget.amount), "budget"}, {int64_t(sinks), "sinks"}, {int64_t(recent), "recent"}})
      if (size % block)
        return std::string(name) + "=" + std::to_string(size) + " is no multiple of block=" + std::to_string(block);
    return too_small(budget, int64_t(sinks) + recent, "sinks + recent");
  }

  /// Nothing goes before the first token is decoded.
  bool settle(LayerView& at) const override { return !at.decoding(); }
  int64_t entries(const Budget& kept, const ModelInfo&, int, int64_t length) const override {
    return kept.entries(length) + beside() + block - 1;
  }
  Tensor allocate(const Allocation& a) const override {
    const int64_t layers = int64_t(a.scores.size()), all = a.scores[0].segments();
    const Tensor counts = a.queue.scratch.take(Dtype::I32, {layers, all});
    for (int64_t l = 0; l < layers; ++l) {
      const Num length = length_of(a.scores[size_t(l)], index());
      compute(a.queue, min(length, a.budget.amount + beside() + mod(length, block)), counts.select(0, l));
    }
    return counts;
  }

 protected:
  /// Entries that stay besides the budget.
  virtual int beside() const { return 0; }
  /// Whole blocks between the first and the latest entries.
  Num candidates(const Num& length) const { return max(0, floor_div(length, block) - (sinks + recent) / block); }
  /// The entries of those blocks. No copy.
  Ragged between(Queue& queue, const Ragged& x) const {
    Ragged part = without_first(queue, x, sinks);
    part.ends = compute(queue, Dtype::I64, {x.segments()},
                        begin_of(part, index()) + candidates(length_of(x, index())) * block);
    return part;
  }
  Ragged smoothed(LayerView& at, const Ragged& paid) const {
    Ragged votes = paid;
    for (int after = 1; after < kernel; ++after) {
      const Ragged before = votes;
      votes.values = at.queue.scratch.take(Dtype::F32, {paid.values.size[0]});
      const Num other = pick(place() + after < length(), load(paid.values, index() + after), -kInfinity);
      compute(at.queue, votes, max(load(before.values, index()), other), votes.values);
    }
    return votes;
  }
  /// Scores whose first and latest entries stay.
  Ragged held(LayerView& at, const Ragged& scores) const {
    const Num stays = place() < sinks || place() >= length() - mod(length(), block) - recent;
    compute(at.queue, scores, pick(stays, kInfinity, load(scores.values, index())), scores.values);
    return scores;
  }
};

}  // namespace heed::mechanisms
