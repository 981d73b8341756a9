// What the files of this folder share. Each is compiled once for each instruction set, into namespace heed::HEED_ISA.
// A function declared here has the type of the table entry of its name; its contract is written in kernels/kernels.h.
#pragma once
#include <type_traits>

#include "kernels/cpu/products.h"
#include "kernels/kernels.h"

namespace heed::HEED_ISA {

/// The table of this instruction set with such products of prompts, made at the first call: nothing of an instruction set that
/// the machine lacks may run before dispatch.cpp has asked for it.
const Kernels& table(Products);

/// Each sets the entries that its file names; an entry nobody sets stays the reference's.
void fill_attention(Kernels&);  // attention.cpp: attend, attend_store, merge, observe*, page_*, column_*
void fill_planning(Kernels&);  // planning.cpp: attend_backward, pool, smooth, proxy, reduce, select, scan, combine, spread
void fill_recurrence(Kernels&);          // recurrence.cpp: recur, recur_backward
void fill_model(Kernels&);               // model.cpp: embed, norms, heads, glu, add, dequantise, interleave
void fill_products(Kernels&, Products);  // matmul.cpp: matmul, matmul_each, matmul_glu

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
Function<decltype(Kernels::page_score)> page_score;
Function<decltype(Kernels::page_choose)> page_choose;
Function<decltype(Kernels::embed)> embed;
Function<decltype(Kernels::rms_norm)> rms_norm;
Function<decltype(Kernels::split_heads)> split_heads;
Function<decltype(Kernels::merge_heads)> merge_heads;
Function<decltype(Kernels::glu)> glu;
Function<decltype(Kernels::add)> add;
Function<decltype(Kernels::dequantise)> dequantise;
Function<decltype(Kernels::interleave)> interleave;

}  // namespace heed::HEED_ISA
