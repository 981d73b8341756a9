// The oracle: every kernel as plain loops in f64, written to be read beside kernels.h and nothing else.
#pragma once
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels/kernels.h"

namespace heed::reference {

template <class Entry>
using Function = std::remove_pointer_t<Entry>;

Function<decltype(Kernels::attend)> attend;
Function<decltype(Kernels::attend_backward)> attend_backward;
Function<decltype(Kernels::attend_store)> attend_store;
Function<decltype(Kernels::merge)> merge;
Function<decltype(Kernels::observe)> observe;
Function<decltype(Kernels::observe_rows)> observe_rows;
Function<decltype(Kernels::pool)> pool;
Function<decltype(Kernels::smooth)> smooth;
Function<decltype(Kernels::proxy)> proxy;
Function<decltype(Kernels::reduce)> reduce;
Function<decltype(Kernels::select)> select;
Function<decltype(Kernels::compute)> compute;
Function<decltype(Kernels::offsets)> offsets;
Function<decltype(Kernels::tile_blocks)> tile_blocks;
Function<decltype(Kernels::unite)> unite;
Function<decltype(Kernels::count_pairs)> count_pairs;
Function<decltype(Kernels::recur)> recur;
Function<decltype(Kernels::recur_backward)> recur_backward;
Function<decltype(Kernels::scan)> scan;
Function<decltype(Kernels::combine)> combine;
Function<decltype(Kernels::spread)> spread;
Function<decltype(Kernels::page_write)> page_write;
Function<decltype(Kernels::page_read)> page_read;
Function<decltype(Kernels::page_move)> page_move;
Function<decltype(Kernels::column_read)> column_read;
Function<decltype(Kernels::column_write)> column_write;
Function<decltype(Kernels::page_supply)> page_supply;
Function<decltype(Kernels::page_grow)> page_grow;
Function<decltype(Kernels::page_own)> page_own;
Function<decltype(Kernels::page_pair)> page_pair;
Function<decltype(Kernels::page_shrink)> page_shrink;
Function<decltype(Kernels::page_hold)> page_hold;
Function<decltype(Kernels::page_convert)> page_convert;
Function<decltype(Kernels::page_score)> page_score;
Function<decltype(Kernels::page_choose)> page_choose;
Function<decltype(Kernels::matmul)> matmul;
Function<decltype(Kernels::matmul_each)> matmul_each;
Function<decltype(Kernels::matmul_glu)> matmul_glu;
Function<decltype(Kernels::embed)> embed;
Function<decltype(Kernels::rms_norm)> rms_norm;
Function<decltype(Kernels::split_heads)> split_heads;
Function<decltype(Kernels::merge_heads)> merge_heads;
Function<decltype(Kernels::glu)> glu;
Function<decltype(Kernels::add)> add;
Function<decltype(Kernels::dequantise)> dequantise;

inline constexpr double infinity = std::numeric_limits<double>::infinity();

/// Element `offset` of a plain number type, and the way back.
double load(const Tensor& t, int64_t offset);
void store(const Tensor& t, int64_t offset, double x);

/// Element c of row r of [rows] (c = 0) or [rows, width].
inline int64_t offset(const Tensor& t, int64_t r, int64_t c = 0) {
  return r * t.stride[0] + (t.rank > 1 ? c * t.stride[1] : 0);
}
inline int64_t width(const Tensor& t) { return t.rank > 1 ? t.size[1] : 1; }
inline double number(const Tensor& t, int64_t r, int64_t c = 0) { return load(t, offset(t, r, c)); }

/// Row r of a [rows, width] tensor as f64.
std::vector<double> row(const Tensor& t, int64_t r);
void set_row(const Tensor& t, int64_t r, const std::vector<double>& x);

/// log Σ e^x; −∞ of nothing.
double log_sum_exp(const std::vector<double>& x);

/// Turns x by `position` as Rope says.
void rotate(const Rope& rope, int64_t position, double* x);

}  // namespace heed::reference
