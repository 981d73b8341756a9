// Backward through a session's layers: what each was given is kept, in the order of the layers, and taken in the reverse one.
#include <algorithm>

#include "attention/rotation.h"
#include "attention/scores.h"
#include "model/gradients.h"
#include "model/session_impl.h"
#include "model/transformer.h"

namespace heed {

void Session::Impl::gradients(const std::vector<std::span<const int32_t>>& fed, const Objective& objective, const Tap& look) {
  if (positions != Read::Positions::True)
    throw Error(Code::Unsupported, "session", "there are no gradients where keys are read at their places in the cache");
  for (size_t s = 0; s < fed.size(); ++s) check_reach(next[s] + int64_t(fed[s].size()));
  const auto forget = [&] {
    for (int s = 0; s < options.sequences; ++s) store->truncate(queue, s, next[size_t(s)]);
    store->sync();
  };
  const Backward how{objective, look};
  try {
    feed(fed, Phase::Replay, true, Logits::None, {}, {.gradients = &how});
  } catch (...) {
    tapes = nullptr;
    forget();
    throw;
  }
  forget();
}

Objective Session::prediction_loss(std::span<const int32_t> tokens) const {
  std::vector<int32_t> next(tokens.begin() + std::min<ptrdiff_t>(1, std::ssize(tokens)), tokens.end());
  next.push_back(-1);
  const auto weights = impl_->weights;
  return [next, weights, architecture = impl_->architecture()](Queue& queue, Tensor x, Tensor d_x) {
    prediction_backward(queue, *weights, architecture, x, queue.upload(next), d_x);
  };
}

Tensor Session::Impl::forward(Batch& batch, const Backward& how) {
  const ModelInfo& m = info();
  const int64_t rows = batch.total * m.h;
  std::vector<Tape> kept(size_t(m.layers));
  for (Tape& tape : kept) {
    tape.x = queue.scratch.take(Dtype::F32, {batch.total, m.hidden});
    tape.q = queue.scratch.take(Dtype::F32, {rows, m.d}), tape.out = queue.scratch.take(Dtype::F32, {rows, m.d_v});
    tape.lse = queue.scratch.take(Dtype::F32, {rows});
  }
  tapes = &kept;
  const Tensor x = forward(batch);
  tapes = nullptr;
  Clock clock(times.observe);
  const Tensor d_x = queue.scratch.take(Dtype::F32, {batch.total, m.hidden});
  how.objective(queue, x, d_x);
  for (int l = m.layers - 1; l >= 0; --l) {
    if (interrupted())
      throw Error(Code::Interrupted, "session", "stopped on the way back, in layer " + std::to_string(l));
    layer_backward(batch, l, kept[size_t(l)], d_x, how.look);
  }
  return x;
}

/// Gradients of heads, back to how they came from their matrix: F32 [T, heads·width], from new rows d of a ragged (in the
/// layer's coordinates). rows: what came from the matrix, needed by a norm.
Tensor Session::Impl::head_rows_backward(const Batch& batch, const Ragged& d, int64_t heads, const Buffer& basis_back,
                                         const Rope* rope, Tensor norm, Tensor rows) {
  const int64_t width = d.values.size[1], all = batch.total * heads;
  const Tensor merged = queue.scratch.take(Dtype::F32, {batch.total, heads * width});
  queue.run->merge_heads(queue, d, batch.first, merged);
  const Ragged rows_of_heads = one_segment(queue, merged.reshape({all, width}));
  Ragged out = rows_of_heads;
  if (basis_back) {
    out.values = queue.scratch.take(Dtype::F32, {all, width});
    change_basis(queue, rows_of_heads, basis_back, out);
  }
  if (rope)
    out = turned(queue, out, backwards(queue, *rope),
                 compute(queue, Dtype::I32, {all}, load(batch.positions, floor_div(index(), heads))));
  if (norm) {
    const Tensor d_rows = queue.scratch.take(Dtype::F32, {all, width});
    rms_norm_backward(queue, rows.reshape({all, width}), norm, architecture().norm_eps, out.values, false, d_rows);
    out.values = d_rows;
  }
  return out.values.reshape({batch.total, heads * width});
}

void Session::Impl::layer_backward(Batch& batch, int l, const Tape& tape, Tensor d_x, const Tap& look) {
  const ModelInfo& m = info();
  const Kernels& run = *queue.run;
  const int64_t total = batch.total;
  LayerStore& entries = store->layer(l);
  const LayerWeights& w = weights->layers[size_t(l)];
  const Rope* rope = m.rope(l);
  const Scratch scope(queue.scratch);
  LayerView view = view_of(batch, l, tape.x);
  const Basis none, &basis = view.basis ? *view.basis : none;
  for (int64_t s = 0; s < entries.segments(); ++s) view.key_rows.push_back(entries.length(s));
  view.q = head_major(batch, Dtype::F32, m.h, m.d);
  view.q.values = tape.q, view.out = tape.out, view.lse = tape.lse;
  const auto of_values = [&](Tensor values) {
    Ragged out = view.q;
    out.values = values;
    return out;
  };

  // The way back to attention's output.
  const auto rows = [&](int64_t width) { return queue.scratch.take(Dtype::F32, {total, width}); };
  const Tensor attention = rows(int64_t(m.h) * m.d_v), d_attention = rows(int64_t(m.h) * m.d_v), d_output = rows(m.hidden);
  Ragged out = of_values(tape.out);
  if (basis.v) {
    out.values = queue.scratch.take(Dtype::F32, {total * m.h, m.d_v});
    change_basis(queue, of_values(tape.out), basis.v_back, out);
  }
  run.merge_heads(queue, out, batch.first, attention);
  finish_backward(queue, *weights, architecture(), l, attention, tape.x, options.ubatch, d_x, d_output, d_attention);
  Ragged d_out = of_values(queue.scratch.take(Dtype::F32, {total * m.h, m.d_v}));
  const Heads split{.x = d_attention.reshape({total, m.h, m.d_v}), .out = d_out};
  run.split_heads(queue, batch.first, 0, {&split, 1});
  if (basis.v) {
    const Ragged plain = d_out;
    d_out.values = queue.scratch.take(Dtype::F32, {total * m.h, m.d_v});
    change_basis(queue, plain, basis.v, d_out);
  }

  // Through attention. The new keys and values are the last of each segment, as the store holds them.
  const int64_t held = entries.entries();
  view.k = {.values = queue.scratch.take(panel_type(store->options().k), {held, m.d}),
            .offsets = entries.offsets(queue),
            .ends = {},
            .heads = m.g,
            .bound = held};
  view.v = view.k;
  view.v.values = queue.scratch.take(panel_type(store->options().v), {held, m.d_v});
  view.k_pos = view.mods.k_pos = queue.scratch.take(Dtype::I32, {held});
  const Read read{.plan = {}, .positions = positions, .rope = rope};
  run.page_read(queue, entries.pages(), store->options().plain_keys && rope ? &read : nullptr, view.k, view.v, view.k_pos);
  if (store->options().bias) {
    Ragged bias = view.k;
    bias.values = view.mods.key_bias = queue.scratch.take(Dtype::F32, {held});
    run.column_read(queue, entries.pages(), kBiasColumn, bias);
  }
  Gradients gradients{d_output, queue.scratch.take(Dtype::F32, {total * m.h, m.d}),
                      queue.scratch.take(Dtype::F32, {held, m.d}), queue.scratch.take(Dtype::F32, {held, m.d_v})};
  run.attend_backward(queue, view.q, view.k, view.v, view.plan, view.mods, view.out, view.lse, d_out.values,
                      gradients.q, gradients.k, gradients.v, {}, {});
  view.gradients = &gradients;
  if (look) look(view);
  if (l == 0) return;

  // And through the projections to what the layer was given.
  const Num s = index();
  const Tensor new_keys = compute(
      queue, Dtype::I64, {entries.segments() + 1},
      pick(s < entries.segments(), load(view.k.offsets, s + 1) - (load(batch.kv_offsets, s + 1) - load(batch.kv_offsets, s)),
           load(view.k.offsets, s)));
  Ragged d_k{gradients.k, new_keys, view.k.offsets.slice(0, 1, entries.segments() + 1), m.g, total * m.g}, d_v = d_k;
  d_v.values = gradients.v;
  Tensor q_rows, k_rows;
  if (w.q_norm || w.k_norm) {
    q_rows = rows(int64_t(m.h) * m.d), k_rows = rows(int64_t(m.g) * m.d);
    project(queue, *weights, architecture(), l, tape.x, options.ubatch, q_rows, k_rows, rows(int64_t(m.g) * m.d_v));
  }
  project_backward(queue, *weights, architecture(), l, tape.x, options.ubatch,
                   head_rows_backward(batch, of_values(gradients.q), m.h, basis.k_back, rope, w.q_norm, q_rows),
                   head_rows_backward(batch, d_k, m.g, basis.k_back, rope, w.k_norm, k_rows),
                   head_rows_backward(batch, d_v, m.g, basis.v_back, nullptr, {}, {}), d_x);
}

}  // namespace heed
