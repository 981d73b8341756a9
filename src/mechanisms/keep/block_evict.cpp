#include <algorithm>
#include <numeric>

#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Block-wise eviction (Park et al., 2025, section 3; kvpress): the text is taken up block by block, and behind each block what
// is held and what is new compete for the budget, scored together. What went is no part of later scores. The inner policy sees
// what is held as its store, and the block's queries as the new ones. kvpress begins with the first B entries and scores them
// with the first block; heed does, too. Scores that a policy gathered elsewhere (while decoding, or behind a drive) are one
// number for each entry, whatever else is held: there blocks decide nothing, and the inner policy cuts alone.
struct BlockEvict final : KeepWrapper {
  int block;

  static std::vector<ParamInfo> params() {
    return {param(&BlockEvict::block, "block", 128, 1, 1 << 20, "entries that are taken up at a time")};
  }

  // The scores of the last block and of what was held then; −∞ for what had gone.
  Ragged score(LayerView& at) const override {
    if (!at.k.values) return inner->score(at);
    std::vector<int64_t> total, budget;
    int64_t rounds = 1;
    for (int64_t s = 0; s < at.sequences(); ++s) {
      total.push_back(at.key_rows[size_t(s * at.store->shape().kv_heads)]);
      budget.push_back(inner->entries(inner->kept(), at.model, at.layer, at.prompt[size_t(s)]));
      rounds = std::max(rounds, (total.back() - budget.back() + block - 1) / block);
    }
    if (rounds == 1) return inner->score(at);

    const Ragged result = at.per_entry();
    compute(at.queue, -kInfinity, result.values);
    Text text(at);
    Store store(at.queue, std::span(&at.store->shape(), 1), text.options, int(at.sequences()));
    std::vector<int64_t> held(total.size(), 0), taken = held;
    for (int64_t r = 0; r < rounds; ++r) {
      Scratch scope(at.queue.scratch);
      const Round round(*this, at, total, budget, r, taken, held);
      const Ragged numbers = text.append(at, store.layer(0), round);
      LayerView in = view(at, store, round);
      const Ragged scores = inner->score(in);
      tell(at, round, numbers, scores, result);
      if (r + 1 < rounds) cut(in, round, scores);
      taken = round.end, held = round.stays;
    }
    return result;
  }

  /// What is taken up behind what is held, for each sequence.
  struct Round {
    std::vector<int64_t> begin, end, fresh;  // entries of the text, and how many
    std::vector<int64_t> first, rows;        // of the new queries, those of the block
    std::vector<int64_t> last;               // 1 where the text ends with it
    std::vector<int64_t> held, stays;        // with the block, and behind the cut

    Round(const BlockEvict& how, const LayerView& at, const std::vector<int64_t>& total, const std::vector<int64_t>& budget,
          int64_t number, const std::vector<int64_t>& taken, const std::vector<int64_t>& kept)
        : begin(taken), held(kept) {
      for (size_t s = 0; s < total.size(); ++s) {
        end.push_back(std::min(total[s], budget[s] + (number + 1) * how.block));
        const int64_t old = total[s] - at.rows[s];  // entries before the new queries' own
        fresh.push_back(end[s] - begin[s]), held[s] += fresh[s];
        first.push_back(std::max<int64_t>(0, begin[s] - old));
        rows.push_back(std::max<int64_t>(0, end[s] - old) - first[s]);
        last.push_back(begin[s] < total[s] && end[s] == total[s]);
        stays.push_back(end[s] < total[s] ? budget[s] : held[s]);
      }
    }
  };

  /// Of each segment, rows from[sequence] … from + count.
  static Ragged part(Queue& queue, Ragged x, const std::vector<int64_t>& from, const std::vector<int64_t>& count) {
    const int64_t n = x.segments();
    const Num start = begin_of(x, index()) + of_sequence(queue, from, index(), x.heads);
    const Tensor offsets = compute(queue, Dtype::I64, {n + 1}, pick(index() < n, start, load(x.offsets, n)));
    x.ends = compute(queue, Dtype::I64, {n}, start + of_sequence(queue, count, index(), x.heads)), x.offsets = offsets;
    return x;
  }

  /// All entries there are, in f32, with what they carry; a store of theirs knows the number of each in a column.
  struct Text {
    Ragged keys, values;
    Tensor positions;
    std::vector<std::pair<int, Ragged>> beside;  // columns
    StoreOptions options;
    int number;

    explicit Text(LayerView& at)
        : keys(kept_keys(at)), values(stored_values(at)),
          positions(compute(at.queue, Dtype::I32, {at.store->entries()}, load(stored_positions(at).values, index()))),
          options(at.stores->options()) {
      const auto carries = [&](int column, int64_t width) {
        const Ragged numbers = at.per_entry(width);
        at.run().column_read(at.queue, at.store->pages(), column, numbers);
        beside.emplace_back(column, numbers);
      };
      if (options.bias) carries(kBiasColumn, 1);
      for (size_t c = 0; c < options.columns.size(); ++c)
        if (options.columns[c].keeps == Column::Keeps::User) carries(int(c), options.columns[c].width);
      options.k = options.v = PageType{.kind = PageType::Kind::F32};
      number = int(options.columns.size());
      options.columns.push_back({.name = "block-evict.number", .fill = -1});
    }

