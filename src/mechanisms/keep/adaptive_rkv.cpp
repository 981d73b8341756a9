#include <algorithm>

#include "mechanisms/entries.h"
#include "mechanisms/keep/ov_blocks.h"

namespace heed::mechanisms {

namespace {

// Adaptive R-KV, as in OpenVINO GenAI: the blocks that hold most of what the last rows paid stay, and what is left of the
// budget goes to the blocks that repeat the others least. An eviction forgets what rows before it paid.
struct AdaptiveRKV final : OvBlocks {
  double mass;

  static std::vector<ParamInfo> params() {
    return block_params<AdaptiveRKV>(
        {param(&AdaptiveRKV::mass, "mass", 0.9, 0, 1, "share of what is paid that stays whatever it repeats")});
  }
  Needs needs(const ModelInfo&) const override {
    Needs n;
    n.columns = {{.name = "adaptive.rows", .width = rows}};  // what each of the last rows paid, the newest last
    return n;
  }

  void observe(LayerView& at) const override {
    if (at.phase == Phase::Replay) return;
    Queue& queue = at.queue;
    const Ragged before = at.column("adaptive.rows"), after = at.per_entry(rows);
    if (at.decoding()) {
      Observe how;
      how.rows = Observe::Rows::Sum, how.heads = Observe::Heads::LayerMean;
      const Ragged paid = at.observe(at.q, how, &at.read.plan);
      const Num old = pick(channel() + 1 < rows, load(before.values, index() + 1),
                           load(paid.values, floor_div(index(), rows)));
      const Num idle = of_sequence(queue, at.rows, segment(), after.heads) == 0;
      compute(queue, after, pick(idle, load(before.values, index()), old), after.values);
    } else {
      const Ragged paid = row_weights(at, rows);
      const Tensor columns = after.values.reshape({after.bound, rows});
      for (int r = 0; r < rows; ++r) {
        const Ragged heads = members(queue, paid, rows, r),
                     sum = spread(queue, heads, {.of = Spread::Of::Sum, .over = Spread::Over::Heads});
        const Num first = begin_of(sum, floor_div(segment(), after.heads) * heads.heads);
        compute(queue, after, load(sum.values, first + place()) / at.model.h, columns.select(1, r));
      }
    }
    at.set_column("adaptive.rows", after);
  }
  void fold(LayerView& at, const Lists& kept) const override {
    const Ragged rows_now = at.column("adaptive.rows");
    const Num stays = load(kept.count, segment()) >= length();  // nothing goes
    compute(at.queue, rows_now, pick(stays, load(rows_now.values, index()), 0), rows_now.values);
    at.set_column("adaptive.rows", rows_now);
  }

  Ragged score(LayerView& at) const override {
    Queue& queue = at.queue;
    const Ragged rows_paid = at.column("adaptive.rows"), paid = at.per_entry(), out = at.per_entry();
    const int64_t all = paid.segments(), g = paid.heads, sequences = all / g, most = at.store->longest();
    compute(queue, paid, 0, paid.values), compute(queue, out, 0, out.values);
    for (int r = 0; r < rows; ++r)
      compute(queue, paid, load(paid.values, index()) + load(rows_paid.values, index() * rows + r), paid.values);
    const Ragged blocks = spread(queue, between(queue, smoothed(at, paid)), {.of = Spread::Of::Sum, .block = block});
    const Ragged votes = numbers(queue, sequences, floor_div(length_of(blocks, index() * g), block), 1,
                                 sequences * (most / block + 1));
    compute(queue, votes, load(blocks.values, begin_of(blocks, segment() * g) + place() * block), votes.values);
    Select best;
    best.by = Select::By::TopP, best.p = float(mass);
    const int64_t quota = (int64_t(budget.amount) - sinks - recent) / block;
    const Lists sure = chosen(queue, votes, best, std::clamp<int64_t>(quota, 1, most / block + 1));

    // How much a key says of what the others that are not sure say, those most alike.
    const Ragged to = between(queue, out), keys = between(queue, unit_rows(queue, stored_keys(at)));
    int64_t cells = 0;
    for (int64_t s = 0; s < all; ++s) cells += at.store->length(s) * at.store->length(s);
    Grids alike, of_row;
    alike.rows = alike.cols = of_row.rows = compute(queue, Dtype::I64, {all}, length_of(keys, index()));
    alike.cells = numbers(queue, all, load(alike.rows, index()) * load(alike.rows, index()), g, cells);
    of_row.cols = compute(queue, Dtype::I64, {all}, 1), of_row.cells = to;
    Proxy cosine;
    cosine.scale = 1 / float(at.store->shape().d), cosine.causal = false;
    queue.run->proxy(queue, keys, keys, cosine, alike);
    const Num n = load(alike.rows, segment()), row = floor_div(place(), n), col = mod(place(), n),
              cell = load(alike.cells.values, index());
    compute(queue, alike.cells, pick(row == col, 0, cell), alike.cells.values);
    queue.run->reduce(queue, alike, {.to = Reduce::To::Rows, .kind = ReduceKind::Mean}, of_row);
    const Num is_sure = sure.has(floor_div(segment(), g), floor_div(col, block));
    const Num low = cell < load(to.values, begin_of(to, segment()) + row);
    compute(queue, alike.cells, pick(low || is_sure, 0, cell), alike.cells.values);
    queue.run->reduce(queue, alike, {.to = Reduce::To::Rows}, of_row);
    const Ragged heads = spread(queue, to, {.of = Spread::Of::Mean, .over = Spread::Over::Heads});
    const Ragged repeats = spread(queue, heads, {.of = Spread::Of::Sum, .block = block});
    compute(queue, to,
            pick(sure.has(floor_div(segment(), g), floor_div(place(), block)), 1e30, -1 * load(repeats.values, index())),
            out.values);
    return held(at, out);
  }
};

}  // namespace

Entry adaptive_rkv() {
  Entry e = entry<AdaptiveRKV>("adaptive-rkv", "Adaptive R-KV, as in OpenVINO GenAI", "Intel, OpenVINO GenAI", 2025,
                               uint8_t(Role::Keep));
  e.equation =
      "the blocks that the last rows paid most stay up to a share of 0.9; of the others D those with the lowest Σ "
      "over i of the block and t of D of cos(k_i, k_t), where it is above its row's mean";
  e.needs = "the weights of the last rows beside each entry; while it cuts, n² numbers";
  e.identity = "adaptive-rkv(budget=1000000000)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
