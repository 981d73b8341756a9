// What the files of this folder share on the host side. A function declared here has the type of the table entry of its
// name; its contract is written in kernels/kernels.h. Every tensor inside the arguments is device memory.
#pragma once
#include <type_traits>

#include "kernels/kernels.h"

namespace heed::cuda {

/// Whether the current device has the instructions of compute capability 9.0.
bool hopper();

template <class Entry>
using Function = std::remove_pointer_t<Entry>;

Function<decltype(Kernels::attend)> attend;
Function<decltype(Kernels::attend_backward)> attend_backward;
Function<decltype(Kernels::attend_store)> attend_store;
Function<decltype(Kernels::merge)> merge;
Function<decltype(Kernels::observe)> observe;
Function<decltype(Kernels::observe_runs)> observe_runs;
Function<decltype(Kernels::observe_rows)> observe_rows;
Function<decltype(Kernels::pool)> pool;
Function<decltype(Kernels::smooth)> smooth;
Function<decltype(Kernels::proxy)> proxy;
Function<decltype(Kernels::reduce)> reduce;
Function<decltype(Kernels::select)> select;
Function<decltype(Kernels::recur)> recur;
Function<decltype(Kernels::recur_backward)> recur_backward;
Function<decltype(Kernels::scan)> scan;
Function<decltype(Kernels::page_write)> page_write;
Function<decltype(Kernels::page_read)> page_read;
Function<decltype(Kernels::page_move)> page_move;
Function<decltype(Kernels::column_read)> column_read;
Function<decltype(Kernels::column_write)> column_write;
Function<decltype(Kernels::page_score)> page_score;
Function<decltype(Kernels::page_choose)> page_choose;
Function<decltype(Kernels::matmul)> matmul;
Function<decltype(Kernels::matmul_each)> matmul_each;
Function<decltype(Kernels::matmul_glu)> matmul_glu;
Function<decltype(Kernels::combine)> combine;
Function<decltype(Kernels::spread)> spread;
Function<decltype(Kernels::embed)> embed;
Function<decltype(Kernels::rms_norm)> rms_norm;
Function<decltype(Kernels::split_heads)> split_heads;
Function<decltype(Kernels::merge_heads)> merge_heads;
Function<decltype(Kernels::append_heads)> append_heads;
Function<decltype(Kernels::glu)> glu;
Function<decltype(Kernels::add)> add;
Function<decltype(Kernels::dequantise)> dequantise;
Function<decltype(Kernels::compute)> compute;
Function<decltype(Kernels::offsets)> offsets;
Function<decltype(Kernels::tile_blocks)> tile_blocks;
Function<decltype(Kernels::unite)> unite;
Function<decltype(Kernels::proxy_reduce)> proxy_reduce;
Function<decltype(Kernels::count_pairs)> count_pairs;
Function<decltype(Kernels::page_supply)> page_supply;
Function<decltype(Kernels::page_grow)> page_grow;
Function<decltype(Kernels::page_own)> page_own;
Function<decltype(Kernels::page_pair)> page_pair;
Function<decltype(Kernels::page_shrink)> page_shrink;
Function<decltype(Kernels::page_hold)> page_hold;
Function<decltype(Kernels::page_convert)> page_convert;

}  // namespace heed::cuda
