// Rows that left the store: what a mechanism keeps in place of a layer's entries, and attention over them.
#pragma once
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "attention/mechanism.h"

namespace heed::mechanisms {

/// Which tokens rows stand for, a row for all heads of a token, in buffers that live as long as this.
struct Tokens {
  Tensor offsets;                // I64 [sequences + 1]
  Tensor positions;              // I32 [rows]
  Tensor heads, head_positions;  // the same for rows of every KV head, head-major
  std::vector<Buffer> held;      // what those lie in, and what else is kept of the rows
  int64_t rows = 0;

  int64_t bytes() const;
  Tensor keep(Queue&, Dtype, std::initializer_list<int64_t> sizes);
  /// One segment for each sequence.
  Ragged like() const { return {.values = {}, .offsets = offsets, .ends = {}, .heads = 1, .bound = rows}; }
};

/// The tokens that a layer's store holds, the same in every head.
void tokens_of(LayerView& at, Tokens& to);
/// What was taken over leaves the store.
void leave_store(const LayerView& at);

/// Head-major rows of several layers, side by side: [rows, layers · g · width], a segment a sequence.
Ragged side_by_side(Queue&, const std::vector<Ragged>& layers, const Ragged& like);
/// F32 [rows, g · width] of tokens, head-major, turned to their positions when a rope is given.
Ragged head_major(Queue&, const Tensor& rows, const Tokens& of, int64_t g, const Rope* rope);
/// The same numbers, one segment for each sequence, in another type: to [rows, width].
void narrow(Queue&, const Ragged& rows, const Tensor& to);

/// Rows of one part of a text, of which those at positions from last[sequence] on are forgotten.
template <class Of>
struct Part {
  std::shared_ptr<const Of> of;
  std::vector<int64_t> last;
};
inline constexpr int64_t kForever = int64_t(1) << 40;

/// Where the rows of each KV head end that are not forgotten (Ragged::ends); empty when none are.
Tensor ends_of(const LayerView& at, const Tokens& of, const std::vector<int64_t>& last);

/// Attention over the store (at.out, at.lse) and over parts, merged: attend(part, mods, out, lse) for each. Writes at.lse.
Tensor merged(LayerView& at, int64_t parts,
              const std::function<void(int64_t part, const Mods&, const Tensor& out, const Tensor& lse)>& attend);

}  // namespace heed::mechanisms
