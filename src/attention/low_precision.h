// Operands of attention as low-precision products see them: rounded to a number format, or as whole numbers with scales.
#pragma once
#include <span>

#include "attention/mechanism.h"

namespace heed {

enum class Format : uint8_t {
  F32,
  F16,
  E4M3,  // 8 bits: 3 of mantissa, the largest is 448, the smallest 2^-9; halves to even
};

/// x as the nearest number of the format, in place: F32, contiguous. E4M3: larger ones become ± 448.
void round_to(Queue&, Format, const Tensor& x);

/// Which rows of a segment share a scale. Rows stand in blocks of `block`; in each, runs of `run` rows belong to groups 0, 1, …,
/// `groups` − 1 in turn. groups · run divides block.
struct CodeGroups {
  int64_t block = 1, groups = 1, run = 1;
};
/// Rows as whole numbers from −levels to levels times the scale of their group, max |x| / levels + 1e-7: halves away from
/// zero. lengths: rows of each segment. F32.
Ragged coded(Queue&, const Ragged& x, std::span<const int64_t> lengths, int levels, const CodeGroups&);

}  // namespace heed
