#include "mechanisms/keep/taken_rows.h"

#include <algorithm>

#include "attention/maps.h"
#include "attention/scores.h"
#include "attention/select.h"

namespace heed::mechanisms {

int64_t Tokens::bytes() const {
  int64_t sum = 0;
  for (const Buffer& buffer : held) sum += buffer->bytes();
  return sum;
}

Tensor Tokens::keep(Queue& queue, Dtype type, std::initializer_list<int64_t> sizes) {
  held.emplace_back(type, sizes, *queue.memory);
  return held.back().view();
}

void tokens_of(LayerView& at, Tokens& to) {
  Queue& queue = at.queue;
  const int64_t g = at.model.g, sequences = at.store->segments() / g;
  for (int64_t s = 0; s < sequences; ++s) to.rows += at.store->length(s * g);
  to.offsets = to.keep(queue, Dtype::I64, {sequences + 1}), to.positions = to.keep(queue, Dtype::I32, {to.rows});
  to.heads = to.keep(queue, Dtype::I64, {sequences * g + 1}), to.head_positions = to.keep(queue, Dtype::I32, {to.rows * g});
  queue.move(offsets_of(queue, sequences, load(at.store->pages().length, index() * g)), to.offsets);
  const Ragged places = stored_positions(at);
  compute(queue, to.like(), load(places.values, begin_of(places, segment() * g) + place()), to.positions);
  queue.move(at.store->offsets(queue), to.heads);
  compute(queue, places, load(places.values, index()), to.head_positions);
}

void leave_store(const LayerView& at) {
  const int64_t segments = at.store->segments();
  const std::vector<int64_t> none(size_t(segments), 0);
  const Tensor zeros = compute(at.queue, Dtype::I32, {segments}, 0);
  at.store->compact(at.queue, zeros, zeros, 1, none, 0);
}

Ragged side_by_side(Queue& queue, const std::vector<Ragged>& layers, const Ragged& like) {
  const int64_t block = layers[0].heads * layers[0].values.size[1], width = int64_t(layers.size()) * block;
  Ragged out = like;
  out.values = queue.scratch.take(Dtype::F32, {like.bound, width});
  for (size_t l = 0; l < layers.size(); ++l) {
    const Scratch scratch(queue.scratch);
    const Tensor own = queue.scratch.take(Dtype::F32, {like.bound, block});
    queue.run->merge_heads(queue, layers[l], like.offsets, own);
    const Num c = channel() - double(int64_t(l) * block);
    compute(queue, pick(c >= 0 && c < block, load(own, place() * block + c), load(out.values, index())), out.values);
  }
  return out;
}

Ragged head_major(Queue& queue, const Tensor& rows, const Tokens& of, int64_t g, const Rope* rope) {
  const int64_t width = rows.size[1] / g;
  Ragged out{.values = queue.scratch.take(Dtype::F32, {of.rows * g, width}),
             .offsets = of.heads,
             .ends = {},
             .heads = g,
             .bound = of.rows * g};
  const Heads heads{.x = rows.reshape({of.rows, g, width}), .rope = rope, .positions = of.positions, .out = out};
  queue.run->split_heads(queue, of.offsets, 0, {&heads, 1});
  return out;
}

void narrow(Queue& queue, const Ragged& rows, const Tensor& to) {
  Ragged out = rows;
  out.values = to, out.heads = 1;
  const Heads kept{.x = rows.values.reshape({rows.values.size[0], 1, rows.values.size[1]}), .out = out};
  queue.run->split_heads(queue, rows.offsets, 0, {&kept, 1});
}

Tensor ends_of(const LayerView& at, const Tokens& of, const std::vector<int64_t>& last) {
  if (std::none_of(last.begin(), last.end(), [](int64_t position) { return position < kForever; })) return {};
  Queue& queue = at.queue;
  const int64_t g = at.model.g;
  const Num s = floor_div(index(), g), begin = load(of.offsets, s), end = load(of.offsets, s + 1);
  const Num left = find(of.positions, begin, end, of_sequence(queue, last, index(), g)) - begin;
  return compute(queue, Dtype::I64, {at.sequences() * g}, load(of.heads, index()) + left);
}

Tensor merged(LayerView& at, int64_t parts,
              const std::function<void(int64_t, const Mods&, const Tensor&, const Tensor&)>& attend) {
  Queue& queue = at.queue;
  const int64_t rows = at.out.size[0], d_v = at.out.size[1];
  const Tensor outs = queue.scratch.take(Dtype::F32, {parts + 1, rows, d_v}),
               sums = queue.scratch.take(Dtype::F32, {parts + 1, rows});
  queue.move(at.out, outs.select(0, parts)), queue.move(at.lse, sums.select(0, parts));
  Mods mods = at.mods;
  mods.gain = mods.sink_logits = mods.key_bias = mods.until = {};
  for (int64_t p = 0; p < parts; ++p) {
    const Scratch scratch(queue.scratch);
    attend(p, mods, outs.select(0, p), sums.select(0, p));
  }
  const Tensor out = queue.scratch.take(Dtype::F32, {rows, d_v}), lse = queue.scratch.take(Dtype::F32, {rows});
  at.run().merge(queue, outs, sums, out, lse);
  at.lse = lse;
  return out;
}

}  // namespace heed::mechanisms
