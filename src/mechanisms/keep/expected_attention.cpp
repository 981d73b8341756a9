#include <cmath>

#include "attention/scores.h"
#include "attention/select.h"
#include "mechanisms/entries.h"

namespace heed::mechanisms {

namespace {

// Expected Attention (Devoto et al., 2025): queries to come are taken for Gaussian, with the mean and covariance that the
// prompt's have before rotation, turned by the mean rotation R of the next `future` positions; E e^(q·k/√d) then has a
// closed form.
struct ExpectedAttention final : KeepPolicy {
  int future, sinks;
  double eps;
  bool covariance, norm;

  static std::vector<ParamInfo> params() {
    using M = ExpectedAttention;
    return keep_params<M>(
        "1024", "prompt",
        {
            param(&M::future, "future", 512, 1, 1 << 16, "positions to come, a power of 2"),
            param(&M::sinks, "sinks", 4, 0, 1 << 20, "first entries that always stay and whose queries do not count"),
            param(&M::eps, "eps", 0, 0, 1,
                  "added to an expected weight before the value's norm multiplies it (for adakv: 0.01)"),
            param(&M::covariance, "covariance", true, "false: the mean query alone"),
            param(&M::norm, "norm", true, "weights times ‖v‖"),
        });
  }
  std::string check() const override {
    if (future & (future - 1)) return "future=" + std::to_string(future) + " is no power of 2";
    if (when.at == When::At::Every)
      return "when=every(n) cuts while decoding, but the statistics are a prompt's: when=prompt or when=chunk";
    return too_small(budget, sinks, "sinks");
  }

  /// Rows of x, each turned by its position.
  static Ragged turned(const LayerView& at, const Ragged& x, const Rope& rope, const Tensor& positions) {
    Ragged out = x;
    const int64_t rows = x.values.size[0], d = x.values.size[1];
    out.heads = 1, out.values = at.queue.scratch.take(Dtype::F32, {rows, d});
    at.run().split_heads(at.queue, x.values.reshape({rows, 1, d}), x.offsets, {}, 0, &rope, positions, out);
    out.heads = x.heads;
    return out;
  }
  /// positions[s / heads] for each of a segment's `rows` rows.
  static Tensor constant(const LayerView& at, std::span<const int64_t> positions, int64_t heads, int64_t rows) {
    Buffer host(Dtype::I32, {int64_t(positions.size()) * heads * rows});
    for (int64_t i = 0; i < host->numel(); ++i) host->at<int32_t>(i) = int32_t(positions[size_t(i / rows / heads)]);
    const Tensor out = at.queue.scratch.take(Dtype::I32, {host->numel()});
    copy(host, out);
    return out;
  }

  /// R^T of every query head, [segments, d, d]: R e_c row by row. The mean of R(0) … R(2^b − 1) is Π (1 + R(2^k)) / 2.
  Tensor mean_rotation(const LayerView& at, const Rope& rope) const {
    const int64_t d = at.q.values.size[1], h = at.q.heads, rows = at.q.segments() * d;
    Buffer identity = Buffer::zeros(Dtype::F32, {rows, d});
    for (int64_t r = 0; r < rows; ++r) identity->at<float>(r, r % d) = 1;
    const std::vector<int64_t> each(size_t(at.q.segments()), d);
    Ragged units = numbers(at.queue, each, h, d);
    units.values = units.values.reshape({rows, d});
    copy(identity, units.values);
    units = turned(at, units, rope, constant(at, at.prompt, h, d));
    for (int step = 1; step < future; step *= 2) {
      const std::vector<int64_t> by(at.prompt.size(), step);
      units = combine(at.queue, combine(at.queue, units, turned(at, units, rope, constant(at, by, h, d)), Combine::Add),
                      Combine::Multiply, 0.5);
    }
    return units.values.reshape({at.q.segments(), d, d});
  }

