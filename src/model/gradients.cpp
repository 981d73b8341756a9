#include "model/gradients.h"

#include <algorithm>

#include "attention/scores.h"
#include "model/transformer.h"

namespace heed {
namespace {

/// The gradient d_y of y = act(gate) · up becomes those of gate, in gate's place, and of up, in d_up.
void glu_backward(Queue& queue, Activation activation, const Tensor& gate, const Tensor& up, const Tensor& d_y,
                  const Tensor& d_up) {
  const Scratch scope(queue.scratch);
  const Num x = load(gate, index()), d = load(d_y, index());
  // act(x) = x · s: σ(x), or half of one and a hyperbolic tangent.
  const Tensor s_of = queue.scratch.take(Dtype::F32, {gate.size[0], gate.size[1]});
  const Num s = load(s_of, index());
  constexpr double root = 0.7978845608028654, cubic = 0.044715;  // √(2/π), and the constant of GELU's tanh form
  if (activation == Activation::Silu) compute(queue, 1 / (1 + exp(0 - x)), s_of);
  else compute(queue, (1 + tanh(root * x * (1 + cubic * x * x))) / 2, s_of);
  compute(queue, d * x * s, d_up);
  // s' = s (1 − s), times 2 and the slope of what stands in the tangent.
  const Num slope = activation == Activation::Silu ? Num(1) : 2 * root * (1 + 3 * cubic * x * x);
  compute(queue, d * load(up, index()) * s * (1 + x * (1 - s) * slope), gate);
}

}  // namespace

void matmul_backward(Queue& queue, Tensor w, Tensor d_y, bool accumulate, Tensor d_x) {
  const Dtype type = w.type == Dtype::F32 || w.type == Dtype::F16 ? Dtype::F32 : Dtype::BF16;
  constexpr int64_t rows = 1024;  // of w at a time, which bounds scratch
  each_tile(w.size[0], rows, [&](int64_t a, int64_t b) {
    const Scratch scope(queue.scratch);
    const Tensor plain = queue.scratch.take(Dtype::F32, {b - a, w.size[1]}),
                 turned = queue.scratch.take(type, {w.size[1], b - a});
    queue.run->dequantise(queue, w.slice(0, a, b), plain);
    compute(queue, load(plain, channel() * w.size[1] + place()), turned);
    queue.run->matmul(queue, turned, d_y.slice(1, a, b), {}, accumulate || a > 0, d_x);
  });
}

void rms_norm_backward(Queue& queue, Tensor x, Tensor weight, float eps, Tensor d_y, bool accumulate, Tensor d_x) {
  const Scratch scope(queue.scratch);
  Tensor scaled = d_y;
  if (weight) {
    scaled = queue.scratch.take(Dtype::F32, {x.size[0], x.size[1]});
    compute(queue, load(d_y, index()) * load(weight, channel()), scaled);
  }
  const float share = 1 / float(x.size[1]);
  const Ragged rows = one_segment(queue, x), gradient{scaled, rows.offsets, {}, 1, rows.bound};
  const Tensor squares = row_dots(queue, rows, rows, share).values, along = row_dots(queue, rows, gradient, share).values;
  // r (w d − x · mean(x w d) / (mean x² + eps)), r = 1 / √(mean x² + eps)
  const Tensor factor = compute(queue, Dtype::F32, {x.size[0]}, 1 / sqrt(load(squares, index()) + double(eps)));
  const Num r = load(factor, place());
  const Num d = r * (load(scaled, index()) - load(x, index()) * load(along, place()) * r * r);
  compute(queue, accumulate ? load(d_x, index()) + d : d, d_x);
}

void finish_backward(Queue& queue, const ModelWeights& weights, const Architecture& architecture, int layer,
                     Tensor attention, Tensor x, int64_t tile, Tensor d_x, Tensor d_output, Tensor d_attention) {
  const Kernels& run = *queue.run;
  const LayerWeights& w = weights.layers[size_t(layer)];
  const float eps = architecture.norm_eps;
  const int64_t hidden = x.size[1], inner = w.gate.size[0];
  each_tile(x.size[0], tile, [&](int64_t a, int64_t b) {
    const Scratch scope(queue.scratch);
    const auto rows = [&](int64_t width) { return queue.scratch.take(Dtype::F32, {b - a, width}); };
    const Tensor d_rows = d_x.slice(0, a, b);
    // Forward, as finish() goes: what each norm is given.
    const Tensor output = rows(hidden), middle = rows(hidden), normed = rows(hidden);
    run.matmul(queue, w.o, attention.slice(0, a, b), w.o_bias, false, output);
    queue.move(x.slice(0, a, b), middle);
    if (w.attn_post_norm) run.rms_norm(queue, output, w.attn_post_norm, eps, normed), run.add(queue, normed, middle);
    else run.add(queue, output, middle);
    run.rms_norm(queue, middle, w.ffn_norm, eps, normed);
    const Tensor gate = rows(inner), up = rows(inner), d_gate = rows(inner), d_up = rows(inner);
    const Linear both[] = {{w.gate, {}, gate}, {w.up, {}, up}};
    run.matmul_each(queue, std::span(both), normed, nullptr);
    // Backward: the feed-forward part,
    Tensor d_down = d_rows;
    if (w.ffn_post_norm) {
      const Tensor active = d_up, down = rows(hidden);
      run.glu(queue, gate, up, architecture.activation, active);
      run.matmul(queue, w.down, active, {}, false, down);
      d_down = rows(hidden);
      rms_norm_backward(queue, down, w.ffn_post_norm, eps, d_rows, false, d_down);
    }
    matmul_backward(queue, w.down, d_down, false, d_gate);
    glu_backward(queue, architecture.activation, gate, up, d_gate, d_up);
    matmul_backward(queue, w.gate, gate, false, normed);
    matmul_backward(queue, w.up, d_up, true, normed);
    rms_norm_backward(queue, middle, w.ffn_norm, eps, normed, true, d_rows);
    // and the output matrix.
    const Tensor d_out = d_output.slice(0, a, b);
    if (w.attn_post_norm) rms_norm_backward(queue, output, w.attn_post_norm, eps, d_rows, false, d_out);
    else queue.move(d_rows, d_out);
    matmul_backward(queue, w.o, d_out, false, d_attention.slice(0, a, b));
  });
}

void project_backward(Queue& queue, const ModelWeights& weights, const Architecture& architecture, int layer, Tensor x,
                      int64_t tile, Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_x) {
  const LayerWeights& w = weights.layers[size_t(layer)];
  each_tile(x.size[0], tile, [&](int64_t a, int64_t b) {
    const Scratch scope(queue.scratch);
    const Tensor normed = queue.scratch.take(Dtype::F32, {b - a, x.size[1]});
    matmul_backward(queue, w.q, d_q.slice(0, a, b), false, normed);
    matmul_backward(queue, w.k, d_k.slice(0, a, b), true, normed);
    matmul_backward(queue, w.v, d_v.slice(0, a, b), true, normed);
    rms_norm_backward(queue, x.slice(0, a, b), w.attn_norm, architecture.norm_eps, normed, true, d_x.slice(0, a, b));
  });
}

void prediction_backward(Queue& queue, const ModelWeights& weights, const Architecture& architecture, Tensor x,
                         Tensor targets, Tensor d_x) {
  const int64_t vocabulary = weights.output.size[0];
  each_tile(x.size[0], 64, [&](int64_t a, int64_t b) {
    const Scratch scope(queue.scratch);
    const Tensor y = queue.scratch.take(Dtype::F32, {b - a, vocabulary}), rows = x.slice(0, a, b);
    logits(queue, weights, architecture, rows, y);
    const Ragged each{.values = y.reshape({(b - a) * vocabulary}),
                      .offsets = compute(queue, Dtype::I64, {b - a + 1}, index() * vocabulary),
                      .ends = {},
                      .heads = 1,
                      .bound = (b - a) * vocabulary};
    const Tensor p = softmax(queue, each).values;
    const Num target = load(targets.slice(0, a, b), place());
    Num slope = load(p, index()) - (channel() == target);
    if (const double cap = double(architecture.final_softcap); cap > 0) {
      const Num part = load(y, index()) / cap;
      slope = slope * (1 - part * part);
    }
    compute(queue, pick(target >= 0, slope, 0), y);
    const Tensor d_normed = queue.scratch.take(Dtype::F32, {b - a, x.size[1]});
    matmul_backward(queue, weights.output, y, false, d_normed);
    rms_norm_backward(queue, rows, weights.final_norm, architecture.norm_eps, d_normed, false, d_x.slice(0, a, b));
  });
}

}  // namespace heed
