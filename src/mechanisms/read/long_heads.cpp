#include "attention/reads.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"
#include "mechanisms/keep/recent_queries.h"

namespace heed::mechanisms {

namespace {

// LongHeads (Lu et al., 2024): each head reads as many chunks as the model was trained to see, and reads them as one text:
// the first, the last two, and those whose representative the query, not rotated, likes best. A chunk's representative is
// the mean of its keys by how much the chunk's own mean answer attends to them: tokens of a chunk attend to one another,
// keys stand for values as released, and keys are rotated at their places in the chunk. Query heads of one KV head choose
// together, by their mean. Weights are kept instead of representatives, so a step scores all keys. Prompts are read
// densely; a chunk that two parts of a prompt share is known by the queries of the later part.
struct LongHeads final : Mechanism {
  int chunk, chunks, first_dense;

  static std::vector<ParamInfo> params() {
    using M = LongHeads;
    return {
        param(&M::chunk, "chunk", 256, 1, 1 << 20, "entries of a chunk"),
        param(&M::chunks, "chunks", 16, 3, 1 << 20, "chunks that a head reads, the first and the last two among them"),
        dense_layers_param(&M::first_dense, 0),
    };
  }
  std::string check() const override { return whole_groups(heads); }

  // For each query head, the weights of a chunk's keys in its representative stand beside them.
  Needs needs(const ModelInfo& model) const override {
    Needs n;
    n.plain_keys = n.same_entries = true;
    n.columns = {{.name = "longheads.weight", .width = model.group()}};
    return n;
  }
  std::unique_ptr<State> open(const ModelInfo& model) const override {
    return std::make_unique<RecentQueries>(model.layers, chunk);
  }

  void observe(LayerView& at) const override {
    if (at.phase == Phase::Replay || reads_all(at, first_dense)) return;
    auto& last = static_cast<RecentQueries&>(at.state());
    last.take(at);
    Observe how;
    how.rows = Observe::Rows::Sum, how.heads = Observe::Heads::Each;
    if (!at.decoding()) {
      const Plan own = own_chunks(at);
      return represent(at, at.observe(at.q, how, &own));
    }
    bool complete = at.queue.recording();  // then lengths are bounds
    for (int64_t s = 0; s < at.store->segments(); ++s) complete |= at.store->length(s) % chunk == 0;
    if (!complete) return;
    // The last queries are those of the chunk, and a window as wide that ends at the last of them shows its keys.
    const Ragged rows = last.rows(at);
    Mods mods = at.mods;
    mods.window = chunk;
    mods.q_pos = compute(at.queue, Dtype::I32, {rows.values.size[0]},
                         load(at.q_pos, begin_of(at.q, floor_div(index(), chunk))));
    Plan all;
    all.causal = false;
    const Ragged paid = at.per_entry(at.model.group());
    at.read.places = {};
    at.run().observe(at.queue, rows, at.keys(), &all, mods, how, paid);
    represent(at, paid);
  }

  /// New queries see the keys of their own chunk, later ones too.
  Plan own_chunks(LayerView& at) const {
    std::vector<int64_t> before;  // keys that stand before the new ones
    int64_t total = 0;
    for (int s = 0; s < at.sequences(); ++s)
      total += at.rows[size_t(s)], before.push_back(at.key_rows[size_t(s) * size_t(at.k.heads)] - at.rows[size_t(s)]);
    const Num s = find(at.first, 1, at.sequences() + 1, place() + 1) - 1;
    const Num key = load(at.queue.upload(before), s) + place() - load(at.first, s);
    Plan plan;
    plan.form = Plan::Form::Interval, plan.scope = Plan::Scope::Layer, plan.causal = false, plan.nnz_bound = total;
    plan.rowptr = compute(at.queue, Dtype::I64, {total + 1}, index());
    plan.index = compute(at.queue, Dtype::I32, {total, 2}, (floor_div(key, chunk) + channel()) * chunk);
    return plan;
  }

  /// The weights of chunks that have become complete, from what their keys were paid by their own queries.
  void represent(LayerView& at, const Ragged& paid) const {
    Queue& queue = at.queue;
    const int64_t group = at.model.group();
    const Spread own{.of = Spread::Of::Sum, .block = chunk};
    at.read.places = entry_places(at, mod(place(), chunk));
    const Ragged keys = stored_keys(at), share = shares(queue, paid, own), logits = at.per_entry(group);
    at.read.places = {};
    const int64_t d = at.store->shape().d;
    for (int64_t member = 0; member < group; ++member) {
      Ragged answer = keys;
      answer.values = queue.scratch.take(Dtype::F32, {keys.bound, d});
      compute(queue, answer, load(keys.values, index()) * load(share.values, floor_div(index(), d) * group + member),
              answer.values);
      const Ragged like = row_dots(queue, spread(queue, answer, own), keys, at.scale());
      compute(queue, like, load(like.values, index()), logits.values.reshape({logits.bound, group}).select(1, member));
    }
    const Ragged before = at.column("longheads.weight"), after = softmax(queue, logits, own);
    const Num end = (floor_div(place(), chunk) + 1) * chunk;
    const Num fresh = end <= length() && end > length() - of_sequence(queue, at.rows, segment(), keys.heads);
    compute(queue, after, pick(fresh, load(after.values, index()), load(before.values, index())), after.values);
    at.set_column("longheads.weight", after);
  }

  Read read(LayerView& at) const override {
    if (reads_all(at, first_dense)) return {};
    Queue& queue = at.queue;
    at.read.places = entry_places(at, mod(place(), chunk));
    Observe how;
    how.rows = Observe::Rows::Last, how.heads = Observe::Heads::Each, how.logits = true;
    const Ragged likes = at.observe(at.plain_q.values ? at.plain_q : at.q, how);
    const Ragged each = by_query_head(queue, combine(queue, likes, at.column("longheads.weight"), Combine::Multiply),
                                      at.model.group());
    const Ragged sums = spread(queue, over_group(at, each, Spread::Of::Mean), {.of = Spread::Of::Sum, .block = chunk});
    const Ragged score = numbers(queue, sums.segments(), ceil_div(length_of(sums, index()), chunk), sums.heads,
                                 sums.segments() * (at.store->longest() / chunk + 1));
    compute(queue, score, load(sums.values, begin_of(sums, segment()) + place() * chunk), score.values);
    Select best;
    best.k = chunks;
    const Lists found = chosen(queue, force(queue, score, 1, 2), best, chunks);
    Read read = named_entries(at, Plan::Scope::KvHead, sums, found.has(segment(), floor_div(place(), chunk)));
    read.places = gathered_places(at, read.plan);
    return read;
  }
};

}  // namespace

Entry long_heads() {
  Entry e = entry<LongHeads>("long-heads", "LongHeads: Multi-Head Attention is Secretly a Long Context Processor",
                             "Lu et al., 2024, arXiv 2402.10685", 2024, uint8_t(Role::Read));
  e.equation =
      "c = Σ_j softmax_j(ō · k_j / √d) k_j over a chunk, ō the mean of its own answers; read the first chunk, the "
      "last two and the top of q · c; the i-th entry of them is rotated at i";
  e.needs =
      "keys kept before rotation, the last queries, a number beside each entry for each query head; all entries in "
      "all layers: goes with no policy that drops some";
  e.identity = "long-heads(chunks=1000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