  /// matrix^T x for every row x of a segment.
  static Ragged applied(Queue& queue, const Ragged& x, const Tensor& matrix) {
    RecurInputs in;
    in.q = x, in.k = in.v = combine(queue, x, ones_like(queue, x), Combine::Multiply, 0), in.state = matrix;
    Recur plain;
    plain.scale = 1;
    Ragged out = x;
    out.values = queue.scratch.take(Dtype::F32, {x.values.size[0], x.values.size[1]});
    queue.run->recur(queue, in, plain, out.values, {}, {});
    return out;
  }
  static Ragged ones_like(Queue& queue, Ragged x) {
    x.values = ones(queue, x.values.size[0], x.values.size[1]);
    return x;
  }

  /// The new queries, as the positions to come would turn them on average.
  Ragged in_future(const LayerView& at) const {
    const Rope* rope = at.model.rope(at.layer);
    if (!rope) return at.q;
    Rope back = *rope;
    back.inv_freq = at.queue.scratch.take(Dtype::F32, {rope->inv_freq.size[0]});
    at.run().combine(at.queue, rope->inv_freq, {}, Combine::Multiply, -1, back.inv_freq);
    return applied(at.queue, turned(at, at.q, back, at.q_pos), mean_rotation(at, *rope));
  }

  Ragged score(LayerView& at) const override {
    const int64_t group = at.model.group(), d = at.q.values.size[1];
    const float scale = at.mods.scale > 0 ? at.mods.scale : 1 / std::sqrt(float(d));
    const Spread counted{.of = Spread::Of::Mean, .first = sinks};
    const Ragged x = in_future(at), keys = stored_keys(at);
    Ragged count = x;  // Σ 1, for each row
    count.values = ones(at.queue, x.values.size[0]);
    count = spread(at.queue, count, {.of = Spread::Of::Sum, .first = sinks});
    const Ragged centred = combine(at.queue, combine(at.queue, x, spread(at.queue, x, counted), Combine::Add, -1),
                                   combine(at.queue, count, Combine::Power, -0.5), Combine::Multiply);
    const Ragged mean = mean_rows(at.queue, without_first(at.queue, x, sinks)),
                 deviations = without_first(at.queue, centred, sinks);

    Ragged total;
    for (int64_t member = 0; member < group; ++member) {
      Ragged z = dots(at.queue, members(at.queue, mean, group, member), keys, scale);
      if (covariance) {
        RecurInputs in;
        in.q = in.k = in.v = members(at.queue, deviations, group, member);
        const Tensor s = at.queue.scratch.take(Dtype::F32, {keys.segments(), d, d}),
                     out = at.queue.scratch.take(Dtype::F32, {x.values.size[0], d});
        at.run().recur(at.queue, in, {}, out, s, {});  // Σ x x^T
        z = combine(at.queue, z, row_dots(at.queue, applied(at.queue, keys, s), keys, scale * scale / 2), Combine::Add);
      }
      const Ragged weights = softmax(at.queue, z, counted);
      total = member ? combine(at.queue, total, weights, Combine::Add) : weights;
    }
    total = combine(at.queue, total, Combine::Multiply, 1 / float(group));
    if (norm)
      total = combine(at.queue, combine(at.queue, total, Combine::Add, float(eps)),
                      row_norms(at.queue, stored_values(at)), Combine::Multiply);
    return force(at.queue, total, sinks, 0);
  }
};

}  // namespace

Entry expected_attention() {
  Entry e = entry<ExpectedAttention>(
      "expected-attention",
      "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
      "Devoto et al., 2025, arXiv 2510.00636", 2025, uint8_t(Role::Keep));
  e.equation = "z_j = R μ·k_j / √d + k_j^T R S R^T k_j / 2d; s_j = (mean over the group of softmax z_j + ε) ‖v_j‖";
  e.needs = "queries of the prompt";
  e.identity = "expected-attention(budget=1.0)";
  e.verified = {"identity", "formula", "model"};
  return e;
}

}  // namespace heed::mechanisms
