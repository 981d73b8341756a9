#include "attention/low_precision.h"
#include "attention/maps.h"
#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// SageAttention (Zhang et al., 2024–25), all versions by their parameters: a prompt's attention with whole-number queries and
// keys and with weights and values in few bits. Keys lose their mean first, which changes no softmax (it is added to the logits
// again, so that lse is that of the keys themselves). Weights are rounded relative to the largest logit that a query has met
// up to their tile of keys; they are summed before they are rounded, as the authors' kernels do. Accumulators are of 32
// bits: what the authors' narrower ones (16-bit, or 22 bits of Ada's and Hopper's) lose is not shown. Defaults are
// SageAttention2's on Ada. This is what the numbers become, not a fast kernel: logits are written out, part by part.
//   v1: scales=block, q_block=128, weights=f16      v2 on Hopper: q_block=16, k_block=128
//   v2++: largest=2.25                              v2 with 4 bits: codes=int4, smooth_q=128
struct Sage final : Mechanism {
  Choice codes, scales, weights;
  int q_block, k_block, tile, smooth_q;
  double largest;
  bool smooth_k, smooth_v;

  static std::vector<ParamInfo> params() {
    using M = Sage;
    return {
        param(&M::codes, "codes", {"int8", "int4", "f32"}, 0, "what queries and keys become; f32: they stay"),
        param(&M::scales, "scales", {"thread", "block"}, 0,
              "rows that share a scale: every eighth query and every eighth pair of keys of a block, or all of it"),
        param(&M::q_block, "q_block", 32, 8, 1 << 16, "queries of a block, a multiple of 8"),
        param(&M::k_block, "k_block", 64, 8, 1 << 16, "keys of a block, a multiple of 8"),
        param(&M::weights, "weights", {"e4m3", "f16", "f32"}, 0, "what weights and values become"),
        param(&M::largest, "largest", 448, 1e-3, 448, "e4m3: what the largest value of a channel becomes"),
        param(&M::tile, "tile", 64, 1, 1 << 16, "keys whose weights are rounded together"),
        param(&M::smooth_k, "smooth_k", true, "keys less their mean"),
        param(&M::smooth_q, "smooth_q", 0, 0, 1 << 16,
              "queries less the mean of so many, whose logits are added unrounded; 0: as they are"),
        param(&M::smooth_v, "smooth_v", false, "values less their mean, which the output gets back"),
    };
  }
  std::string check() const override {
    for (const auto& [name, size] : {std::pair{"q_block", q_block}, {"k_block", k_block}})
      if (size % 8) return std::string(name) + "=" + std::to_string(size) + " is no multiple of 8";
    return {};
  }

  Plan plan(LayerView& at) const override { return replaced(at, heads, 1, 1); }

  Tensor edit(LayerView& at) const override {
    if (at.decoding()) return at.out;
    Queue& queue = at.queue;
    const int64_t h = at.q.heads, g = at.k.heads, group = h / g, d_v = at.out.size[1];
    const Ragged keys = in_f32(queue, at.k), mean_key = mean_rows(queue, keys), k = smooth_k ? centred(queue, keys) : keys;
    const Ragged block_mean = spread(queue, at.q, {.of = Spread::Of::Mean, .block = std::max(1, smooth_q)});
    const Ragged q = smooth_q ? combine(queue, at.q, block_mean, Combine::Add, -1) : at.q;
    const Ragged q_codes = in_codes(queue, q, lengths(at, h), q_block, {q_block, 8, 1}),
                 k_codes = in_codes(queue, k, at.key_rows, k_block, {k_block, 4, 2});
    const Ragged values = in_f32(queue, at.v), mean_value = mean_rows(queue, values), v = rounded_values(queue, values);
    const Tensor out = queue.scratch.take(Dtype::F32, {at.out.size[0], d_v});
    queue.move(at.out, out);

    each_slice(at, 1, [&](const Slice& s) {
      const int64_t first_head = s.sequence * h + s.kv_head * group, key = s.sequence * g + s.kv_head, m = s.m;
      const auto mine = [&](const Ragged& x) { return segments(x, first_head, first_head + group, group); };
      const auto of_key = [&](const Ragged& x) { return segments(x, key, key + 1, 1); };
      const Tensor columns = compute(queue, Dtype::F32, {d_v, m},
                                     load(v.values, (begin_of(s.k, 0) + channel()) * d_v + place()));
      each_part(queue, s.n, 1, [&](int64_t first, int64_t last) {
        const int64_t n = last - first, rows = group * n, tiles = (m + tile - 1) / tile;
        const auto products = [&](const Ragged& a, const Ragged& b, int64_t width) {
          const Grids to = grids(queue, group, n, width);
          queue.run->proxy(queue, rows_between(queue, mine(a), first, last), of_key(b), {.scale = 1, .causal = false}, to);
          return to;
        };
        const Grids logits = products(q_codes, k_codes, m);
        const Tensor x = logits.cells.values.reshape({rows, m});
        Num dot = load(x, index());
        if (smooth_k) dot = dot + load(products(at.q, mean_key, 1).cells.values, place());
        if (smooth_q) dot = dot + load(products(block_mean, k, m).cells.values, index());
        compute(queue, at.scale() * dot, x);
        mask(at, s, first, n, x);

        const Grids tops = grids(queue, group, n, tiles), sums = grids(queue, group, n, 1);
        queue.run->reduce(queue, logits, {.kind = ReduceKind::Max, .col_block = tile}, tops);
        Ragged each_row = numbers(queue, rows, tiles, 1, rows * tiles);
        each_row.values = tops.cells.values;
        const Tensor top = queue.scratch.take(Dtype::F32, {rows * tiles}),
                     weight = queue.scratch.take(Dtype::F32, {rows, m});
        queue.run->scan(queue, each_row, {}, ScanKind::Max, top);
        const Num met = load(top, place() * tiles + floor_div(channel(), tile)),
                  most = load(top, place() * tiles + tiles - 1), seen = load(x, index()) > -kInfinity;
        const double times = weights.value == 0 ? 448 : 1;
        compute(queue, pick(seen, times * exp(load(x, index()) - met), 0), weight);
        round_to(queue, format(), weight);
        compute(queue, pick(seen, load(weight, index()) * exp(met - most) / times, 0), weight);
        compute(queue, pick(seen, exp(load(x, index()) - most), 0), x);
        queue.run->reduce(queue, logits, {.to = Reduce::To::Rows, .kind = ReduceKind::Sum}, sums);

        const std::vector<int64_t> ends{0, rows}, channels{0, d_v};
        const Grids made = grids(queue, 1, rows, d_v);
        queue.run->proxy(queue, {weight, queue.upload(ends), {}, 1, rows},
                         {columns, queue.upload(channels), {}, 1, d_v}, {.scale = 1, .causal = false}, made);
        const Num row = segment() * n + place(), sum = load(sums.cells.values, row),
                  inside = among(at, heads, s.kv_head * group + segment());
        const Num back = smooth_v ? load(mean_value.values, key * d_v + channel()) : Num(0);
        const Ragged part = rows_between(queue, s.q, first, last);
        compute(queue, part,
                pick(inside, pick(sum > 0, load(made.cells.values, row * d_v + channel()) / sum + back, 0),
                     load(out, index())),
                out);
        compute(queue, part, pick(inside, load(top, row * tiles + tiles - 1) + log(sum), load(at.lse, index())), at.lse);
      });
    });
    return out;
  }

