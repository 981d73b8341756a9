#pragma once
#include "attention/mechanism.h"

namespace heed::mechanisms {

// Leverage scores (Chari et al., 2025): how far an entry's key stands out of the others of its head, whatever is asked:
// the diagonal of Y (YᵀY + λ)⁻¹ Yᵀ, Y the centred keys before rotation, sketched to fewer channels. Keys in segments of
// `keys` only, which may be slices of plain_keys().
Ragged leverage_scores(const LayerView& at, const Ragged& keys, int sketch, double ridge, int64_t seed);

}  // namespace heed::mechanisms
