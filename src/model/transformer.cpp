#include "model/transformer.h"

#include <algorithm>

#include "attention/numbers.h"

namespace heed {
namespace {

/// y += what `pair` adds to a matrix's product with x.
void adapt(Queue& queue, const Adapter::Pair& pair, Tensor x, Tensor y) {
  if (!pair.a) return;
  const Scratch scope(queue.scratch);
  const Tensor low = queue.scratch.take(Dtype::F32, {x.size[0], pair.a.size[0]});
  queue.run->matmul(queue, pair.a, x, {}, false, low);
  queue.run->matmul(queue, pair.b, low, {}, true, y);
}

}  // namespace

void project(Queue& queue, const ModelWeights& weights, const Architecture& architecture, int layer, Tensor x,
             int64_t tile, Tensor q, Tensor k, Tensor v, const Adapter::Layer* adapter) {
  const Kernels& run = *queue.run;
  const LayerWeights& w = weights.layers[size_t(layer)];
  each_tile(x.size[0], tile, [&](int64_t a, int64_t b) {
    Scratch scope(queue.scratch);
    const Norm norm{w.attn_norm, architecture.norm_eps};
    const Linear each[] = {
        {w.q, w.q_bias, q.slice(0, a, b)}, {w.k, w.k_bias, k.slice(0, a, b)}, {w.v, w.v_bias, v.slice(0, a, b)}};
    if (!adapter) return run.matmul_each(queue, std::span(each), x.slice(0, a, b), &norm);
    Tensor normed = queue.scratch.take(Dtype::F32, {b - a, x.size[1]});
    run.rms_norm(queue, x.slice(0, a, b), norm.weight, norm.eps, normed);
    run.matmul_each(queue, std::span(each), normed, nullptr);
    adapt(queue, adapter->q, normed, each[0].y), adapt(queue, adapter->k, normed, each[1].y);
    adapt(queue, adapter->v, normed, each[2].y);
  });
}

void finish(Queue& queue, const ModelWeights& weights, const Architecture& architecture, int layer, Tensor attention,
            int64_t tile, Tensor x, const Adapter::Layer* adapter) {
  const Kernels& run = *queue.run;
  const LayerWeights& w = weights.layers[size_t(layer)];
  const float eps = architecture.norm_eps;
  Scratch scope(queue.scratch);
  // y goes onto the residual stream, through a norm of its own where the architecture has one.
  const Adapter::Layer as_they_are, &change = adapter ? *adapter : as_they_are;
  auto add_product = [&](Tensor weight, Tensor input, Tensor bias, Tensor post_norm, Tensor residual,
                         const Adapter::Pair& pair) {
    if (!post_norm) {
      const Linear sum{weight, bias, residual, true};
      run.matmul_each(queue, std::span(&sum, 1), input, nullptr);
      return adapt(queue, pair, input, residual);
    }
    Tensor y = queue.scratch.take(Dtype::F32, {residual.size[0], residual.size[1]});
    run.matmul(queue, weight, input, bias, false, y);
    adapt(queue, pair, input, y);
    run.rms_norm(queue, y, post_norm, eps, y);
    run.add(queue, y, residual);
  };
  each_tile(x.size[0], tile, [&](int64_t a, int64_t b) {
    Scratch inner(queue.scratch);
    Tensor rows = x.slice(0, a, b);
    add_product(w.o, attention.slice(0, a, b), w.o_bias, w.attn_post_norm, rows, change.o);
    const bool changed = change.gate.a || change.up.a;
    Tensor gate = queue.scratch.take(changed ? Dtype::F32 : row_type(queue, b - a, w.down), {b - a, w.gate.size[0]});
    if (changed) {
      Tensor normed = queue.scratch.take(Dtype::F32, {b - a, x.size[1]});
      run.rms_norm(queue, rows, w.ffn_norm, eps, normed);
      const Tensor up = queue.scratch.take(Dtype::F32, {b - a, w.up.size[0]});
      const Linear both[] = {{w.gate, {}, gate}, {w.up, {}, up}};
      run.matmul_each(queue, std::span(both), normed, nullptr);
      adapt(queue, change.gate, normed, gate), adapt(queue, change.up, normed, up);
      run.glu(queue, gate, up, architecture.activation, gate);
    } else {
      const Norm norm{w.ffn_norm, eps};
      run.matmul_glu(queue, w.gate, w.up, rows, &norm, architecture.activation, gate);
    }
    add_product(w.down, gate, {}, w.ffn_post_norm, rows, change.down);
  });
}

void logits(Queue& queue, const ModelWeights& weights, const Architecture& architecture, Tensor x, Tensor y) {
  const Kernels& run = *queue.run;
  const Norm norm{weights.final_norm, architecture.norm_eps};
  const Linear output{weights.output, {}, y};
  run.matmul_each(queue, std::span(&output, 1), x, &norm);
  if (const float cap = architecture.final_softcap; cap > 0) compute(queue, cap * tanh(load(y, index()) / cap), y);
}

}  // namespace heed
