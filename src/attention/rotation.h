// Rotations. Rotary embedding on what a mechanism computes: turning rows further, back, and by the mean of positions to
// come; and orthogonal matrices that spread what lies in few channels over all (Basis).
#pragma once
#include "attention/mechanism.h"

namespace heed {

/// Rows of x (F32), each turned by its position (I32, as x's rows).
Ragged turned(Queue&, const Ragged& x, const Rope& rope, const Tensor& positions);

/// The rotation backwards.
Rope backwards(Queue&, const Rope&);

/// The mean of R(first[s]) … R(first[s] + count − 1) as a matrix for every segment of sequence s, transposed:
/// [sequences · heads, d, d]. count is a power of 2: the mean of R(0) … R(2^b − 1) is Π (1 + R(2^k)) / 2.
Tensor mean_rotation(Queue&, const Rope&, int64_t d, int64_t heads, std::span<const int64_t> first, int64_t count);

/// Hadamard matrices of `order` (a power of 2) along the diagonal, orthonormal: F32 [d, d] of the host; order divides d.
/// Symmetric and its own inverse; its entries are ± 1/√order (Sylvester, 1867).
Buffer hadamard(int64_t d, int64_t order);
/// A random orthogonal matrix: normal rows made orthonormal one by one (Haar measure). F32 [d, d] of the host.
Buffer random_orthogonal(int64_t d, uint64_t seed);
/// A basis of the host where kernels read it, transposes included.
Basis placed(Queue&, const Basis& host);
/// matrix x for every row x of a ragged (F32, end to end), into `out`, whose segments may lie anywhere and hold any plain
/// type; matrix: F32 [d, d].
void change_basis(Queue&, const Ragged& x, const Tensor& matrix, const Ragged& out);

/// matrix[s]^T x for every row x of segment s: [rows, width]; matrix is F32 [segments, d, width].
Ragged transformed(Queue&, const Ragged& x, const Tensor& matrix);
/// Σ x x^T over each segment: [segments, d, d].
Tensor outer_sums(Queue&, const Ragged& x);
/// (matrix + ridge · I)^-1 of symmetric matrices F32 [count, d, d] that become positive definite so: Gauss–Jordan in f64
/// without pivoting, 2 d launches.
Tensor inverse(Queue&, const Tensor& matrix, double ridge = 0);
/// Rows that span the `rank` main directions of every segment's rows, F32 [segments · rank, d], and their dual: the
/// projection is dual^T rows. rank < d; how near they come is said of main_directions.
struct MainRows {
  Tensor rows, dual;
};
MainRows main_rows(Queue&, const Ragged& x, int64_t rank, int rounds);
/// The projection on the `rank` main directions of every segment's rows, eigenvectors of Σ x x^T to its largest
/// eigenvalues: F32 [segments, d, d], symmetric. By orthogonal iteration from random rows: the error falls by
/// λ_rank+1 / λ_rank a round (eigenvalues below 1e-5 of their sum count as that), about 2 rank launches each.
Tensor main_directions(Queue&, const Ragged& x, int64_t rank, int rounds);

/// The new queries as they would stand, on average, at the next `count` positions (a power of 2): turned back to before
/// their rotation, then by the mean of the rotations to come.
Ragged future_queries(const LayerView&, int64_t count);

}  // namespace heed