 private:
  Format format() const { return weights.value == 0 ? Format::E4M3 : weights.value == 1 ? Format::F16 : Format::F32; }

  static std::vector<int64_t> lengths(const LayerView& at, int64_t heads) {
    std::vector<int64_t> out;
    for (const int64_t rows : at.rows) out.insert(out.end(), size_t(heads), rows);
    return out;
  }

  Ragged in_codes(Queue& queue, const Ragged& x, std::span<const int64_t> rows, int64_t block, CodeGroups by) const {
    if (codes.value == 2) return x;
    if (scales.value == 1) by = {block, 1, block};
    return coded(queue, x, rows, codes.value == 0 ? 127 : 7, by);
  }

  Ragged rounded_values(Queue& queue, const Ragged& values) const {
    const Ragged v = smooth_v ? centred(queue, values) : values;
    if (weights.value == 2) return v;
    Ragged out = combine(queue, v, Combine::Multiply, 1);
    if (weights.value == 1) return round_to(queue, format(), out.values), out;
    const Num x = load(v.values, index());
    compute(queue, v, abs(x), out.values);
    const Ragged most = spread(queue, out, {.of = Spread::Of::Max});
    const Num scale = load(most.values, index()) / largest;
    compute(queue, v, pick(scale > 0, x / scale, 0), out.values);
    round_to(queue, format(), out.values);
    compute(queue, v, load(out.values, index()) * scale, out.values);
    return out;
  }

  /// Caps and biases of the model, and −∞ for what a query does not see. x: [group · n, m], queries first … first + n − 1.
  void mask(const LayerView& at, const Slice& s, int64_t first, int64_t n, const Tensor& x) const {
    const Num i = first + mod(place(), n), j = channel(), keys = begin_of(s.k, 0) + j;
    Num logit = load(x, index());
    if (at.mods.softcap > 0) logit = at.mods.softcap * tanh(logit / at.mods.softcap);
    if (at.mods.key_bias) logit = logit + load(at.mods.key_bias, keys);
    compute(at.queue, at.plan.causal ? pick(j <= s.m - s.n + i, logit, -kInfinity) : logit, x);
    if (at.mods.window == 0) return;
    const Num apart = load(at.q_pos, begin_of(s.q, floor_div(place(), n)) + i) - load(at.k_pos, keys);
    compute(at.queue, pick(apart < double(at.mods.window), load(x, index()), -kInfinity), x);
  }
};

}  // namespace

Entry sage() {
  Entry e = entry<Sage>("sage", "SageAttention: Accurate 8-Bit Attention for Plug-and-play Inference Acceleration",
                        "Zhang et al., 2024, arXiv 2410.02367; 2411.10958, 2505.21136", 2024, Role::Plan | Role::Edit);
  e.equation =
      "s_ij = (q̂_i·k̂_j + q_i·k̄) / √d, q̂ and k̂ whole numbers of q and of k − k̄ times a group's scale; "
      "o = Σ P̂ V̂ / Σ P, P = e^(s − max so far)";
  e.needs = "nothing; logits are written out, so it is slower than dense attention";
  e.identity = "sage(codes=f32,weights=f32)";
  e.verified = {"identity", "formula", "model", "bench"};
  return e;
}

}  // namespace heed::mechanisms
