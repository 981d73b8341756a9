#include <algorithm>

#include "mechanisms/entries.h"
#include "mechanisms/keep/ov_blocks.h"

namespace heed::mechanisms {

namespace {

// The cache eviction of OpenVINO GenAI by its own score: votes add up, each divided (norm) by how many queries could give
// it.
struct OvEvict final : OvBlocks {
  bool norm;

  static std::vector<ParamInfo> params() {
    return block_params<OvEvict>(
        {param(&OvEvict::norm, "norm", true, "votes divided by how many queries could give them")});
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
    const Ragged votes = smoothed(at, at.observe(at.last_queries(rows), how, at.decoding() ? &at.read.plan : &at.plan)),
                 voters = at.per_entry();
    std::vector<int64_t> last;
    for (int64_t n : at.rows) last.push_back(std::min<int64_t>(n, rows));
    compute(queue, voters, min(of_sequence(queue, last, segment(), voters.heads), length() - place()), voters.values);
    // What an earlier part of the prompt voted is not of its last rows.
    at.set_column("ov.votes", at.decoding() ? combine(queue, at.column("ov.votes"), votes, Combine::Add) : votes);
    at.set_column("ov.voters", at.decoding() ? combine(queue, at.column("ov.voters"), voters, Combine::Add) : voters);
  }

  Ragged score(LayerView& at) const override {
    Ragged votes = at.column("ov.votes");
    if (norm) votes = combine(at.queue, votes, at.column("ov.voters"), Combine::Divide);
    return held(at, spread(at.queue, votes, {.of = Spread::Of::Sum, .block = block}));
  }
};

}  // namespace

Entry ov_evict() {
  Entry e = entry<OvEvict>("ov-evict", "Cache eviction, as in OpenVINO GenAI", "Intel, OpenVINO GenAI", 2024,
                           uint8_t(Role::Keep));
  e.equation =
      "A_j += max over j … j + 6 of Σ over heads of P_j; while decoding evict the blocks of 32 with the lowest Σ A "
      "/ age";
  e.needs = "two numbers beside each entry";
  e.identity = "ov-evict(budget=1000000000)";
  e.verified = {"identity", "formula", "model"};
  return e;
}

}  // namespace heed::mechanisms
