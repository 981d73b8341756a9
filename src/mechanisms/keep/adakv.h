#pragma once
#include "attention/mechanism.h"

namespace heed::mechanisms {

/// The heads of a layer share one pool of what `even` grants them (I32 [layers, segments]); of each, its max(1,
/// ⌊alpha · granted⌋) best entries count as forced. Returns I32 [layers, segments].
Tensor floored(const Allocation&, const Tensor& even, double alpha);

}  // namespace heed::mechanisms
