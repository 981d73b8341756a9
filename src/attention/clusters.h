// Clusters of rows: k-means where the rows lie.
#pragma once
#include "attention/mechanism.h"

namespace heed {

struct Clusters {
  Tensor centroids;  // F32 [count, d]
  Tensor labels;     // I32, as the rows of the segment
};

/// k-means (Lloyd, 1982) of one segment of `length` ≥ 1 rows (F32), begun with rows spread evenly over it: `rounds`
/// times every row joins a centroid and centroids become the means of their rows; one that nobody joins stays. Rows
/// join the centroid of the largest cosine, or the nearest one. Labels are those of the returned centroids. Scratch.
Clusters clustered(Queue&, const Ragged& segment, int64_t length, int64_t count, int rounds, bool cosine);

}  // namespace heed
