#include <algorithm>

#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// The cache eviction of OpenVINO GenAI: while decoding, whole blocks between the first and the latest entries leave, those
// that were paid least by all heads of the layer, so that every head holds the same. Votes are the last rows of the prompt
// and every token since, each smoothed towards the keys before it.
struct OvEvict final : KeepPolicy {
  int block, sinks, recent, rows, kernel;
  bool norm;

  static std::vector<ParamInfo> params() {
    using M = OvEvict;
    return keep_params<M>(
        "672", "every(1)",
        {
            param(&M::block, "block", 32, 1, 1 << 20, "entries that go together; divides budget, sinks and recent"),
            param(&M::sinks, "sinks", 32, 0, 1 << 20, "first entries that always stay"),
            param(&M::recent, "recent", 128, 0, 1 << 20, "latest entries of whole blocks that always stay"),
            param(&M::rows, "rows", 8, 1, 4096, "last queries of a prompt that vote"),
            param(&M::kernel, "kernel", 7, 1, 63, "a key's vote is the largest of so many from it on"),
            param(&M::norm, "norm", true, "votes divided by how many queries could give them"),
        });
  }
  std::string check() const override {
    if (budget.fraction) return "the budget is a number of entries: whole blocks";
    for (const auto& [size, name] :
         {std::pair{int64_t(budget.amount), "budget"}, {int64_t(sinks), "sinks"}, {int64_t(recent), "recent"}})
      if (size % block)
        return std::string(name) + "=" + std::to_string(size) + " is no multiple of block=" + std::to_string(block);
    return too_small(budget, int64_t(sinks) + recent, "sinks + recent");
  }

  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.columns = {{"ov.votes"}, {"ov.voters"}};
    return n;
  }

  void observe(LayerView& at) const override {
    if (at.phase == Phase::Replay) return;
    Queue& queue = at.queue;
    Observe how;
    how.rows = Observe::Rows::Sum, how.heads = Observe::Heads::LayerMean;
    const Ragged paid = at.observe(at.last_queries(rows), how, at.decoding() ? &at.read.plan : &at.plan);
    Ragged votes = paid;
    for (int after = 1; after < kernel; ++after) {
      const Ragged before = votes;
      votes.values = queue.scratch.take(Dtype::F32, {paid.values.size[0]});
      const Num other = pick(place() + after < length(), load(paid.values, index() + after), 0);
      compute(queue, votes, max(load(before.values, index()), other), votes.values);
    }
    const Ragged voters = at.per_entry();  // of the last rows
    const std::vector<int64_t> behind = [&] {
      std::vector<int64_t> out;
      for (int64_t n : at.rows) out.push_back(std::min<int64_t>(n, rows));
      return out;
    }();
    const Num last = of_sequence(queue, behind, segment(), paid.heads);
    compute(queue, voters, min(last, length() - place()), voters.values);
    // What an earlier part of the prompt voted is not of its last rows.
    at.set_column("ov.votes", at.decoding() ? combine(queue, at.column("ov.votes"), votes, Combine::Add) : votes);
    at.set_column("ov.voters", at.decoding() ? combine(queue, at.column("ov.voters"), voters, Combine::Add) : voters);
  }

  /// Nothing goes before the first token is decoded.
  bool settle(LayerView& at) const override { return !at.decoding(); }

  int64_t entries(const Budget& kept, const ModelInfo&, int, int64_t length) const override {
    return kept.entries(length) + block - 1;
  }
  Tensor allocate(const Allocation& a) const override {
    const int64_t layers = int64_t(a.scores.size()), all = a.scores[0].segments();
    const Tensor counts = a.queue.scratch.take(Dtype::I32, {layers, all});
    for (int64_t l = 0; l < layers; ++l) {
      const Num length = length_of(a.scores[size_t(l)], index());
      compute(a.queue, min(length, a.budget.amount + mod(length, block)), counts.select(0, l));
    }
    return counts;
  }

  Ragged score(LayerView& at) const override {
    Ragged votes = at.column("ov.votes");
    if (norm) votes = combine(at.queue, votes, at.column("ov.voters"), Combine::Divide);
    const Ragged blocks = spread(at.queue, votes, {.of = Spread::Of::Sum, .block = block});
    const Num stays = place() < sinks || place() >= length() - mod(length(), block) - recent;
    compute(at.queue, blocks, pick(stays, kInfinity, load(blocks.values, index())), blocks.values);
    return blocks;
  }
};

}  // namespace

Entry ov_evict() {
  Entry e = entry<OvEvict>("ov-evict", "Cache eviction, as in OpenVINO GenAI", "Intel, OpenVINO GenAI", 2024,
                           uint8_t(Role::Keep));
  e.equation =
      "A_j += max over j … j + 6 of Σ over heads of P_j; while decoding evict the blocks of 32 with the lowest Σ A / "
      "age";
  e.needs = "two numbers beside each entry";
  e.identity = "ov-evict(budget=1000000000)";
  e.verified = {"identity", "formula", "model"};
  return e;
}

}  // namespace heed::mechanisms
