// Weights of no model, for tests and for measuring speed.
#pragma once
#include "base/tensor.h"

namespace heed {

/// Fills a contiguous host tensor with numbers of mean 0 and deviation about 0.02: normal ones for F32, F16 and BF16,
/// uniform codes for block-quantised types. The same seed gives the same weights on any number of threads. Throws
/// Error(Unsupported) for other types.
void fill_random(const Tensor& weights, uint64_t seed);

}  // namespace heed
