#include <algorithm>

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
    Queue& queue = at.queue;
    const StoreShape shape = at.store->shape();
    const int64_t g = shape.kv_heads, all = at.store->segments(), sequences = at.sequences();
    std::vector<int64_t> total, budget, held(size_t(sequences), 0), begin = held, end = held;
    int64_t rounds = 1;
    for (int64_t s = 0; s < sequences; ++s) {
      total.push_back(at.key_rows[size_t(s * g)]);
      budget.push_back(inner->entries(inner->kept(), at.model, at.layer, at.prompt[size_t(s)]));
      rounds = std::max(rounds, (total.back() - budget.back() + block - 1) / block);
    }
    if (rounds == 1) return inner->score(at);

    const Ragged result = at.per_entry(), keys = kept_keys(at), values = stored_values(at);
    compute(queue, -kInfinity, result.values);
    const Tensor positions = compute(queue, Dtype::I32, {result.bound}, load(stored_positions(at).values, index()));
    StoreOptions options = at.stores->options();
    std::vector<std::pair<int, Ragged>> beside;  // what else an entry carries
    const auto carries = [&](int number, int64_t width) {
      const Ragged column = at.per_entry(width);
      at.run().column_read(queue, at.store->pages(), number, column);
      beside.emplace_back(number, column);
    };
    if (options.bias) carries(kBiasColumn, 1);
    for (size_t c = 0; c < options.columns.size(); ++c)
      if (options.columns[c].keeps == Column::Keeps::User) carries(int(c), options.columns[c].width);
    options.k = options.v = PageType{.kind = PageType::Kind::F32};
    const int number = int(options.columns.size());
    options.columns.push_back({.name = "block-evict.number", .fill = -1});
    Store store(queue, std::span(&shape, 1), options, int(sequences));
    LayerStore& some = store.layer(0);

    for (int64_t round = 0; round < rounds; ++round) {
      Scratch scope(queue.scratch);
      std::vector<int64_t> fresh, first, rows, last, stays, most;
      for (size_t s = 0; s < total.size(); ++s) {
        begin[s] = end[s], end[s] = std::min(total[s], budget[s] + (round + 1) * block);
        const int64_t old = total[s] - at.rows[s];  // entries before the new queries' own
        fresh.push_back(end[s] - begin[s]), held[s] += fresh[s];
        first.push_back(std::max<int64_t>(0, begin[s] - old));
        rows.push_back(std::max<int64_t>(0, end[s] - old) - first[s]);
        last.push_back(begin[s] < total[s] && end[s] == total[s]);
        stays.push_back(end[s] < total[s] ? budget[s] : held[s]);
        most.insert(most.end(), size_t(g), stays[s]);
      }
      const auto of = [&](const std::vector<int64_t>& x, const Num& s, int64_t heads) {
        return of_sequence(queue, x, s, heads);
      };
      const auto part = [&](Ragged x, const std::vector<int64_t>& from, const std::vector<int64_t>& count) {
        const Num start = begin_of(x, index()) + of(from, index(), x.heads);
        const int64_t n = x.segments();
        const Tensor offsets = compute(queue, Dtype::I64, {n + 1}, pick(index() < n, start, load(x.offsets, n)));
        x.ends = compute(queue, Dtype::I64, {n}, start + of(count, index(), x.heads)), x.offsets = offsets;
        return x;
      };
      some.append(queue, part(keys, begin, fresh), part(values, begin, fresh), positions, fresh);

      LayerView in = at;
      in.store = &some, in.stores = &store;
      const Ragged numbers_of = in.per_entry();
      at.run().column_read(queue, some.pages(), number, numbers_of);
      const Num known = load(numbers_of.values, index()), count = of(fresh, segment(), g);
      compute(queue, numbers_of, pick(known < 0, of(begin, segment(), g) + place() - (length() - count), known),
              numbers_of.values);
      some.write_column(queue, number, numbers_of);
      for (const auto& [c, column] : beside) {
        const int64_t width = column.values.rank > 1 ? column.values.size[1] : 1;
        const Ragged now = in.per_entry(width);
        const Num from = begin_of(column, segment()) + load(numbers_of.values, begin_of(now, segment()) + place());
        compute(queue, now, load(column.values, from * width + channel()), now.values);
        some.write_column(queue, c, now);
      }

      in.prompt = at.prompt, in.rows = rows, in.key_rows.clear();
      for (int64_t s = 0; s < all; ++s) in.key_rows.push_back(held[size_t(s / g)]);
      in.q = part(at.q, first, rows);
      if (at.plain_q.values) in.plain_q = part(at.plain_q, first, rows);
      const Ragged tokens = numbers(queue, rows, 1);
      in.first = tokens.offsets;
      if (at.ids) {
        in.ids = queue.scratch.take(Dtype::I32, {std::max<int64_t>(1, tokens.bound)});
        compute(queue, tokens, load(at.ids, load(at.first, segment()) + of(first, segment(), 1) + place()), in.ids);
      }
      in.k = stored_keys(in), in.v = stored_values(in);
      in.k_pos = in.mods.k_pos = compute(queue, Dtype::I32, {in.k.bound}, load(stored_positions(in).values, index()));
      if (at.mods.key_bias) in.mods.key_bias = in.bias().values;
      in.plan = {}, in.plan.causal = at.plan.causal;
      in.out = in.lse = in.hidden = {};

      const Ragged scores = inner->score(in);
      const Num found = find(numbers_of.values, begin_of(numbers_of, segment()), end_of(numbers_of, segment()), place());
      const Num there = found < end_of(numbers_of, segment()) && load(numbers_of.values, found) == place();
      compute(queue, result,
              pick(of(last, segment(), g), pick(there, load(scores.values, found), -kInfinity), load(result.values, index())),
              result.values);
      if (round + 1 == rounds) break;
      Select best;
      best.count = compute(queue, Dtype::I32, {all}, of(stays, index(), g));
      const Ragged ranks = in.per_entry();
      const Num rank = load(inner->rank(in, scores, best.count).values, index());
      compute(queue, ranks, pick(rank > -1e38, rank, -1e38), ranks.values);  // counts must be met, whatever scores are
      const int64_t capacity = *std::max_element(most.begin(), most.end());
      const Lists kept = chosen(queue, ranks, best, capacity);
      int64_t together = 0;
      for (const int64_t x : most) together += x;
      some.compact(queue, kept.index, kept.count, capacity, most, together);
      held = stays;
    }
    return result;
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
  e.verified = {"identity", "formula", "model"};
  return e;
}

}  // namespace heed::mechanisms