    /// Puts a round's entries behind those that are held; the numbers of all.
    Ragged append(LayerView& at, LayerStore& held, const Round& round) const {
      Queue& queue = at.queue;
      held.append(queue, part(queue, keys, round.begin, round.fresh), part(queue, values, round.begin, round.fresh),
                  positions, round.fresh);
      LayerView in = at;
      in.store = &held;
      const Ragged numbers = in.per_entry();
      at.run().column_read(queue, held.pages(), number, numbers);
      const int64_t g = held.shape().kv_heads;
      const Num known = load(numbers.values, index()), begin = of_sequence(queue, round.begin, segment(), g),
                count = of_sequence(queue, round.fresh, segment(), g);
      compute(queue, numbers, pick(known < 0, begin + place() - (length() - count), known), numbers.values);
      held.write_column(queue, number, numbers);
      for (const auto& [column, all] : beside) {
        const int64_t width = all.values.rank > 1 ? all.values.size[1] : 1;
        const Ragged now = in.per_entry(width);
        const Num from = begin_of(all, segment()) + load(numbers.values, begin_of(now, segment()) + place());
        compute(queue, now, load(all.values, from * width + channel()), now.values);
        held.write_column(queue, column, now);
      }
      return numbers;
    }
  };

  /// What the inner policy sees.
  static LayerView view(LayerView& at, Store& store, const Round& round) {
    Queue& queue = at.queue;
    LayerView in = at;
    in.store = &store.layer(0), in.stores = &store;
    const int64_t g = in.store->shape().kv_heads;
    in.prompt = at.prompt, in.rows = round.rows, in.key_rows.clear();
    for (int64_t s = 0; s < in.store->segments(); ++s) in.key_rows.push_back(round.held[size_t(s / g)]);
    in.q = part(queue, at.q, round.first, round.rows);
    if (at.plain_q.values) in.plain_q = part(queue, at.plain_q, round.first, round.rows);
    const Ragged tokens = numbers(queue, round.rows, 1);
    in.first = tokens.offsets;
    if (at.ids) {
      in.ids = queue.scratch.take(Dtype::I32, {std::max<int64_t>(1, tokens.bound)});
      const Num token = load(at.first, segment()) + of_sequence(queue, round.first, segment(), 1) + place();
      compute(queue, tokens, load(at.ids, token), in.ids);
    }
    in.k = stored_keys(in), in.v = stored_values(in);
    in.k_pos = in.mods.k_pos = compute(queue, Dtype::I32, {in.k.bound}, load(stored_positions(in).values, index()));
    if (at.mods.key_bias) in.mods.key_bias = in.bias().values;
    in.plan = {}, in.plan.causal = at.plan.causal;
    in.out = in.lse = in.hidden = {};
    return in;
  }

  /// Scores of a text's last block become those of the text.
  static void tell(LayerView& at, const Round& round, const Ragged& numbers, const Ragged& scores, const Ragged& result) {
    const Num found = find(numbers.values, begin_of(numbers, segment()), end_of(numbers, segment()), place());
    const Num there = found < end_of(numbers, segment()) && load(numbers.values, found) == place();
    const Num last = of_sequence(at.queue, round.last, segment(), at.store->shape().kv_heads);
    compute(at.queue, result,
            pick(last, pick(there, load(scores.values, found), -kInfinity), load(result.values, index())), result.values);
  }

  void cut(LayerView& in, const Round& round, const Ragged& scores) const {
    Queue& queue = in.queue;
    const int64_t g = in.store->shape().kv_heads, all = in.store->segments();
    Select best;
    best.count = compute(queue, Dtype::I32, {all}, of_sequence(queue, round.stays, index(), g));
    const Ragged ranks = in.per_entry();
    const Num rank = load(inner->rank(in, scores, best.count).values, index());
    compute(queue, ranks, pick(rank > -1e38, rank, -1e38), ranks.values);  // counts must be met, whatever scores are
    std::vector<int64_t> most;
    for (int64_t s = 0; s < all; ++s) most.push_back(round.stays[size_t(s / g)]);
    const int64_t capacity = *std::max_element(most.begin(), most.end());
    const Lists kept = chosen(queue, ranks, best, capacity);
    in.store->compact(queue, kept.index, kept.count, capacity, most, std::accumulate(most.begin(), most.end(), int64_t(0)));
  }
};

}  // namespace

Entry block_evict() {
  Entry e = entry<BlockEvict>("block-evict",
                              "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in "
                              "Resource-Constrained Environments",
                              "Park et al., 2025, arXiv 2504.15364", 2025, uint8_t(Role::Keep));
  e.equation = "H ← first B entries; for each next block X: H ← top B of H ∪ X by the inner score of H ∪ X";
  e.needs = "a keep policy inside";
  e.identity = "block-evict(keydiff(budget=1.0))";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
