#include "attention/reads.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// InfLLM (Xiao et al., 2024): what has left the local window stands in blocks; a block is known by a few keys that the
// queries asked for most while it was near, and all heads of a layer read the blocks whose keys, before rotation, the
// query likes best. Everything beyond the window is read at the window's far end. How much a key was asked for is the sum
// of the logits of the queries that had it in their window, as the paper has it (the released code sums probabilities);
// with query heads that share a key each has representatives of its own, as released. Representatives are not kept apart:
// a step scores all keys to know theirs. Prompts are read densely.
struct InfLLM final : Mechanism {
  Budget budget;
  int sinks, local, block, representatives, first_dense;

  static std::vector<ParamInfo> params() {
    using M = InfLLM;
    return {
        budget_param(&M::budget, "2048", "entries of the blocks that all heads of a layer read; the others come on top"),
        param(&M::sinks, "sinks", 128, 0, 1 << 20, "first entries, which are always read"),
        param(&M::local, "local", 4096, 1, 1 << 30, "latest entries, which are read at their true distance"),
        param(&M::block, "block", 128, 1, 1 << 20, "entries of a block"),
        param(&M::representatives, "representatives", 4, 1, 1 << 20, "keys of a block that stand for it"),
        dense_layers_param(&M::first_dense, 0),
    };
  }
  std::string check() const override {
    if (representatives > block)
      return "representatives=" + std::to_string(representatives) + " are more than block=" + std::to_string(block);
    return whole_groups(heads);
  }

  Needs needs(const ModelInfo& model) const override {
    Needs n;
    n.plain_keys = n.same_entries = true;
    n.columns = {{.name = "infllm.asked", .width = model.group()}};
    return n;
  }

  void observe(LayerView& at) const override {
    if (at.phase == Phase::Replay || reads_all(at, first_dense)) return;
    Observe how;
    how.rows = Observe::Rows::Sum, how.heads = Observe::Heads::Each, how.logits = true;
    at.mods.window = local;
    const Ragged now = at.observe(at.q, how, at.decoding() ? &at.read.plan : &at.plan);
    at.mods.window = 0;
    at.set_column("infllm.asked", combine(at.queue, at.column("infllm.asked"), now, Combine::Add));
  }

  /// Blocks of `length` entries that lie beyond the window as a whole.
  Num blocks(const Num& length) const { return max(0, floor_div(length - local - sinks, block)); }

  Read read(LayerView& at) const override {
    if (reads_all(at, first_dense)) return {};
    Queue& queue = at.queue;
    const Num far = query_position(at) - (local - 1);
    at.read.places = entry_places(at, far);
    const Ragged likes = last_logits(at, at.q), asked = by_query_head(queue, at.column("infllm.asked"), at.model.group());
    Ragged inside = without_first(queue, asked, sinks);
    inside.ends = compute(queue, Dtype::I64, {asked.segments()},
                          begin_of(inside, index()) + blocks(length_of(asked, index())) * block);
    Ragged known = spread(queue, inside, {.of = Spread::Of::Rank, .block = block});
    compute(queue, known, pick(load(known.values, index()) >= block - representatives, load(likes.values, index()), 0),
            known.values);
    known = spread(queue, known, {.of = Spread::Of::Sum, .block = block});
    known = members(queue, spread(queue, known, {.of = Spread::Of::Sum, .over = Spread::Over::Heads}), known.heads, 0);

    const int64_t longest = at.store->longest(), most = longest / block + 1;
    const Ragged score = numbers(queue, known.segments(), floor_div(length_of(known, index()), block), 1,
                                 known.segments() * most);
    compute(queue, score, load(known.values, begin_of(known, segment()) + place() * block), score.values);
    const Ragged all = members(queue, asked, asked.heads, 0);
    Select best;
    best.count = compute(queue, Dtype::I32, {all.segments()}, ceil_div(granted(budget, length_of(all, index())), block));
    const Lists found = chosen(queue, score, best, most);
    const Num beyond = place() - sinks;
    const Num whole = beyond < 0 || beyond >= blocks(length()) * block;
    Read read = named_entries(at, Plan::Scope::Layer, all, whole || found.has(segment(), floor_div(beyond, block)));
    read.places = entry_places(at, max(far, load(stored_positions(at).values, index())));
    return read;
  }
};

}  // namespace

Entry infllm() {
  Entry e = entry<InfLLM>("infllm",
                          "InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory",
                          "Xiao et al., 2024, arXiv 2402.04617", 2024, uint8_t(Role::Read));
  e.equation =
      "score(block) = Σ over heads of R(w − 1) q · mean of its representatives' keys; read sinks, the top blocks, "
      "the rest and the last w, at distance min(i − j, w − 1)";
  e.needs =
      "keys kept before rotation, a number beside each entry for each query head; all entries in all layers: goes "
      "with no policy that drops some";
  e.identity = "infllm(local=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
