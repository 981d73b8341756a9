// A layer's arithmetic around attention, and the logits behind the last: rows tiled so that scratch stays small.
#pragma once
#include <algorithm>

#include "base/queue.h"
#include "kernels/kernels.h"
#include "model/model.h"

namespace heed {

/// body(first, last): `tile` of the rows at a time.
template <class Body>
void each_tile(int64_t rows, int64_t tile, Body body) {
  for (int64_t first = 0; first < rows; first += tile) body(first, std::min(first + tile, rows));
}

/// What rows on their way to a product with `weight` are best made of: a prompt's may be as narrow as the product rounds them.
inline Dtype row_type(const Queue& queue, int64_t rows, const Tensor& weight) {
  return rows < 32 || weight.type == Dtype::F32 ? Dtype::F32 : queue.run->prompt_rows;
}

/// q [T, h·d], k [T, g·d], v [T, g·d_v] (F32) of x [T, hidden], `tile` rows at a time.
void project(Queue&, const ModelWeights&, const Architecture&, int layer, Tensor x, int64_t tile, Tensor q, Tensor k,
             Tensor v, const Adapter::Layer* adapter = nullptr);

/// x += the layer's output matrix · attention (F32 or BF16 [T, h·d_v], token-major), then x += its feed-forward part.
void finish(Queue&, const ModelWeights&, const Architecture&, int layer, Tensor attention, int64_t tile, Tensor x,
            const Adapter::Layer* adapter = nullptr);

/// Logits F32 [R, vocabulary] of the rows x [R, hidden].
void logits(Queue&, const ModelWeights&, const Architecture&, Tensor x, Tensor y);

}  // namespace heed
