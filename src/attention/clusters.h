// Rows that lie together: k-means and hash codes, made where the rows lie.
#pragma once
#include <functional>

#include "attention/mechanism.h"

namespace heed {

struct Clusters {
  Tensor centroids;  // F32 [count, d]
  Tensor labels;     // I32, as the rows of the segment
};

/// Codes of rows (F32 [rows, d]) in some tables of `bits` random planes each, whose normals are F32 [tables · bits,
/// d]: bit b of a code says that the row lies on the upper side of plane b (SimHash; Charikar, 2002). [rows, tables],
/// scratch.
Tensor hashed(Queue&, const Tensor& rows, const Tensor& planes, int bits);

/// The `count` numbers that stand for a density over low … high (any multiple of it) with the least mean squared error,
/// ascending, on the host: Lloyd's rounds over a grid of 4096 (Lloyd, 1982; Max, 1960). Each is the mean of its cell,
/// and cells end half way to the neighbours.
std::vector<double> lloyd_max(int count, double low, double high, const std::function<double(double)>& density);

/// k-means (Lloyd, 1982) of one segment of `length` ≥ 1 rows (F32), begun with rows spread evenly over it: `rounds`
/// times every row joins a centroid and centroids become the means of their rows; one that nobody joins stays. Rows
/// join the centroid of the largest cosine, or the nearest one. Labels are those of the returned centroids. Scratch.
Clusters clustered(Queue&, const Ragged& segment, int64_t length, int64_t count, int rounds, bool cosine);

}  // namespace heed
